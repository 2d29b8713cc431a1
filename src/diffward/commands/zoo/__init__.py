"""Commands of `diffward zoo`."""
