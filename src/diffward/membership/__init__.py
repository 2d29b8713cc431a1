"""Membership inference: scores, attacks, controls, statistics."""
