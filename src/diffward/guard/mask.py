"""The freeze mask as an artefact: which tensors of which base stay as they are, and how that was found.

A mask says nothing of the pictures: domains are described by the words of whoever made it and by numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffward.errors import InputError
from diffward.files import write_json
from diffward.models.parameters import tensor_hash

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

SCHEMA = "diffward.mask/1"


@dataclass(frozen=True)
class Entry:
    """One tensor: its shape, whether it stays frozen, its score (higher = rather frozen), hashes of its values."""

    shape: tuple[int, ...]
    frozen: bool
    score: float
    hashes: Mapping[str, str]

    @property
    def numel(self) -> int:
        size = 1
        for side in self.shape:
            size *= side
        return size


@dataclass
class FreezeMask:
    """A mask over the UNet's parameters, by name as diffusers has them.

    Attributes:
        tensors: every parameter of the UNet, frozen or not.
        facts: how it was found: method, budget, seed, domains in words, settings; nothing of the data.
    """

    tensors: dict[str, Entry]
    facts: dict[str, Any] = field(default_factory=dict)

    # --- reading it ------------------------------------------------------------------------------

    @property
    def frozen(self) -> list[str]:
        """Names of the frozen tensors."""
        return [name for name, entry in self.tensors.items() if entry.frozen]

    @property
    def scores(self) -> Tensor:
        return torch.tensor([e.score for e in self.tensors.values()], dtype=torch.float64)

    @property
    def tensor_share(self) -> float:
        return len(self.frozen) / len(self.tensors)

    @property
    def parameter_share(self) -> float:
        total = sum(entry.numel for entry in self.tensors.values())
        return sum(self.tensors[name].numel for name in self.frozen) / total

    def told(self) -> str:
        return (
            f"{len(self.frozen)} of {len(self.tensors)} tensors frozen ({self.tensor_share:.1%}), "
            f"{self.parameter_share:.1%} of the parameters"
        )

    # --- making it -------------------------------------------------------------------------------

    @classmethod
    def of(
        cls, weights: Mapping[str, Tensor], frozen: Sequence[bool] | Tensor, scores: Sequence[float] | Tensor,
        facts: dict[str, Any],
    ) -> FreezeMask:  # fmt: skip
        """A mask of the base whose UNet has these weights."""
        chosen, ranked = (
            torch.as_tensor(frozen).tolist(),
            torch.as_tensor(scores, dtype=torch.float64).tolist(),
        )
        return cls(
            {
                name: Entry(tuple(tensor.shape), bool(one), float(score), hashes_of(tensor))
                for (name, tensor), one, score in zip(weights.items(), chosen, ranked, strict=True)
            },
            facts,
        )

    @classmethod
    def of_positions(cls, path: str | Path, denoiser: Denoiser) -> FreezeMask:
        """The public FreezeAsGuard code's mask: one number a line, in the order of the UNet's parameters.

        Raises:
            InputError: not such a file, or not as many lines as the base has tensors.
        """
        try:
            values = [float(line) for line in Path(path).read_text().split()]
        except (ValueError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: not a mask of one number a line ({' '.join(str(error).split())[:80]})"
            ) from error
        weights = dict(denoiser.unet.named_parameters())
        if len(values) != len(weights):
            raise InputError(
                f"{path}: {len(values)} lines, but base {denoiser.name} has {len(weights)} tensors; it is for "
                "another model"
            )
        if any(not 0 <= value <= 1 for value in values):
            raise InputError(f"{path}: values of a mask lie between 0 (trains) and 1 (frozen)")
        scores = torch.tensor(values)
        return cls.of(weights, scores > 0.5, scores, {
            "method": "imported", "base": denoiser.public_name, "source": "positional text file",
        })  # fmt: skip

    # --- the file --------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(path, {
            "schema": SCHEMA,
            **self.facts,
            "tensor_share": self.tensor_share,
            "parameter_share": self.parameter_share,
            "tensors": {
                name: {"shape": list(e.shape), "frozen": e.frozen, "score": e.score, "sha256": dict(e.hashes)}
                for name, e in self.tensors.items()
            },
        })  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> FreezeMask:
        """Read a mask.

        Raises:
            InputError: no such file, or not a mask.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such mask") from None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: not a mask of diffward (JSON); guard apply --mask FILE --out mask.json turns a positional text file into one"
            ) from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise InputError(f"{path}: not a mask of diffward (schema {SCHEMA})")
        try:
            tensors = {
                str(name): Entry(
                    tuple(int(side) for side in row["shape"]), _bool(row["frozen"]), _finite(row["score"]),
                    {str(k): str(v) for k, v in row["sha256"].items()},
                )
                for name, row in data.pop("tensors").items()
            }  # fmt: skip
            _check_facts(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: a damaged mask ({type(error).__name__}: {error})") from error
        if not any(entry.frozen for entry in tensors.values()):
            raise InputError(f"{path}: a mask that freezes nothing")
        skipped = ("schema", "tensor_share", "parameter_share")
        return cls(tensors, {key: value for key, value in data.items() if key not in skipped})

    # --- is it for this model? -------------------------------------------------------------------

    def check_names(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Raises `InputError` unless these are the tensors that the mask was made for."""
        for name, entry in self.tensors.items():
            if name not in shapes:
                raise InputError(f"{where}: has no tensor {name}; the mask is for another model")
            if tuple(shapes[name]) != entry.shape:
                raise InputError(
                    f"{where}: {name} is {_by(shapes[name])}, {_by(entry.shape)} in the mask; it is for another model"
                )
        if more := [name for name in shapes if name not in self.tensors]:
            raise InputError(
                f"{where}: {len(more)} tensors are not in the mask ({more[0]} …); it is for another model"
            )

    def check_base(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Raises `InputError` unless these are the values, perhaps rounded, of the mask's base."""
        self.check_names({name: tuple(tensor.shape) for name, tensor in weights.items()}, where)
        for name in self.tensors:
            if not self.is_base(name, weights[name]):
                raise InputError(
                    f"{where}: {name} has other values than the base that the mask was made for"
                )

    def is_base(self, name: str, tensor: Tensor) -> bool:
        """Whether `tensor` has the base's values, exactly or rounded to half precision."""
        return tensor_hash(tensor) in self.tensors[name].hashes.values()

    def modules(self, names: Sequence[str]) -> Iterator[str]:
        """Those of some modules of the UNet whose weight is frozen."""
        for name in names:
            if self.tensors[f"{name}.weight"].frozen:
                yield name


def hashes_of(tensor: Tensor) -> dict[str, str]:
    """Hashes of a tensor's values as fp32, and of those values rounded to half precision."""
    exact = tensor.detach().float()
    return {
        "fp32": tensor_hash(exact),
        "fp16": tensor_hash(exact.half()),
        "bf16": tensor_hash(exact.bfloat16()),
    }


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Raises KeyError, TypeError, ValueError or AttributeError where what pages tell of a mask is not as written."""
    if "budget" in facts:
        _finite(facts["budget"]["share"]), str(facts["budget"]["by"])
    for domain in facts.get("domains", {}).values():
        str(domain["name"]), int(domain["pictures"])


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value} is not a finite number")
    return number


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"frozen must be true or false, not {value!r}")
    return value
