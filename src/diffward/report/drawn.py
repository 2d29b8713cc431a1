"""Pictures drawn from weights beside the owner's own, with what must not look like them: for the page, blurred there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from diffward.report.images import small, thumbnail

if TYPE_CHECKING:
    from torch import Tensor

    from diffward.data import Pictures
    from diffward.inversion.inverter import Inverter
    from diffward.inversion.tokens import Tokens
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser
    from diffward.models.eyes import Eye

SHOWN = 4  # pictures of each way of drawing
CLASS_PROMPTS = {"world": "a portrait of a person"}  # by the subjects that an inverter learned from


class Pair(TypedDict):
    """A drawn picture beside the owner's nearest; small data URIs, shown in the page only, blurred until clicked."""

    drawn: str
    nearest: str
    file: str
    closeness: float


class Drawn(TypedDict):
    """Pictures drawn one way; `control` where the subject can only be in them by chance, or by the model's own habit."""

    title: str
    control: bool
    pairs: list[Pair]


def draw_from_weights(
    model: tuple[Inverter, Denoiser, LoraWeights], tokens: Tokens, eye: Eye,
    real: tuple[np.ndarray, np.ndarray, Pictures], class_prompt: str, seed: int, denoise: bool = True,
) -> list[Drawn]:  # fmt: skip
    """Each way of drawing beside the owner's nearest pictures; controls hold nothing of the file, or not its order.

    Args:
        real: the owner's pictures (n, H, W, 3), their features by `eye`, and where they lie.
        class_prompt: what any picture of the kind would be called; empty: not known.
        denoise: whether the base and the fine-tuned model draw: some 40 passes of the denoiser a picture.
    """
    from diffward.inversion.decoders import DECODERS, conditioned, prompts
    from diffward.inversion.findings import nearest

    inverter, denoiser, weights = model
    pixels, features, pictures = real
    z = inverter.read(tokens).mu.expand(SHOWN, -1)
    mixed = inverter.read(tokens.of([0] * SHOWN).shuffled(seed)).mu
    others = inverter.others_z[:SHOWN]
    seeds = [seed * 1_000_003 + i for i in range(SHOWN)]
    denoiser.attach(weights)

    def from_z(name: str, key: Tensor, count: int = SHOWN) -> np.ndarray:
        return DECODERS[name].obj(inverter, denoiser, key[:count], seeds[: len(key[:count])])

    def from_text(text: str, bare: bool = False) -> np.ndarray:
        with denoiser.bare() if bare else contextlib.nullcontext():
            conditioning = denoiser.condition([text]).expand(SHOWN, -1, -1)
            return conditioned(denoiser, conditioning, prompts(inverter, denoiser, z)[1], seeds)

    Way = tuple[str, bool, Callable[[], np.ndarray]]
    mean: Way = ("The mean picture, without any model that draws", False, lambda: from_z("latent", z, 1))  # fmt: skip
    ways: list[Way] = [
        ("From the weights, by the untouched base model", False, lambda: from_z("base", z)), mean,
        ("From the weights, by the fine-tuned model", False, lambda: from_z("victim", z)),
        ("Without reading them: the fine-tuned model, empty prompt", False, lambda: from_text("")),
        ("Control: the same weights shuffled, by the untouched base model", True, lambda: from_z("base", mixed)),
        ("Control: the same weights shuffled, by the fine-tuned model", True, lambda: from_z("victim", mixed)),
    ]  # fmt: skip
    if len(others):
        ways += [
            ("Control: another LoRA's weights, by the untouched base model", True, lambda: from_z("base", others)),
            ("Control: another LoRA's weights, by the fine-tuned model", True, lambda: from_z("victim", others)),
        ]  # fmt: skip
    if class_prompt:
        called = f"“{class_prompt}”"
        ways.insert(4, (f"Without reading them: the fine-tuned model, {called}", False, lambda: from_text(class_prompt)))  # fmt: skip
        ways.append((f"Control: the untouched base model, {called}", True, lambda: from_text(class_prompt, bare=True)))  # fmt: skip
    if not denoise:
        ways = [mean]
    try:
        drawn = [(title, control, draw()) for title, control, draw in ways]
    finally:
        denoiser.detach()
    found: list[Drawn] = []
    for title, control, made in drawn:
        rows, close = nearest(inverter, eye.features(made), features)
        pairs: list[Pair] = [
            {
                "drawn": thumbnail(small(picture)), "nearest": thumbnail(small(pixels[row])),
                "file": pictures[int(row)].name or pictures[int(row)].path.name, "closeness": float(value),
            }
            for picture, row, value in zip(made, rows, close, strict=True)
        ]  # fmt: skip
        found.append({"title": title, "control": control, "pairs": pairs})
    return found


def drawn_words(drawn: Sequence[Drawn]) -> str:
    """How near each way of drawing comes to the owner's pictures."""
    told = [
        f"{group['title'][0].lower()}{group['title'][1:]} {np.mean([pair['closeness'] for pair in group['pairs']]):.2f}"
        for group in drawn
    ]
    return f"How near drawn pictures are to yours (cosine; 1 the same subject, 0 a stranger): {'; '.join(told)}."
