"""opacus's optimizer, with noise from a secret stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from diffward.errors import TrainingError


class NoisyOptimizer(DPOptimizer):
    """`DPOptimizer` for draws that come in parts and may be empty, and for noise from elsewhere.

    Attributes:
        pictures: how many the last pass had; each factor must have as many gradients.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        noise: Callable[[int, torch.device], Tensor],
        *,
        multiplier: float,
        clip: float,
        expected: float,
    ) -> None:
        """
        Args:
            noise: gives so many standard normal numbers for the present step, on a device.
            multiplier: standard deviation of the noise, in units of `clip`.
            clip: largest norm of the gradient of one picture.
            expected: pictures in a step on average, what the sum is divided by.
        """
        super().__init__(
            optimizer,
            noise_multiplier=multiplier,
            max_grad_norm=clip,
            expected_batch_size=expected,  # type: ignore[arg-type]
        )
        self.noise = noise
        self.pictures = 0

    @property
    def accumulated_iterations(self) -> int:
        return 1  # `expected` counts the pictures of all passes

    def _get_flat_grad_sample(self, p: Tensor) -> Tensor:
        sample = p.grad_sample  # type: ignore[attr-defined]
        return p.new_zeros(0, *p.shape) if sample is None else sample

    def clip_and_accumulate(self) -> None:
        """Add the clipped gradients of the last pass to the step's sum, and make room for the next pass.

        Raises:
            TrainingError: a factor did not get one gradient a picture. Such a run would be all noise, with
                a fair epsilon (opacus #820).
        """
        missing = sum(len(g) != self.pictures for g in self.grad_samples)
        if missing:
            raise TrainingError(
                f"{missing} of {len(self.params)} LoRA factors have no gradient of each picture; "
                "dp would train on noise alone"
            )
        super().clip_and_accumulate()
        for p in self.params:
            p.grad_sample = None  # type: ignore[attr-defined]
        self.pictures = 0

    def add_noise(self) -> None:
        """Gradient = clipped sum + N(0, (multiplier clip)^2), in every coordinate."""
        sizes = [p.numel() for p in self.params]
        noise = self.noise(sum(sizes), self.params[0].device)
        noise *= self.noise_multiplier * self.max_grad_norm
        for p, part in zip(self.params, noise.split(sizes), strict=True):
            p.grad = p.summed_grad.view_as(p) + part.view_as(p)  # type: ignore[attr-defined]
