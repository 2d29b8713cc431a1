"""The attribute network: reads from a picture of the world what it shows. For measuring only."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffward.errors import InputError
from diffward.files import atomic_path
from diffward.models.mini import READER, world
from diffward.models.mini.attributes import ATTRIBUTES, DOMAINS, Person
from diffward.models.mini.autoencoder import to_tensor
from diffward.stage import cosine, run_stage, set_rate

# A picture shows a person when at most this many of the eight identity attributes differ. Two people
# drawn at random agree that far in 26 of 62,208 cases (0.04 %). Set before any LoRA was looked at.
ALLOWED_DIFFERENCES = 1


class Reader(nn.Module):
    """A small convolutional network with one head for each attribute of the world."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, into, stride in (
            (3, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1),
        ):  # fmt: skip
            layers += [nn.Conv2d(channels, into, 3, stride, 1), nn.GroupNorm(8, into), nn.SiLU()]
        self.body = nn.Sequential(
            *layers,
            nn.Conv2d(128, 24, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(24 * 64, 192),
            nn.SiLU(),
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(192, len(values)) for name, values in ATTRIBUTES.items()}
        )

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels: (n, 3, 64, 64) in [-1, 1]. Returns the logits (n, values) of each attribute."""
        features = self.body(pixels)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.inference_mode()
    def read(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 (n, 64, 64, 3) to the value index (n,) of each attribute.

        Only the attributes of a picture's domain mean anything.
        """
        parts = [self(to_tensor(pixels[i : i + 128])) for i in range(0, len(pixels), 128)]
        return {name: torch.cat([p[name] for p in parts]).argmax(1).numpy() for name in ATTRIBUTES}

    @torch.inference_mode()
    def features(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, 64, 64, 3) to float32 (n, 192), what all heads read: features for FID and KID."""
        parts = [self.body(to_tensor(pixels[i : i + 128])) for i in range(0, len(pixels), 128)]
        return torch.cat(parts).numpy()

    def hits(self, pixels: np.ndarray, wanted: list[dict[str, int]]) -> list[dict[str, bool]]:
        """Whether each of n pictures shows each value that is wanted of it: {attribute: index}."""
        if len(pixels) != len(wanted):
            raise InputError(f"{len(pixels)} pictures, but wishes for {len(wanted)}")
        seen = self.read(pixels)
        return [
            {name: bool(seen[name][i] == value) for name, value in row.items()}
            for i, row in enumerate(wanted)
        ]

    def matches(self, pixels: np.ndarray, person: Person) -> np.ndarray:
        """Whether each picture (n,) is a portrait that shows `person`."""
        seen = self.read(pixels)
        differs = sum(
            (seen[name] != value).astype(int) for name, value in person.attributes().items()
        )
        return (seen["domain"] == list(DOMAINS).index("portrait")) & (
            differs <= ALLOWED_DIFFERENCES
        )


@lru_cache(maxsize=1)
def load_reader(path: Path = READER) -> Reader:
    reader = Reader()
    reader.load_state_dict(load_file(path))
    return reader.eval()


def attribute_agreement(
    reader: Reader, pixels: np.ndarray, wanted: list[dict[str, int]]
) -> np.ndarray:
    """Share (n,) of the wanted attributes that each picture shows right: how well captions are kept.

    Raises:
        InputError: nothing is wanted of a picture, or `wanted` is not one for each.
    """
    hits = reader.hits(pixels, wanted)
    if empty := [i for i, row in enumerate(hits) if not row]:
        raise InputError(f"picture {empty[0]}: no attribute is wanted of it ({len(empty)} such)")
    return np.array([np.mean(list(row.values())) for row in hits])


def save_reader(reader: Reader, path: Path) -> None:
    with atomic_path(path) as temporary:
        save_file({k: v.contiguous() for k, v in reader.state_dict().items()}, temporary)


def train_reader(
    vae: Any, work: Path, seed: int, *, steps: int, batch: int = 64, pictures: int = 24000
) -> Reader:
    """Train, or resume. Two in five pictures pass through the autoencoder, as generated ones do."""
    torch.manual_seed(seed)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=1e-2, foreach=True)
    drawings = [world.sample([seed, 6, i]) for i in range(pictures)]
    x = to_tensor(np.stack([d.pixels for d in drawings]))
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for start in range(0, pictures * 2 // 5, 100):
            z = vae.encode(x[start : start + 100]).latent_dist.mean
            z = z + 0.1 * z.std() * torch.randn(z.shape, generator=generator)
            x[start : start + 100] = vae.decode(z).sample.clamp(-1, 1)
    labels = labels_of(drawings)

    def step(number: int) -> dict[str, float]:
        set_rate(optimizer, 2e-3 * cosine(number, steps))
        g = torch.Generator().manual_seed(seed * 1_000_003 + number)
        index = torch.randint(pictures, (batch,), generator=g)
        # Slight noise, shift and brightness, so that generated pictures are no surprise.
        seen = x[index] + 0.06 * torch.rand(batch, 1, 1, 1, generator=g) * torch.randn(
            x[index].shape, generator=g
        )
        seen = seen * (1 + 0.1 * (torch.rand(batch, 1, 1, 1, generator=g) - 0.5))
        dy, dx = (int(v) for v in torch.randint(-2, 3, (2,), generator=g))
        seen = F.pad(seen, (2, 2, 2, 2), mode="replicate")[:, :, 2 + dy : 66 + dy, 2 + dx : 66 + dx]
        losses = [
            F.cross_entropy(o, labels[name][index], ignore_index=-1)
            for name, o in reader(seen).items()
        ]
        loss = torch.stack([v for v in losses if v.isfinite()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()}

    run_stage("reader", steps, step, {"model": reader, "optimizer": optimizer}, work / "reader.pt")
    return reader.eval()


def labels_of(drawings: list[world.Drawing]) -> dict[str, Tensor]:
    """Value index (n,) of each attribute, -1 where the picture's domain does not have it."""
    domains = list(DOMAINS)
    rows = [{"domain": domains.index(d.domain), **d.attributes} for d in drawings]
    return {name: torch.tensor([row.get(name, -1) for row in rows]) for name in ATTRIBUTES}
