"""Sets of vectors against brute force, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from diffward.inversion.identity import IdentitySpace
from diffward.inversion.sets import SetHead, chamfer, picture_vectors
from diffward.inversion.subjects import TRAINING, Portrait


def test_chamfer_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    found = rng.normal(size=(3, 4, 5))
    sizes = [1, 3, 6]
    wanted = np.full((3, 6, 5), np.nan)
    expected = []
    for i, size in enumerate(sizes):
        own = wanted[i, :size] = rng.normal(size=(size, 5))
        each = [[float(((f - w) ** 2).mean()) for w in own] for f in found[i]]
        forth = np.mean([min(column) for column in zip(*each, strict=True)])
        expected.append(forth + np.mean([min(row) for row in each]))
    told = chamfer(torch.tensor(found), torch.tensor(wanted))
    assert told.tolist() == pytest.approx(expected)


def test_chamfer_does_not_mind_the_order_and_has_a_gradient_without_nan() -> None:
    g = torch.Generator().manual_seed(0)
    found = torch.randn(2, 3, 4, generator=g, requires_grad=True)
    wanted = torch.randn(2, 5, 4, generator=g)
    wanted[0, 2:] = torch.nan
    loss = chamfer(found, wanted)
    assert torch.allclose(loss, chamfer(found.flip(1), wanted[:, [1, 0, 3, 4, 2]]))
    loss.sum().backward()
    assert torch.isfinite(found.grad).all() and (found.grad != 0).any()
    assert float(chamfer(wanted[1:, :3], wanted[1:, :3]).detach()) == 0


def test_a_head_learns_two_kinds_of_pictures() -> None:
    """Sets of two far points, which one vector cannot be near to."""
    torch.manual_seed(0)
    z = torch.randn(64, 3)
    centre = torch.zeros(64, 2)
    wanted = torch.stack([z[:, :2] + 3, z[:, :2] - 3], 1)
    head = SetHead(3, 2, size=4, hidden=32)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        chamfer(head(z, centre), wanted).mean().backward()
        optimizer.step()
    alone = chamfer(wanted.mean(1, keepdim=True), wanted).mean()
    assert float(chamfer(head(z, centre), wanted).mean().detach()) < 0.05 * float(alone)


@dataclass
class Row:
    lora: int
    identity: int
    recipe: dict[str, Any]


class Few:
    """Pictures of one colour that says which they are; a subject has three at most."""

    def pictures(self, number: int, count: int, seed: Any) -> list[Portrait]:
        stream, lora = seed
        return [
            Portrait(np.full((2, 2, 3), 100 * stream + 10 * lora + i, np.uint8), "")
            for i in range(min(count, 3))
        ]


class Colour:
    name = "colour"

    def features(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(len(pixels), -1)[:, :1].astype(np.float32)


def test_vectors_are_of_the_pictures_that_trained() -> None:
    space = IdentitySpace(torch.tensor([1.0]), torch.tensor([[2.0]]))
    rows: Any = [Row(3, 7, {"pictures": 2}), Row(4, 7, {"pictures": 9}), Row(3, 7, {"pictures": 2})]
    found = picture_vectors(Few(), rows, Colour(), space)  # type: ignore[arg-type]
    start = 100 * TRAINING
    wanted = [[start + 30, start + 31, np.nan], [start + 40, start + 41, start + 42]]
    wanted = [[2 * (v - 1) for v in row] for row in (*wanted, wanted[0])]
    np.testing.assert_allclose(found[..., 0].numpy(), wanted)
    others = picture_vectors(Few(), rows[:1], Colour(), space, stream=2)  # type: ignore[arg-type]
    assert others[0, 0, 0] == 2 * (200 + 30 - 1)
