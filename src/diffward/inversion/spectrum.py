"""How many pictures a LoRA was trained on, from singular values alone.

After DSiRe (Salama et al. 2024, arXiv 2406.19395): in each module the nearest LoRA of known size by its spectrum,
and a vote over the modules. The paper's LoRAs share one recipe; where rank, rate and length vary, these move the
spectrum far more than the number of pictures does and it reads nothing, so `Constant` stands beside it in the bench.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffward.errors import InputError
from diffward.inversion.tokens import Tokens

VOTES = ("mode", "median")
# Below this share of the norm a singular value counts as absent, so that a smaller rank is a finite distance away.
_ABSENT = 1e-3


@dataclass(frozen=True)
class Spectral:
    """Log singular values (n, M, 8) of LoRAs of known size, which of the modules are there (n, M), and sizes (n,)."""

    spectra: Tensor
    present: Tensor
    counts: Tensor

    @classmethod
    def fit(cls, tokens: Tokens, counts: Tensor | Sequence[float]) -> Spectral:
        """Keep LoRAs of known size to compare with.

        Args:
            counts: pictures of each LoRA, (n,).

        Raises:
            InputError: none is given, the numbers do not match, or a size is less than one.
        """
        sizes = torch.as_tensor(counts).float()
        if not len(tokens) or sizes.shape != (len(tokens),):
            raise InputError(
                f"{len(tokens)} LoRAs with {sizes.numel()} sizes: give at least one, and a size for each"
            )
        if not (sizes >= 1).all():
            raise InputError("a LoRA of less than one picture: sizes must be at least 1")
        return cls(log_spectra(tokens), tokens.present, sizes)

    def votes(self, tokens: Tokens) -> Tensor:
        """What each module says, (n, M): the size of the LoRA with the nearest spectrum there; NaN where it says nothing.

        Raises:
            InputError: these tokens are of other modules.
        """
        if tokens.norms.shape[1] != self.spectra.shape[1]:
            raise InputError(
                f"LoRAs of {tokens.norms.shape[1]} modules, the known ones have {self.spectra.shape[1]}"
            )
        found = []
        for one, there, known, has in zip(
            log_spectra(tokens).unbind(1), tokens.present.unbind(1), self.spectra.unbind(1), self.present.unbind(1)
        ):  # fmt: skip
            distance = torch.cdist(one, known).masked_fill(~has, torch.inf)
            near = self.counts[distance.argmin(1)]
            found.append(near.masked_fill(~(there & has.any()), torch.nan))
        return torch.stack(found, 1)

    def predict(self, tokens: Tokens, vote: str = "mode") -> Tensor:
        """Pictures of each LoRA, (n,).

        Args:
            vote: "mode", the size that most modules name (the paper's; of several the one nearest the median), or
                "median", which loses less where the size is far from a class.

        Raises:
            InputError: there is no such vote, the tokens are of other modules, or a LoRA changes no module that
                any known one does.
        """
        if vote not in VOTES:
            raise InputError(f"vote {vote!r}: choose {' or '.join(VOTES)}")
        votes = self.votes(tokens)
        if (silent := votes.isnan().all(1)).any():
            raise InputError(f"{int(silent.sum())} LoRAs change no module that can be compared")
        median = votes.nanmedian(1).values
        return median if vote == "median" else _modes(votes, median)


@dataclass(frozen=True)
class Constant:
    """Says the same of every LoRA: the median size, which no other constant beats in absolute error."""

    value: float

    @classmethod
    def fit(cls, counts: Tensor | Sequence[float]) -> Constant:
        """Raises InputError where there is no size."""
        sizes = torch.as_tensor(counts).float()
        if not sizes.numel():
            raise InputError("no LoRA to take a size from")
        return cls(float(sizes.quantile(0.5)))

    def predict(self, tokens: Tokens) -> Tensor:
        """(n,)"""
        return torch.full((len(tokens),), self.value)


def log_spectra(tokens: Tokens) -> Tensor:
    """Log of the leading singular values, (n, M, 8); of absent ones the log of a small share of the norm."""
    return tokens.norms.float()[..., None] + tokens.spectra.float().clamp_min(_ABSENT).log()


def _modes(votes: Tensor, median: Tensor) -> Tensor:
    """The most frequent value of each row (n, M), NaN aside; of several the one nearest the row's median."""
    classes = votes[votes.isfinite()].unique()
    times = (votes[:, :, None] == classes).sum(1).float()
    away = (classes - median[:, None]).abs()
    # Less than one vote, so that it decides between equals only.
    return classes[(times - away / (1 + away.max())).argmax(1)]
