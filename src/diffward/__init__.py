"""diffward: know what your fine-tuned diffusion model gives away, before you share it."""

__version__ = "0.1.0"
