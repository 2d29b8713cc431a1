"""What shadow LoRAs tell: the gain of each picture with and without it in the training set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diffward.data import near_duplicate_groups
from diffward.errors import InputError
from diffward.membership.bank import OFF, ON, Bank, bank_of_arrays

if TYPE_CHECKING:
    from diffward.data import Pictures

LEAST = 4  # two with and two without each picture: a spread needs that
# A stream of random numbers that no split uses: a half must not be the audited LoRA's members. (The
# last number must not be 0, as numpy takes [7, 0] for [7].)
_STREAM = 0x5AD0


@dataclass(frozen=True)
class Shadows:
    """What S shadow LoRAs do to N pictures; `gain` and `inside` are all that attacks look at.

    Attributes:
        gain: (S, N) base error less the shadow's error, mean over the pairs.
        inside: (S, N) bool, which pictures shadow s was trained on. Shadows 2p and 2p + 1 were trained
            on the two halves of one division.
        errors: (S, N, K) the shadows' errors at each pair.
        base: (N, K) the base's.
    """

    gain: np.ndarray
    inside: np.ndarray
    errors: np.ndarray | None = None
    base: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.gain.shape != self.inside.shape or self.inside.dtype != bool:
            raise ValueError(f"gain {self.gain.shape} and inside {self.inside.shape} do not match")

    def __len__(self) -> int:
        return len(self.gain)

    def at(self, rows: np.ndarray) -> Shadows:
        """Some of the shadows."""
        errors = None if self.errors is None else self.errors[rows]
        return Shadows(self.gain[rows], self.inside[rows], errors, self.base)

    def side(self, inside: bool) -> Side:
        """Of the shadows that saw each picture, or of those that did not."""
        chosen = self.inside if inside else ~self.inside
        count = chosen.sum(axis=0)
        if count.min() < 2:
            raise InputError(
                "each picture must be in the halves of two shadow LoRAs and outside of two: train more"
            )
        mean = np.where(chosen, self.gain, 0.0).sum(axis=0) / count
        return Side(mean, (np.where(chosen, self.gain - mean, 0.0) ** 2).sum(axis=0), count)


@dataclass(frozen=True)
class Side:
    """Gains of each picture under the shadows of one side: mean, sum of squared deviations, count; (N,)."""

    mean: np.ndarray
    squares: np.ndarray
    count: np.ndarray


def halves(
    pictures: Pictures, count: int, seed: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """Random halves of the pictures and their complements, bool (count, N).

    Near-duplicates stay on one side; each picture is in exactly half of the sets. The order of the
    pictures, which tells members from non-members, has no say; more halves leave the first ones as
    they are.

    Args:
        groups: (N,) near-duplicates share a number; they are looked for by default.
    """
    if count < LEAST or count % 2:
        raise InputError(
            f"--shadows {count}: give an even number from {LEAST} on (halves come in pairs)"
        )
    hashes = pictures.hashes
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    if groups is None:
        together = [[order[i] for i in g] for g in near_duplicate_groups(pictures.at(order))]
    else:
        named: dict[int, list[int]] = {}
        for row in order:
            named.setdefault(int(groups[row]), []).append(row)
        together = list(named.values())
    if len(together) < 2:
        raise InputError("the pictures are all near-duplicates: they cannot be divided in halves")
    inside = np.zeros((count, len(hashes)), dtype=bool)
    for pair in range(count // 2):
        size = 0
        for number in np.random.default_rng([seed, pair, _STREAM]).permutation(len(together)):
            group = together[number]
            if size + len(group) / 2 <= len(hashes) / 2:
                inside[2 * pair, group] = True
                size += len(group)
        inside[2 * pair + 1] = ~inside[2 * pair]
    return inside


def leave_one_out(shadows: Shadows, s: int) -> tuple[np.ndarray, np.ndarray, Shadows]:
    """Shadow `s` as the target: its gain (N,), its members bool (N,), and its shadows.

    The shadow of the other half is left out too. Otherwise its members would have one shadow less that
    saw them than one that did not, non-members the other way round, and the counts would give away
    the answer.
    """
    partner = s ^ 1
    rest = np.arange(len(shadows)) != s
    if partner < len(shadows) and (shadows.inside[partner] == ~shadows.inside[s]).all():
        rest[partner] = False
    return shadows.gain[s], shadows.inside[s], shadows.at(rest)


def role_swapped(shadows: Shadows, groups: np.ndarray | None = None) -> Iterator[Bank]:
    """Each shadow in turn as the target, with what is then known of it, for measuring attacks.

    Of shadows without stored errors only the gain is known: attacks on anything else mean nothing.
    """
    for s in range(len(shadows)):
        gain, is_member, rest = leave_one_out(shadows, s)
        if shadows.errors is None or shadows.base is None:
            answers = {("errors", ON): -gain[:, None], ("errors", OFF): np.zeros((len(gain), 1))}
        else:
            answers = {("errors", ON): shadows.errors[s], ("errors", OFF): shadows.base}
        yield bank_of_arrays(answers, is_member, shadows=rest, groups=groups)
