"""The variational encoder of LoRA weights: tokens of canonical modules and the fine-tuning step to z.

After the network encoder of Yao et al. 2024 (arXiv 2409.08482), with the canonical form in the place of raw factors,
a KL term that is in the loss, and a step that need not be known: its token is left out half the time in training,
and a head predicts it. It starts from what the floor (`Floor`) reads and learns what that misses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffward.inversion.tokens import SPECTRUM, Tokens


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes, and what is left out in comparisons.

    Attributes:
        floor: how many numbers the floor reads; 0: the network sees the tokens alone.
        step_token: whether the fine-tuning step is an input.
    """

    modules: int
    core: int
    floor: int
    latent: int = 96
    width: int = 96
    layers: int = 2
    heads: int = 4
    dropout: float = 0.3
    step_token: bool = True


class Encoder(nn.Module):
    """Tokens, what the floor reads of them, and log steps, to mu and log sigma^2 of z."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = c = config
        self.cores = nn.Parameter(torch.randn(c.modules, c.core, c.width) / math.sqrt(c.core))
        self.facts = nn.Linear(1 + SPECTRUM, c.width)
        self.places = nn.Parameter(0.02 * torch.randn(c.modules, c.width))
        self.absent = nn.Parameter(0.02 * torch.randn(c.width))
        self.start = nn.Parameter(0.02 * torch.randn(2, c.width))  # task token; step unknown
        self.step = nn.Sequential(nn.Linear(32, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.read = nn.Linear(c.floor, c.width) if c.floor else None
        self.straight = nn.Linear(c.floor, c.latent, bias=False) if c.floor else None
        layer = nn.TransformerEncoderLayer(
            c.width, c.heads, 2 * c.width, c.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(
            layer, c.layers, nn.LayerNorm(c.width), enable_nested_tensor=False
        )
        self.mu, self.logvar = nn.Linear(c.width, c.latent), nn.Linear(c.width, c.latent)
        nn.init.zeros_(self.logvar.weight)
        nn.init.constant_(self.logvar.bias, -2.0)
        if self.straight is not None:
            nn.init.zeros_(self.mu.weight)
            nn.init.eye_(self.straight.weight)

    def forward(
        self, tokens: Tokens, floor: Tensor | None = None, log_step: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """mu and log sigma^2 (n, latent).

        Args:
            floor: what the floor reads, standardised, (n, floor).
            log_step: (n,) log of the fine-tuning step, NaN where it is not known; None: of none.
        """
        x = torch.einsum("nmc,mcw->nmw", tokens.cores.float().flatten(2), self.cores)
        facts = self.facts(torch.cat([tokens.norms[..., None], tokens.spectra], -1))
        x = torch.where(tokens.present[..., None], x + facts, self.absent) + self.places
        head = [t.expand(len(x), -1) for t in self.start]
        if log_step is not None and self.config.step_token:
            known = log_step.isfinite()
            head[1] = torch.where(known[:, None], self.step(waves(log_step.nan_to_num())), head[1])
        if self.read is not None:
            head.append(self.read(floor))
        body = self.body(torch.cat([torch.stack(head, 1), x], 1))[:, 0]
        mu = self.mu(body)
        return (mu if self.straight is None else mu + self.straight(floor)), self.logvar(body)


class Heads(nn.Module):
    """What is read from z: identity vector, attributes, number of pictures, steps, whether there is a subject."""

    def __init__(self, latent: int, identity: int, attributes: dict[str, list[str]]) -> None:
        super().__init__()
        self.identity = nn.Linear(latent, identity)
        self.attributes = nn.ModuleDict(
            {name: nn.Linear(latent, len(values)) for name, values in attributes.items()}
        )
        self.counts = nn.Linear(latent, 2)  # log pictures, log steps
        self.subject = nn.Linear(latent, 1)

    def of_attributes(self) -> list[nn.Linear]:
        return [head for head in self.attributes.values() if isinstance(head, nn.Linear)]

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        counts = self.counts(z)
        return {f"attribute {name}": head(z) for name, head in self.attributes.items()} | {
            "identity": self.identity(z),
            "pictures": counts[:, 0],
            "steps": counts[:, 1],
            "subject": self.subject(z)[:, 0],
        }


def kl(mu: Tensor, logvar: Tensor, free: float) -> Tensor:
    """KL of N(mu, sigma^2) from N(0, 1): the mean over the batch, in each dimension at least `free` (Kingma et al. 2016)."""
    each = 0.5 * (mu.square() + logvar.exp() - 1 - logvar)
    return each.mean(0).clamp_min(free).sum()


def contrast(found: Tensor, wanted: Tensor, groups: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE (n,): vectors (n, k) against those of all subjects in the batch; rows of one subject do not compete."""
    close = F.normalize(found, dim=1) @ F.normalize(wanted, dim=1).T / temperature
    place = torch.arange(len(groups), device=groups.device)
    same = (groups[:, None] == groups) & (place[:, None] != place)
    return F.cross_entropy(close.masked_fill(same, -math.inf), place, reduction="none")


def waves(log_step: Tensor) -> Tensor:
    """Sinusoids (n, 32) of the log of the step."""
    frequencies = torch.exp(torch.linspace(math.log(0.3), math.log(20), 16, device=log_step.device))
    angles = log_step[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)
