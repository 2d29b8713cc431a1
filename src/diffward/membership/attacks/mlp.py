"""The attack by which the SMP-LoRA paper judges itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import ON, Bank
from diffward.membership.crossfit import crossfit
from diffward.membership.nets import seeded

if TYPE_CHECKING:
    from diffward.membership.crossfit import Decision, Fit, Matrix

HIDDEN, DROPOUT, EPOCHS, RATE, DECAY = (512, 256), 0.5, 100, 1e-5, 1e-4


@ATTACKS.register(
    "mlp",
    paper="Luo et al. 2025 (arXiv 2402.11989), the attacker h'",
    access="grey box, with known members to learn from",
    cost="8 queries",
    asks=(("maps", ON),),
    needs=("labels",),
    suite="thorough",
)
def mlp(bank: Bank) -> np.ndarray:
    """A three-layer perceptron learns what a member's squared error map at a random time looks like.

    For comparison with the SMP-LoRA paper's tables, so as weak as there. As in the paper and its
    code: the map flattened and as it is, at one random (t, eps) a picture and epoch, t not told; layers
    512, 256, 2 with ReLU and dropout 0.5; cross-entropy, Adam, rate 1e-5, decay 1e-4; 100 epochs;
    batches of one member and one other (the paper's gain G); trained on half of the pictures.

    Not as there: epochs go in turn through 8 draws a picture, instead of 100 fresh ones; the score is
    P(member) averaged over the 8 draws of a held-out picture, a stronger attack than the one draw there;
    each half attacks the other, so that all pictures are judged; and the last epoch counts: there
    it is the epoch that is best on the judged pictures.
    """
    maps = torch.from_numpy(bank.of("maps").astype(np.float32)).flatten(2)
    # Maps of full-sized latents take gigabytes: cross-fitting is given their numbers instead.
    numbers = np.arange(len(maps), dtype=float)[:, None]
    return crossfit(
        numbers, bank.is_member, perceptron(maps), groups=bank.groups, seed=bank.seed,
        folds=2, repeats=1,
    )  # fmt: skip


def perceptron(maps: Tensor) -> Fit:
    """Trains on rows of `maps` (N, draws, D), given by number, as many members as others."""

    def fit(x: Matrix, y: NDArray[np.bool_]) -> Decision:
        rows = torch.from_numpy(x[:, 0]).long()
        member, other = rows[y], rows[~y]
        pairs = min(len(member), len(other))
        with seeded() as device:
            net = network(maps.shape[2]).to(device).train()
            optimiser = torch.optim.Adam(net.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
            label = torch.tensor([1, 0], device=device)
            for epoch in range(EPOCHS):
                draw = maps[:, epoch % maps.shape[1]]
                a, b = (part[torch.randperm(len(part))[:pairs]] for part in (member, other))
                for pair in torch.stack([a, b], dim=1):
                    optimiser.zero_grad()
                    nn.functional.cross_entropy(net(draw[pair].to(device)), label).backward()
                    optimiser.step()
        net.eval()

        @torch.no_grad()
        def decide(new: Matrix) -> Matrix:
            parts = torch.from_numpy(new[:, 0]).long().split(16)
            chance = [net(maps[part].to(device)).softmax(-1)[..., 1].mean(1) for part in parts]
            return torch.cat(chance).cpu().double().numpy()

        return decide

    return fit


def network(size: int) -> nn.Module:
    """(…, D) to logits (…, 2): not a member, a member."""
    layers: list[nn.Module] = []
    for width in HIDDEN:
        layers += [nn.Linear(size, width), nn.ReLU(), nn.Dropout(DROPOUT)]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, 2))
