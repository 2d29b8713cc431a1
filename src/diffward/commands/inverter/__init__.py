"""Commands of `diffward inverter`."""
