"""Gradients of the denoising loss along a LoRA's factors, picture by picture, in batches.

The adapter is merged into the weights, so its factors are no parameters. But with W' = W + s B A,
a module's input x and the loss's gradient g at its output, the chain rule gives for each sample

    dL/dB = s sum_p g_p (A x_p)ᵀ,    dL/dA = s sum_p (Bᵀ g_p) x_pᵀ

over tokens (or places of a convolution) p: products with one low-rank side. One forward and one
backward pass serve all modules and a whole batch, since samples do not mix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffward.membership.factors import along_factors
from diffward.membership.layout import Layout
from diffward.membership.probe import PROBES, Query

PAIRS = 8  # of the K: evenly spaced timesteps
SHARE = 4  # a pass that keeps its graph holds so many fewer samples
PLACES = 4096  # and no more places than one latent of 64 x 64, whose graph takes some 4 GB


def gradient_pairs(layout: Layout) -> list[int]:
    """Which pairs: evenly spaced ones. GSA takes 10 equidistant timesteps."""
    count = min(PAIRS, len(layout.timesteps))
    return [i * len(layout.timesteps) // count for i in range(count)]


@PROBES.register(
    "gradients",
    evaluations=lambda layout: 3 * len(gradient_pairs(layout)),
    paired=False,
    factors=True,
)
def gradients(query: Query) -> Tensor:
    """Squared gradient norms (n, M, 2, 2) by UNet module, factor (A, B), and kind.

    Kind 0: of the gradient of the loss averaged over timesteps (GSA1). Kind 1: the average over
    timesteps of the squared norms (GSA2). The loss is the mean squared error under the caption.
    Modules in the order in which the UNet calls them; those that it never calls are left out, as
    is the text encoder.
    """
    modules = query.factors().modules
    totals: dict[str, _Totals] = {}
    for picture, name, layer, x, slope in slopes(query, modules):
        scale = modules[name].scale / query.latents[0].numel()
        parts = tuple(scale * p for p in along_factors(layer, modules[name].tensors, x, slope))
        total = totals.setdefault(name, _Totals.like(parts, len(query.latents)))
        total.add(parts, picture)
    if not totals:
        return torch.zeros((len(query.latents), 0, 2, 2))
    count = len(gradient_pairs(query.layout))
    return torch.stack([total.norms(count) for total in totals.values()], dim=1)


Slope = tuple[Tensor, str, nn.Module, Tensor, Tensor]
"""Pictures (m,) of some samples; a module, its name, its input x and the loss's gradient g at its output, (m, …)."""


def slopes(query: Query, names: Collection[str], text: str = "caption") -> Iterator[Slope]:
    """Module after module of pass after pass, until each picture was seen at each of `gradient_pairs`.

    Of the sum, not the mean, of the squared errors under the condition `text`.
    """
    if not names:
        return
    chosen = torch.tensor(gradient_pairs(query.layout))
    n, k = len(query.latents), len(chosen)
    height, width = query.latents.shape[-2:]
    size = max(1, min(query.batch // SHARE, PLACES // (height * width)))
    for at in torch.arange(n * k, device=query.latents.device).split(size):
        yield from _one_pass(query, names, at // k, chosen[at.cpu() % k], text)


@dataclass
class _Totals:
    """Of one module: gradients (n, …) of A and B, and their squared norms (n, 2), summed over pairs."""

    gradients: tuple[Tensor, ...]
    squares: Tensor

    @classmethod
    def like(cls, parts: tuple[Tensor, ...], n: int) -> _Totals:
        return cls(tuple(p.new_zeros((n, *p.shape[1:])) for p in parts), parts[0].new_zeros((n, 2)))

    def add(self, parts: tuple[Tensor, ...], picture: Tensor) -> None:
        """Gradients (m, …) of samples that are of these pictures (m,)."""
        for total, part in zip(self.gradients, parts):
            total.index_add_(0, picture, part)
        squares = torch.stack([part.square().flatten(1).sum(1) for part in parts], dim=1)
        self.squares.index_add_(0, picture, squares)

    def norms(self, k: int) -> Tensor:
        """(n, 2 factors, 2 kinds), averaged over k pairs."""
        mean = [(total / k).square().flatten(1).sum(1) for total in self.gradients]
        return torch.stack([torch.stack(mean, dim=1), self.squares / k], dim=2)


def _one_pass(
    query: Query, names: Collection[str], picture: Tensor, pair: Tensor, text: str
) -> Iterator[Slope]:
    denoiser, latents = query.denoiser, query.latents[picture]
    t, eps = query.pairs.t[pair].to(latents.device), query.pairs.eps[pair].to(latents.device)
    with torch.enable_grad(), _listen(denoiser.unet, names) as heard:
        noisy = denoiser.noise(latents, t, eps)
        prediction = denoiser.predict(noisy, t, query.text(text)[picture])
        # A sum, so that half precision does not underflow; made a mean at the end.
        loss = (prediction - denoiser.target(latents, t, eps)).square().sum()
    if not heard:
        return
    outputs = [output for _, output in heard.values()]
    found = torch.autograd.grad(loss, outputs, allow_unused=True)
    denoiser.evaluations += 2 * len(picture)
    for (name, (x, output)), slope in zip(heard.items(), found):
        slope = torch.zeros_like(output) if slope is None else slope
        layer = denoiser.unet.get_submodule(name.removeprefix("unet."))
        yield picture, name, layer, x.float(), slope.float()


@contextmanager
def _listen(unet: nn.Module, names: Collection[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of modules while the UNet runs; the graph begins at the first of them."""
    heard: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def hear(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # no weight trains, so nothing before it has a gradient
                output = output.detach().requires_grad_(True)
            heard[name] = inputs[0].detach(), output
            return output

        return hear

    handles = [
        unet.get_submodule(name.removeprefix("unet.")).register_forward_hook(hook(name))
        for name in names
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
