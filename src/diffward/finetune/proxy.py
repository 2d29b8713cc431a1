"""Proxy attackers: networks that tell members from others by the model's errors, for a training to resist.

Their weights are a membership oracle: they live in the trainer's checkpoint, never in the model file.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from diffward.finetune.sampler import seed_of

# Groups of channels, rows, columns that an error map is pooled to, whatever its size.
CELLS = (4, 4, 4)
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
FLOOR = 1e-3  # added to errors before the logarithm: far below what a latent's error is
LEAST_SPREAD = 0.02  # of a feature, in log units: below, differences are not blown up
TIME = 32  # sines and cosines of t


class ProxyAttacker(nn.Module):
    """Judges error maps of any size, given t, against what the base answers to the same (t, eps).

    A few dozen pictures teach it, so it must not remember them. The map itself enters as summary figures
    only; cell by cell the attacker sees the log-ratio to the base, where the picture cancels. Few cells, few
    units, spectral norm (Miyato et al. 2018) and dropout: an attacker without is sure of what it learns
    from and wrong about the other members, where the pressure is to act.

    Attributes:
        width: how many features F there are; the first `scaled` are standardised by their running `mean`
            and `var`, the waves of t are not.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        cells, figures = math.prod(CELLS), 4 + len(QUANTILES)
        self.scaled = figures + (cells + figures) + (1 + len(QUANTILES))
        self.width = self.scaled + TIME
        self.mean: Tensor
        self.var: Tensor
        self.count: Tensor
        self.register_buffer("mean", torch.zeros(self.scaled))
        self.register_buffer("var", torch.ones(self.scaled))
        self.register_buffer("count", torch.zeros(()))
        with drawing(seed, 0, 1):
            last = nn.Linear(64, 1)
            nn.init.zeros_(last.weight)  # at chance, and no pressure, until it has learnt something
            nn.init.zeros_(last.bias)
            self.layers = nn.Sequential(
                spectral_norm(nn.Linear(self.width, 128)), nn.SiLU(), nn.Dropout(0.5),
                spectral_norm(nn.Linear(128, 64)), nn.SiLU(), nn.Dropout(0.5), last,
            )  # fmt: skip

    def forward(self, errors: Tensor, base: Tensor, t: Tensor) -> Tensor:
        """Squared errors (B, C, h, w) of the adapted model and of the base, t (B,): logits (B,), members > 0."""
        return self.judge(self.features(errors, base, t))

    def features(self, errors: Tensor, base: Tensor, t: Tensor) -> Tensor:
        """What is judged of the maps: (B, F), float32, with gradient to `errors`."""
        with torch.autocast(errors.device.type, enabled=False):
            (cells, figures), (cells0, figures0) = _summary(errors.float()), _summary(base.float())
            ratio = cells - cells0
            parts = [
                figures,
                ratio,
                figures - figures0,
                _spread(ratio),
                _quantiles(ratio),
                _waves(t),
            ]
            return torch.cat(parts, dim=1)

    def judge(self, features: Tensor) -> Tensor:
        """Logits (B,) of features (B, F)."""
        with torch.autocast(features.device.type, enabled=False):
            scale = self.var.clamp_min(LEAST_SPREAD**2).sqrt()
            x = (features[:, : self.scaled] - self.mean) / scale
            return self.layers(torch.cat([x, features[:, self.scaled :]], dim=1)).squeeze(1)

    @torch.no_grad()
    def observe(self, features: Tensor) -> None:
        """Let the running mean and variance take note of features (B, F)."""
        for x in features[:, : self.scaled]:
            self.count += 1
            rate = torch.clamp(1 / self.count, min=0.005)
            step = rate * (x - self.mean)
            # West's update; the variance starts at none, not at one.
            self.var.mul_((self.count > 1) * (1 - rate)).add_(step * (x - self.mean - step))
            self.mean.add_(step)


class PaperAttacker(nn.Module):
    """The network of Luo et al. (2025): the flattened error map of one size through 512-256-2, t not given."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        with drawing(seed, 0, 1):
            self.layers = nn.Sequential(
                nn.Linear(size, 512), nn.ReLU(), nn.Dropout(0.5),
                nn.Linear(512, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 2),
            )  # fmt: skip

    def forward(self, errors: Tensor) -> Tensor:
        """Squared errors (B, C, h, w) to logits (B, 2): others, members."""
        with torch.autocast(errors.device.type, enabled=False):
            return self.layers(errors.float().flatten(1))


@contextlib.contextmanager
def drawing(seed: int, step: int, stream: int) -> Iterator[None]:
    """Within the block torch's own draws (first weights, dropout) come from (seed, step, stream) alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, step, (1 << 25) + stream, 0))
        yield


def _summary(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Of maps (B, C, h, w), in logarithms: the cells (B, K), and level, spread, coarse and fine
    variance, quantiles (B, 4 + Q)."""
    pooled = nn.functional.adaptive_avg_pool3d(errors[:, None], CELLS).flatten(1)
    flat = errors.flatten(1)
    logs = (flat + FLOOR).log()
    level = (flat.mean(1, keepdim=True) + FLOOR).log()
    coarse = pooled.var(1, correction=0, keepdim=True)
    fine = (flat.var(1, correction=0, keepdim=True) - coarse).clamp_min(0)
    frequencies = [(part + FLOOR**2).log() / 2 for part in (coarse, fine)]
    return (pooled + FLOOR).log(), torch.cat(
        [level, _spread(logs), *frequencies, _quantiles(logs)], 1
    )


def _spread(values: Tensor) -> Tensor:
    """Standard deviation (B, 1) over each row; smooth where it is none."""
    return (values.var(1, correction=0, keepdim=True) + FLOOR**2).sqrt()


def _quantiles(values: Tensor) -> Tensor:
    return torch.quantile(values, values.new_tensor(QUANTILES), dim=1).T


def _waves(t: Tensor) -> Tensor:
    """Sinusoidal embedding (B, TIME) of t (Vaswani et al. 2017)."""
    rates = torch.exp(-math.log(10_000) * torch.arange(TIME // 2, device=t.device) / (TIME // 2))
    angles = t.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
