"""What looks at drawn pictures: networks that turn them into features, and who is recognised in features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from diffward.errors import InputError

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

NEAREST = 3  # pictures of a gallery that a drawn one is compared with: the most similar ones
ATTRIBUTES, TRANSFORMERS = "attributes", "transformers:"
_BATCH = 32
_TOKENIZERS = "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model"


class Eye(Protocol):
    """A network behind one verb; figures of different eyes do not compare, so its name goes with them."""

    name: str

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3) to (n, d)."""
        ...


def open_eye(name: str, device: str = "cpu") -> Eye:
    """`attributes` (the embedded world's attribute network) or `transformers:FOLDER_OR_HUB_ID`.

    Raises:
        InputError: there is no such eye, or it cannot be loaded.
    """
    if name == ATTRIBUTES:
        return Attributes()
    if name.startswith(TRANSFORMERS) and name != TRANSFORMERS:
        return Transformer(name.removeprefix(TRANSFORMERS), device)
    raise InputError(
        f"--eye {name}: choose {ATTRIBUTES}, or {TRANSFORMERS}FOLDER (or a hub id) of an image model"
    )


@runtime_checkable
class Reads(Protocol):
    """An eye that also tells how well pictures keep to their captions."""

    def reads(self, captions: Sequence[str]) -> bool:
        """Whether it can tell for all of these."""
        ...

    def agreement(self, pixels: np.ndarray, captions: list[str]) -> np.ndarray:
        """uint8 (n, H, W, 3) and n captions to (n,) in [0, 1]."""
        ...


def agreement_of(
    eye: Eye, captions: Sequence[str]
) -> Callable[[np.ndarray, list[str]], np.ndarray] | None:
    """What tells how well a picture keeps to its caption; None where the eye cannot for these captions."""
    return eye.agreement if isinstance(eye, Reads) and eye.reads(captions) else None


class Attributes:
    """The attribute network of the embedded base's world, (n, 192). Of captions it knows that world's words."""

    name = ATTRIBUTES
    side = 64

    def __init__(self) -> None:
        from diffward.models.mini.reader import load_reader

        self._reader = load_reader()

    def features(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.shape[1:] != (self.side, self.side, 3):
            raise InputError(
                f"--eye {self.name}: sees pictures of {self.side} x {self.side} pixels, these have "
                f"{pixels.shape[2]} x {pixels.shape[1]}; give {TRANSFORMERS}FOLDER"
            )
        return np.asarray(self._reader.features(np.ascontiguousarray(pixels)))

    def reads(self, captions: Sequence[str]) -> bool:
        from diffward.models.mini.attributes import named_in

        said = [named_in(caption) for caption in captions]
        # Some must say more than what kind of picture it is.
        return all(said) and any(len(one) > 1 for one in said)

    def agreement(self, pixels: np.ndarray, captions: list[str]) -> np.ndarray:
        """Which part of what the caption says the picture shows."""
        from diffward.models.mini.attributes import named_in
        from diffward.models.mini.reader import attribute_agreement

        return attribute_agreement(self._reader, pixels, [named_in(one) for one in captions])


class Latents:
    """A base's own autoencoder: latents averaged over a grid of 4 x 4, (n, 16 C). No network besides is needed."""

    name = "latents"

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser

    def features(self, pixels: np.ndarray) -> np.ndarray:
        import torch

        latents = self._denoiser.encode(pixels)
        return torch.nn.functional.adaptive_avg_pool2d(latents, 4).flatten(1).cpu().numpy()


class Transformer:
    """Any image model of transformers: image features of a two-tower model, else the pooled output.

    A model without a pooled output gives the mean of its last hidden state over places. A two-tower model with its
    tokenizer reads captions.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModel

        self.name = f"{TRANSFORMERS}{Path(model).name if Path(model).exists() else model}"
        self.device = torch.device(device)
        try:
            # torchvision is no dependency, and its resizing differs from PIL's.
            self._processor = AutoImageProcessor.from_pretrained(model, backend="pil")
            self._model = AutoModel.from_pretrained(model, dtype=torch.float32).to(device).eval()
            # A model of words, or a processor of another size, shows here and not after hours of training.
            self.features(np.zeros((1, 64, 64, 3), dtype=np.uint8))
            self._tokenizer = _tokenizer(model, self._model)
            self._try_captions()
        except Exception as error:
            told = " ".join(str(error).split())[:120]
            raise InputError(
                f"--eye {TRANSFORMERS}{model}: cannot be used ({told}); give the folder of an image model of "
                "transformers with its preprocessor, or a hub id and a network"
            ) from error

    def features(self, pixels: np.ndarray) -> np.ndarray:
        import torch
        from PIL import Image

        parts = []
        with torch.inference_mode():
            for start in range(0, len(pixels), _BATCH):
                some = [Image.fromarray(one) for one in pixels[start : start + _BATCH]]
                inputs = self._processor(images=some, return_tensors="pt").to(self.device)
                parts.append(_pooled(self._answer(inputs.pixel_values)).float().cpu().numpy())
        return np.concatenate(parts)

    def _try_captions(self) -> None:
        """A tokenizer that is another model's shows here; then captions are not read."""
        try:
            if self._tokenizer is not None:
                self.agreement(np.zeros((1, 64, 64, 3), dtype=np.uint8), ["a picture"])
        except Exception:
            self._tokenizer = None

    def reads(self, captions: Sequence[str]) -> bool:
        return self._tokenizer is not None

    def agreement(self, pixels: np.ndarray, captions: list[str]) -> np.ndarray:
        """Cosine of picture and caption, 0 where it is negative (Hessel et al. 2021, without their factor)."""
        import torch

        distinct, parts = list(dict.fromkeys(captions)), []
        with torch.inference_mode():
            for start in range(0, len(distinct), _BATCH):
                # To full length: some (SigLIP) were trained so, and to the others it is all one.
                tokens = self._tokenizer(
                    distinct[start : start + _BATCH], padding="max_length", truncation=True, return_tensors="pt",
                    max_length=self._model.config.text_config.max_position_embeddings,
                ).to(self.device)  # fmt: skip
                given = {k: tokens[k] for k in ("input_ids", "attention_mask") if k in tokens}
                answer = self._model.get_text_features(**given)
                parts.append(_pooled(answer).float().cpu().numpy())
        texts = dict(zip(distinct, _unit(np.concatenate(parts)), strict=True))
        cosine = np.sum(
            _unit(self.features(pixels)) * np.stack([texts[c] for c in captions]), axis=1
        )
        return np.clip(cosine, 0.0, 1.0)

    def _answer(self, inputs: Any) -> Any:
        if hasattr(self._model, "get_image_features"):
            return self._model.get_image_features(pixel_values=inputs)
        return self._model(pixel_values=inputs)


def _tokenizer(model: str, loaded: Any) -> Any:
    """Of a two-tower model, where it comes with one; else None."""
    from transformers import AutoTokenizer

    if not hasattr(loaded, "get_text_features"):
        return None
    folder = Path(model)
    if folder.exists() and not any((folder / name).exists() for name in _TOKENIZERS):
        return None  # transformers would make up an empty one
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception:  # whatever a missing or foreign tokenizer makes of it
        return None


def _pooled(answer: Any) -> Any:
    """(n, d) of what a model answers."""
    if (pooled := getattr(answer, "pooler_output", None)) is not None:
        return pooled.flatten(1)
    hidden = getattr(answer, "last_hidden_state", answer)
    if hidden.ndim == 4:
        return hidden.mean(dim=(2, 3))
    return hidden.mean(dim=1) if hidden.ndim == 3 else hidden


def gallery_match(
    drawn: np.ndarray, subject: str, galleries: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Whether each drawn picture looks more like `subject` than like anybody else.

    The nearest gallery is the one with the largest mean cosine similarity of its `NEAREST` most similar
    pictures, all features less the mean of the galleries' means. One of k galleries is always nearest: a
    picture of nobody matches 1 in k times, so galleries of others belong to it.

    Args:
        drawn: features (n, d).
        galleries: features (m, d) of real pictures by name; at least two, `subject` among them.

    Returns:
        bool (n,).

    Raises:
        InputError: fewer than two galleries, none of the subject, or an empty one.
    """
    if subject not in galleries:
        raise InputError(f"no gallery of {subject}; known: {', '.join(galleries) or 'none'}")
    if len(galleries) < 2:
        raise InputError(
            f"only one gallery, {subject}: anything looks most like it; give galleries of others too"
        )
    if empty := [name for name, own in galleries.items() if not len(own)]:
        raise InputError(f"gallery {empty[0]}: no picture in it")
    known = {name: np.asarray(own, dtype=np.float64) for name, own in galleries.items()}
    centre = np.mean([own.mean(axis=0) for own in known.values()], axis=0)
    towards = _unit(np.asarray(drawn, dtype=np.float64) - centre)
    closeness = []
    for own in known.values():
        similar = np.sort(towards @ _unit(own - centre).T, axis=1)
        closeness.append(similar[:, -NEAREST:].mean(axis=1))
    return np.argmax(closeness, axis=0) == list(known).index(subject)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
