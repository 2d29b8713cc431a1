"""The step-wise error, judged by a small residual network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import ON, Bank
from diffward.membership.nets import seeded

if TYPE_CHECKING:
    from diffward.membership.crossfit import Decision, Fit, Matrix

EPOCHS, BATCH, RATE, MOMENTUM, DECAY = 15, 16, 1e-3, 0.9, 5e-4
WIDTHS = (8, 16, 32)  # of ResNet-18's stages, an eighth as wide and without the last


@ATTACKS.register(
    "secmi_nn",
    paper="Duan et al. 2023 (arXiv 2302.01316), SecMI_NNs",
    access="grey box, with known members to learn from",
    cost="16 queries",
    asks=(("secmi", ON),),
    needs=("labels",),
    suite="thorough",
)
def secmi_nn(bank: Bank) -> np.ndarray:
    """A small ResNet learns what the step-wise error map |psi(phi(z_t, t), t) - z_t| of a member looks like.

    As in the authors' code: basic blocks, squared error to the label, SGD (0.001, momentum 0.9,
    decay 5e-4), 15 epochs. Not as there: a ResNet for latents, not for 32 x 32 pictures; batches of 16
    and not 128, as there are hundreds of maps and not 10,000; maps in units of the training maps';
    the last epoch and not the best on the judged pictures; cross-fitted, not one split. Of few maps
    it learns the noise by heart: then their plain size (`secmi`) tells more.
    """
    maps = bank.of("secmi")
    return bank.crossfit(maps.reshape(len(maps), -1), resnet(maps.shape[1:]))


def resnet(shape: tuple[int, ...]) -> Fit:
    """Trains on maps of `shape` (C, h, w), each given as one row."""

    def fit(x: Matrix, y: NDArray[np.bool_]) -> Decision:
        mean, spread = x.mean(), x.std() + 1e-12

        def maps_of(rows: Matrix, device: torch.device) -> Tensor:
            scaled = ((rows - mean) / spread).astype(np.float32)
            return torch.from_numpy(scaled).to(device).unflatten(1, shape)

        with seeded() as device:
            net = network(shape[0]).to(device).train()
            maps, label = maps_of(x, device), torch.from_numpy(y).float().to(device)
            optimiser = torch.optim.SGD(
                net.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY
            )
            for _ in range(EPOCHS):
                order = torch.randperm(len(maps), device=device)
                # Even parts: batch normalisation fails on a single map left over.
                for rows in order.tensor_split(max(1, len(order) // BATCH)):
                    optimiser.zero_grad()
                    ((net(maps[rows])[:, 0] - label[rows]) ** 2).mean().backward()
                    optimiser.step()
        net.eval()

        @torch.no_grad()
        def decide(new: Matrix) -> Matrix:
            parts = maps_of(new, device).split(64)
            return torch.cat([net(part)[:, 0] for part in parts]).cpu().double().numpy()

        return decide

    return fit


def network(channels: int) -> nn.Module:
    """(n, C, h, w) to (n, 1)."""
    layers: list[nn.Module] = [*_conv(channels, WIDTHS[0], 1), nn.ReLU()]
    before = WIDTHS[0]
    for index, width in enumerate(WIDTHS):
        layers += [Block(before, width, 1 if index == 0 else 2), Block(width, width, 1)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1))


class Block(nn.Module):
    """The basic residual block (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(*_conv(before, after, stride), nn.ReLU(), *_conv(after, after, 1))
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(before, after, stride, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.path(x) + self.shortcut(x))


def _conv(before: int, after: int, stride: int, size: int = 3) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm2d(after)]
