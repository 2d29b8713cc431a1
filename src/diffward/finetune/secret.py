"""Randomness that nobody can recompute, and that a resumed run finds again."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass
class Secret:
    """32 bytes of the system's randomness, and streams of numbers that follow from them."""

    value: bytes = field(default_factory=lambda: os.urandom(32), repr=False)

    def stream(self, use: str, *place: int) -> np.random.Generator:
        """Numbers for one use at one place of a run, by a counter under a key (Philox)."""
        return np.random.Generator(
            np.random.Philox(key=int.from_bytes(self._hash(use, place)[:16]))
        )

    def normal(self, count: int, device: torch.device, use: str, *place: int) -> Tensor:
        """Standard normal noise (count,), float32.

        The halved sum of four streams, as in opacus's `secure_mode`: what rounding does to one of them then
        tells nothing of the sum (Holohan and Braghin 2021). And the seeds cannot be tried out: torch's
        generator on the CPU has 32 bits.
        """
        seeds = np.frombuffer(self._hash(use, place), np.uint64)
        total = torch.zeros(count, device=device)
        for seed in seeds.tolist():
            generator = torch.Generator(device).manual_seed(seed)
            total += torch.randn(count, device=device, generator=generator)
        return total / len(seeds) ** 0.5

    def _hash(self, use: str, place: tuple[int, ...]) -> bytes:
        """32 bytes that tell nothing of the secret, nor of those for another use or place."""
        return hashlib.blake2b(f"{use} {place}".encode(), key=self.value, digest_size=32).digest()

    def state(self) -> Tensor:
        return torch.tensor(list(self.value), dtype=torch.uint8)

    @classmethod
    def of(cls, state: Tensor) -> Secret:
        return cls(bytes(state.tolist()))
