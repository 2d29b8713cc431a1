"""Matching updates: pictures and a conditioning whose gradient points where the LoRA went.

The baseline that weight inversion is compared with (Yao et al. 2024, arXiv 2409.08482, after Geiping et al. 2020,
arXiv 2003.14053). Their code takes the loss after an optimizer's step, on leaves of the graph, so that its gradient
is exactly zero; here it is double backpropagation. Only directions are compared, module by module, since rate and
steps are unknown, and only what a LoRA with these factors can express: from B = 0 the first change of W = B A under
a gradient G of W is proportional to G A^T A, which for a random A is G V V^T, with V the right singular vectors of
W. These are those of its canonical form, so that the factorisation does not matter.

Known pictures are told apart by their cosine, but a search from noise finds latents that fit the pairs and are no
pictures: as a way to pictures it is a baseline, and a weak one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffward.errors import InputError
from diffward.lora.canonical import Canonical, canonical_module
from diffward.models.pairs import Pairs

if TYPE_CHECKING:
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser


@dataclass(frozen=True)
class Matched:
    """What was found.

    Attributes:
        latents: (k, C, h, w).
        conditioning: (1, L, D), one for all pictures.
        history: mean cosine before each step and at the end, (steps + 1,).
        cosines: of each module at the end.
    """

    latents: Tensor
    conditioning: Tensor
    history: Tensor
    cosines: dict[str, float]


class Matching:
    """The cosines between the gradient's descent and a LoRA's change, on the bare base.

    Raises:
        InputError: the LoRA is for another base, or changes nothing in the UNet.
    """

    def __init__(self, denoiser: Denoiser, weights: LoraWeights, pairs: Pairs) -> None:
        denoiser.detach()
        self.denoiser, self.pairs = denoiser, pairs
        self.modules: dict[str, Canonical] = {}
        self._weights: dict[str, torch.nn.Parameter] = {}
        for name, module in weights.resolve(denoiser.module_shapes()).modules.items():
            # What the text encoder learned is left to the conditioning, which is free.
            if not name.startswith("unet."):
                continue
            parameter = denoiser.unet.get_submodule(name.removeprefix("unet.")).weight
            one = canonical_module(module, parameter.detach().cpu())
            if one.sigma[0] > 0:
                self.modules[name] = one.significant().to(denoiser.device)
                self._weights[name] = parameter
        if not self.modules:
            raise InputError("the LoRA changes nothing in the UNet: there is nothing to match")

    def cosines(self, latents: Tensor, conditioning: Tensor, *, graph: bool = False) -> Tensor:
        """One a module, (M,).

        Args:
            latents: (k, C, h, w); each is noised by all pairs.
            conditioning: (1 or k, L, D).
            graph: whether to differentiate through it.
        """
        count, draws = len(latents), len(self.pairs)
        with torch.enable_grad(), self._differentiable():
            errors = self.denoiser.errors(
                latents.repeat_interleave(draws, 0),
                self.pairs.t.repeat(count).to(latents.device),
                self.pairs.eps.repeat(count, 1, 1, 1).to(latents),
                conditioning.expand(count, -1, -1).repeat_interleave(draws, 0),
            )
            gradients = torch.autograd.grad(
                errors.mean(), list(self._weights.values()), create_graph=graph
            )
        found = [
            one.alignment(gradient.flatten(1) @ one.v)
            for gradient, one in zip(gradients, self.modules.values(), strict=True)
        ]
        return torch.stack(found)

    @contextlib.contextmanager
    def _differentiable(self) -> Iterator[None]:
        """The adapted weights ask for gradients, and attention is computed so that it can be differentiated twice."""
        before = [p.requires_grad for p in self._weights.values()]
        for parameter in self._weights.values():
            parameter.requires_grad_(True)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            for parameter, flag in zip(self._weights.values(), before, strict=True):
                parameter.requires_grad_(flag)


def match_gradients(
    denoiser: Denoiser,
    weights: LoraWeights,
    *,
    pictures: int = 4,
    steps: int = 200,
    lr: float = 0.1,
    seed: int = 0,
    pairs: int = 4,
    caption: str = "",
    start: Tensor | None = None,
) -> Matched:
    """Look for pictures that would have changed the base as this LoRA did.

    Args:
        denoiser: the base; an adapter on it is taken off.
        pictures: latents that are looked for.
        lr: of Adam, for latents and conditioning alike; it falls to zero along a cosine.
        pairs: fixed (t, eps) under which each latent is looked at.
        caption: where the conditioning starts.
        start: latents (k, C, h, w) to start from; noise of the seed by default.

    Raises:
        InputError: no pictures or steps, the LoRA is for another base, or it changes nothing in the UNet.
    """
    if pictures < 1 or steps < 1:
        raise InputError(f"{pictures} pictures, {steps} steps: both must be at least 1")
    matching = Matching(denoiser, weights, Pairs.draw(denoiser, pairs, seed))
    if start is None:
        g = torch.Generator().manual_seed(seed + 1)
        start = torch.randn((pictures, *denoiser.latent_shape), generator=g)
    latents = start.detach().to(denoiser.device, torch.float32).clone().requires_grad_(True)
    conditioning = denoiser.condition([caption]).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([latents, conditioning], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = []
    for _ in range(steps):
        loss = 1 - matching.cosines(latents, conditioning, graph=True).mean()
        history.append(1 - loss.item())
        # Not backward(): that would leave gradients on the base's weights.
        latents.grad, conditioning.grad = torch.autograd.grad(loss, [latents, conditioning])
        optimizer.step()
        schedule.step()
    last = matching.cosines(latents, conditioning).detach()
    return Matched(
        latents.detach(), conditioning.detach(), torch.tensor([*history, float(last.mean())]),
        dict(zip(matching.modules, last.tolist(), strict=True)),
    )  # fmt: skip
