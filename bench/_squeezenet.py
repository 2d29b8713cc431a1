"""Features of photographs for KID: SqueezeNet, trained on ImageNet, from the test data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

FILE = "features/squeezenet_v1.0.safetensors"
NAME = "SqueezeNet v1.0 (ImageNet), last fire module, mean over places, d = 512"
_SIDE = 227
_MEAN = (104.0, 117.0, 123.0)  # of blue, green, red
_POOLED = ("fire4", "fire8")


class SqueezeNet:
    """SqueezeNet v1.0 (Iandola et al. 2016, arXiv 1602.07360) without its classifier.

    Conventions of the file: channels blue, green, red; 227 pixels; pooling with partly filled windows.
    """

    def __init__(self, path: Path) -> None:
        self.weights = load_file(path)

    @torch.inference_mode()
    def features(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3) to float32 (n, 512)."""
        parts = [self.maps(pixels[i : i + 32]).mean(dim=(2, 3)) for i in range(0, len(pixels), 32)]
        return torch.cat(parts).numpy()

    @torch.inference_mode()
    def maps(self, pixels: np.ndarray) -> Tensor:
        """uint8 (n, H, W, 3) to what the last fire module says, (n, 512, 13, 13)."""
        x = torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1])).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, (_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False)
        x = x - torch.tensor(_MEAN).view(1, 3, 1, 1)
        x = _pool(self._layer("conv1", x, stride=2))
        for number in range(2, 10):
            name = f"fire{number}"
            x = self._layer(f"{name}.conv1x1_1", x)
            wide = self._layer(f"{name}.conv3x3_2", x, padding=1)
            x = torch.cat([self._layer(f"{name}.conv1x1_2", x), wide], dim=1)
            if name in _POOLED:
                x = _pool(x)
        return x

    def _layer(self, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride, padding).relu()


def _pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2, ceil_mode=True)
