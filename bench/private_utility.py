"""What a LoRA of `private-lora` is good for: its error on held-out pictures, and the pictures it draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench._squeezenet import FILE, SqueezeNet
from bench.private_cases import Material, data_root, named_attributes
from diffward.files import atomic_path, write_json

if TYPE_CHECKING:
    from diffward.finetune.method import Method
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features

PAIRS = 16  # fixed (t, eps) draws a picture


def measure_utility(
    denoiser: Denoiser, material: Material, validation: Features, seed: int, file: Path, digest: str
) -> None:
    """Measure the denoiser as it is; write `file` and, beside it, the features of what it drew.

    Errors under fixed pairs, and one picture drawn for the caption of each judged non-member.

    Args:
        validation: the gauge's pictures that do not train.
        digest: of the weights that this is about.
    """
    from diffward.models.features import encode_pictures
    from diffward.models.sampling import sample

    sides = material.sides
    told: dict[str, Any] = {"weights": digest}
    for name, features in (
        ("heldout", encode_pictures(denoiser, sides.non_members)),
        ("member", encode_pictures(denoiser, sides.members)),
        ("validation", validation),
    ):
        told[name] = losses(denoiser, features).tolist()
    captions = sides.non_members.captions
    drawn = sample(denoiser, captions, seed=seed)
    told |= likeness(material, drawn, captions)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file.with_name("drawn.npz")) as temporary:
        np.savez_compressed(temporary, features=eye(material)(drawn))
    write_json(file, told)


def read_utility(file: Path) -> dict[str, Any]:
    """What `measure_utility` wrote, with `features` (n, d) of the drawn pictures."""
    with np.load(file.with_name("drawn.npz")) as arrays:
        return {**json.loads(file.read_text(encoding="utf-8")), "features": arrays["features"]}


def losses(denoiser: Denoiser, features: Features) -> np.ndarray:
    """Mean squared error (n,) of each picture over fixed (t, eps) pairs."""
    import torch

    from diffward.models.pairs import Pairs

    errors = Pairs.draw(denoiser, PAIRS).errors(denoiser, features, torch.arange(len(features)))
    return errors.mean(dim=1).double().numpy()


def likeness(material: Material, drawn: np.ndarray, captions: list[str]) -> dict[str, float | None]:
    """How far pictures (n, H, W, 3) show whom and what their captions name; None of photographs."""
    from diffward.models.mini.reader import attribute_agreement, load_reader

    if not material.people:
        return {"identity_match": None, "caption_agreement": None}
    reader, match = load_reader(), np.zeros(len(drawn), dtype=bool)
    shown = [material.shown(caption) for caption in captions]
    for person in material.people.values():
        rows = [i for i, one in enumerate(shown) if one == person]
        match[rows] = reader.matches(drawn[rows], person)
    wanted = [named_attributes(caption) for caption in captions]
    told = [i for i, one in enumerate(wanted) if one]
    agreement = attribute_agreement(reader, drawn[told], [wanted[i] for i in told])
    return {"identity_match": float(match.mean()), "caption_agreement": float(agreement.mean())}


def eye(material: Material) -> Callable[[np.ndarray], np.ndarray]:
    """Whose features KID compares: pictures (n, H, W, 3) to (n, d)."""
    from diffward.models.mini.reader import load_reader

    return load_reader().features if material.people else SqueezeNet(data_root() / FILE).features


class Pressure:
    """Listens to the objective of mp and smp: with which weight does the attacker's gradient really count?

    smp: L / (1 + lambda CE) has the gradient of L - w CE, but for a common factor, with
    w = lambda L / (1 + lambda CE); mp: w = lambda.
    """

    def __init__(self, method: Method) -> None:
        self.method, self.seen = method, []
        self.name = type(method).__name__.lower()
        inner = getattr(method, "objective", None)
        if self.name in ("mp", "smp") and inner is not None:

            def objective(loss: Any, ce: Any) -> Any:
                value, against = loss.detach(), ce.detach()
                weight = method.weight / (1 + method.weight * against) * value
                self.seen.append(float(weight.mean()))
                return inner(loss, ce)

            method.objective = objective  # type: ignore[attr-defined]

    @property
    def effective(self) -> float | None:
        if not self.seen:
            return None
        return float(self.method.weight if self.name == "mp" else np.mean(self.seen))  # type: ignore[attr-defined]
