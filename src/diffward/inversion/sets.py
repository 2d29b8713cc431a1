"""A LoRA's pictures one by one: a set of identity vectors, each near one training picture's, from z.

Whether there is more in the weights than who it is: a set no nearer to the training pictures than to others of the same
subject says nothing of single pictures. Learned on z as it is; the encoder and its other heads stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diffward.inversion.subjects import TRAINING

if TYPE_CHECKING:
    from diffward.inversion.identity import IdentitySpace
    from diffward.inversion.subjects import Subjects
    from diffward.inversion.zoo import Row
    from diffward.models.eyes import Eye

SIZE = 8  # vectors in a set


class SetHead(nn.Module):
    """z (n, latent) and the subject's vector (n, k) to a set (n, S, k): the one vector and what sets each apart."""

    def __init__(self, latent: int, identity: int, size: int = SIZE, hidden: int = 128) -> None:
        super().__init__()
        self.size = size
        self.body = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, size * identity)
        )

    def forward(self, z: Tensor, identity: Tensor) -> Tensor:
        return identity[:, None] + self.body(z).view(len(z), self.size, -1)


def chamfer(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared distance (n,) of each wanted vector to the nearest found one, and of each found one to the nearest wanted.

    Args:
        found: (n, S, k).
        wanted: (n, P, k), NaN in the places of a set that has fewer; at least one vector each.
    """
    there = wanted.isfinite().all(-1)
    distance = (found[:, :, None] - wanted.nan_to_num()[:, None]).square().mean(-1)
    distance = distance.masked_fill(~there[:, None], torch.inf)
    forth = distance.min(1).values.masked_fill(~there, 0).sum(1) / there.sum(1)
    return forth + distance.min(2).values.mean(1)


def picture_vectors(
    subjects: Subjects, rows: Sequence[Row], eye: Eye, space: IdentitySpace, stream: int = TRAINING
) -> Tensor:
    """Identity vectors (n, P, k) of single pictures of the LoRA of each row, NaN where it has fewer.

    Args:
        stream: whose pictures: the training pictures; any other number: as many others of the subject.
    """
    known: dict[tuple[int, int], Tensor] = {}
    for row in rows:
        if (key := (row.lora, row.identity)) not in known:
            pictures = subjects.pictures(
                row.identity, int(row.recipe["pictures"]), [stream, row.lora]
            )
            features = eye.features(np.stack([p.pixels for p in pictures]))
            known[key] = space.each(features)
    return pad_sequence(
        [known[row.lora, row.identity] for row in rows],
        batch_first=True,
        padding_value=torch.nan,
    )
