"""What an inverter learns from and is judged on: tokens of a zoo's rows, and what is true of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffward.inversion.identity import subject_features
from diffward.inversion.tokens import Basis, Tokens

if TYPE_CHECKING:
    from diffward.inversion.identity import IdentitySpace
    from diffward.inversion.subjects import Subjects
    from diffward.inversion.zoo import Row, Zoo
    from diffward.models.eyes import Eye

GALLERY = 1000
# Streams of pictures of a subject: [1, LoRA] are a LoRA's own, these are other pictures of the same subject.
OTHER_PICTURES = (2,)
STRANGERS = 10**6  # from this number on, subjects of an endless source that no zoo has


@dataclass(frozen=True)
class Data:
    """n saves: rows, tokens, identity vectors (n, k), labels (n, attributes), log pictures, log steps, subject there (n,).

    Of rows without a subject the identity is NaN and labels are -1.
    """

    rows: list[Row]
    tokens: Tokens
    identity: Tensor
    labels: Tensor
    log_pictures: Tensor
    log_steps: Tensor
    subject: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def groups(self) -> list[int]:
        return [
            row.identity if there else -1 - row.identity
            for row, there in zip(self.rows, self.subject.tolist())
        ]

    def of(self, numbers: Sequence[int]) -> Data:
        index = torch.tensor(list(numbers), dtype=torch.long)
        fields = {k: v[index] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(
            self, rows=[self.rows[i] for i in numbers], tokens=self.tokens.of(index), **fields
        )

    def last(self, subject: bool | None = True) -> Data:
        """The last save of each LoRA that has a subject, that has none, or (None) of every one."""
        best: dict[tuple[int, int, int], int] = {}
        for i, (row, there) in enumerate(zip(self.rows, self.subject.tolist(), strict=True)):
            # Several zoos number their LoRAs alike; their seeds differ.
            key = (row.lora, row.recipe["seed"], row.identity)
            wanted = subject is None or bool(there) == subject
            if wanted and (key not in best or row.step > self.rows[best[key]].step):
                best[key] = i
        return self.of(sorted(best.values()))

    def join(self, other: Data) -> Data:
        fields = {
            k: torch.cat([v, getattr(other, k)])
            for k, v in vars(self).items()
            if isinstance(v, Tensor)
        }
        return replace(
            self,
            rows=self.rows + other.rows,
            tokens=Tokens.cat([self.tokens, other.tokens]),
            **fields,
        )


def gather(
    zoo: Zoo,
    rows: Sequence[Row],
    basis: Basis,
    vectors: dict[int, Tensor] | None,
    size: int,
    attributes: int,
) -> Data:
    """The data of some rows.

    Args:
        vectors: identity vector of each subject; None: these LoRAs have no subject.
        size: dimensions of identity vectors.
        attributes: how many attributes subjects have.
    """
    rows = list(rows)
    nothing = torch.full((size,), math.nan)
    return Data(
        rows, basis.of_zoo(zoo, rows),
        torch.stack([nothing if vectors is None else vectors[row.identity] for row in rows]),
        torch.tensor([row.label if vectors is not None else (-1,) * attributes for row in rows], dtype=torch.long)
        .view(len(rows), attributes),
        torch.tensor([math.log(row.recipe["pictures"]) for row in rows]),
        torch.tensor([math.log(row.step) for row in rows]),
        torch.full((len(rows),), float(vectors is not None)),
    )  # fmt: skip


def identity_vectors(
    subjects: Subjects, numbers: Sequence[int], eye: Eye, space: IdentitySpace
) -> dict[int, Tensor]:
    """Of each subject, from pictures that no LoRA was trained on."""
    distinct = sorted(set(numbers))
    features = subject_features(subjects, distinct, eye, OTHER_PICTURES)
    return {number: space.of(one) for number, one in zip(distinct, features, strict=True)}


def gallery_numbers(subjects: Subjects, zoo: Zoo, most: int = GALLERY) -> list[int]:
    """Strangers to compare with: such as no LoRA of the zoo has, or where subjects are few, those not held out."""
    if len(subjects) >= STRANGERS + most:
        return list(range(STRANGERS, STRANGERS + most))
    return sorted({row.identity for row in zoo.of_split("train", "valid")})[:most]
