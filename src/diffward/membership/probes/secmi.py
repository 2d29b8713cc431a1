"""Whether the model finds its way back over one step of the path that it takes from the picture."""

from __future__ import annotations

from torch import Tensor

from diffward.membership.probe import PROBES, Query
from diffward.membership.schedule import ddim_step, moment

# Of 1,000: the authors' code for Stable Diffusion compares at t = 140, their paper at 100 (CIFAR).
STEP, T = 10, 140


@PROBES.register("secmi", evaluations=lambda layout: T // STEP + 2, width=1, paired=False)
def secmi(query: Query) -> Tensor:
    """|psi(phi(z_t, t), t + 10) - z_t| (n, C, h, w), z_t from z_0 by deterministic DDIM in steps of 10.

    phi is one step to more noise, psi one step to less (Duan et al. 2023, definition of the t-error).
    """
    z, text = query.latents, query.text("caption")

    def step(z: Tensor, start: int, end: int) -> Tensor:
        t, target = (moment(query.denoiser, at, z) for at in (start, end))
        return ddim_step(query.denoiser, query.predict(z, t, text), z, t, target)

    for start in range(0, T, STEP):
        z = step(z, start, start + STEP)
    return (step(step(z, T, T + STEP), T + STEP, T) - z).abs()
