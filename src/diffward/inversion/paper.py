"""The paper's encoder, for comparison: a private convolutional network for each raw factor, then a text model's body.

As in the public code of Yao et al. 2024 (arXiv 2409.08482) and as they describe it: each matrix with its rank as
channels, blocks of instance norm and convolutions along the features, one token a matrix, a task token and a step
token, a transformer without positions, and the first tokens kept. What is ours: loss and heads, ranks padded to 16,
and starts that are not subtracted. Instance norm makes it blind to the size of the factors, and it depends on how they
were factored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffward.inversion.encoder import waves

if TYPE_CHECKING:
    from diffward.inversion.zoo import Row, Zoo

RANK, KEPT, BLOCKS = 16, 77, 4


class PaperEncoder(nn.Module):
    """Raw factors to mu and log sigma^2 of z. Matrices of one length share a pass, not weights."""

    def __init__(
        self, lengths: Sequence[int], latent: int, width: int = 128, layers: int = 3, heads: int = 4
    ) -> None:
        super().__init__()
        self.lengths = list(lengths)
        self.places = {
            n: [i for i, m in enumerate(lengths) if m == n] for n in sorted(set(lengths))
        }
        self.nets = nn.ModuleDict(
            {str(n): _Nets(len(own), n, width) for n, own in self.places.items()}
        )
        self.task = nn.Parameter(0.02 * torch.randn(2, width))
        self.step = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.mu, self.logvar = nn.Linear(width, latent), nn.Linear(width, latent)

    def forward(
        self, factors: dict[int, Tensor], log_step: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """factors: by length, (n, matrices, 16, length), as `raw_factors` gives them."""
        count = len(next(iter(factors.values())))
        tokens: list[Tensor] = [torch.empty(0)] * len(self.lengths)
        for length, own in self.places.items():
            for place, token in zip(
                own, self.nets[str(length)](factors[length]).unbind(1), strict=True
            ):
                tokens[place] = token
        task, step = (t.expand(count, -1) for t in self.task)
        if log_step is not None:
            step = torch.where(
                log_step.isfinite()[:, None], self.step(waves(log_step.nan_to_num())), step
            )
        body = self.body(self.norm(torch.stack([task, step, *tokens], 1)))[:, :KEPT].mean(1)
        return self.mu(body), self.logvar(body)


class _Nets(nn.Module):
    """One private network a matrix, side by side as groups of one convolution."""

    def __init__(self, count: int, length: int, width: int) -> None:
        super().__init__()
        self.count = count
        channels = count * RANK
        layers: list[nn.Module] = []
        for block in range(BLOCKS):
            out = count if block == BLOCKS - 1 else channels
            for into in (channels, out):
                layers += [
                    nn.LeakyReLU(), nn.InstanceNorm1d(channels), nn.Conv1d(channels, into, 3, padding=1, groups=count)
                ]  # fmt: skip
        self.body = nn.Sequential(*layers, nn.Tanh())
        self.out = nn.Parameter(torch.randn(count, length, width) / length**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(n, matrices, 16, length) to (n, matrices, width)."""
        return torch.einsum("nml,mlw->nmw", self.body(x.float().flatten(1, 2)), self.out)


def raw_factors(zoo: Zoo, rows: Sequence[Row]) -> dict[int, Tensor]:
    """By length the raw factors A and B^T of some saves, (n, matrices, 16, length) in half precision, ranks padded."""
    parts: dict[int, dict[int, list[Tensor]]] = {}
    for numbers, tensors in zoo.shards(rows):
        for name in zoo.head.modules:
            for one in (tensors[f"{name}.down"].flatten(2), tensors[f"{name}.up"].flatten(2).mT):
                padded = F.pad(one[:, :RANK], (0, 0, 0, max(0, RANK - one.shape[1]))).half()
                for number, matrix in zip(numbers, padded, strict=True):
                    parts.setdefault(one.shape[-1], {}).setdefault(number, []).append(matrix)
    return {
        length: torch.stack([torch.stack(found[i]) for i in range(len(rows))])
        for length, found in parts.items()
    }


def factor_lengths(zoo: Zoo) -> list[int]:
    """Lengths of A and B of each module in turn."""
    return [
        size
        for out, *inside in zoo.head.modules.values()
        for size in (int(torch.Size(inside).numel()), out)
    ]
