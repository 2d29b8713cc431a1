"""The LoRA file: what it is, what it says, how it is read, written and cleaned.

Importing this costs nothing: names are looked up when first used, and torch only when weights are
read for use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffward.lora.canonical import Canonical as Canonical
    from diffward.lora.canonical import canonical_factors as canonical_factors
    from diffward.lora.canonical import canonical_module as canonical_module
    from diffward.lora.convert import convert_lora as convert_lora
    from diffward.lora.family import family_of_width as family_of_width
    from diffward.lora.file import LoraFile as LoraFile
    from diffward.lora.file import open_lora as open_lora
    from diffward.lora.inspection import Inspection as Inspection
    from diffward.lora.inspection import inspect_lora as inspect_lora
    from diffward.lora.leaks import Leak as Leak
    from diffward.lora.leaks import header_leaks as header_leaks
    from diffward.lora.module import LoraModule as LoraModule
    from diffward.lora.scrub import ScrubResult as ScrubResult
    from diffward.lora.scrub import scrub_lora as scrub_lora
    from diffward.lora.weights import LoraWeights as LoraWeights
    from diffward.lora.write import write_lora as write_lora

_HOME = {
    "Canonical": "canonical",
    "canonical_factors": "canonical",
    "canonical_module": "canonical",
    "convert_lora": "convert",
    "family_of_width": "family",
    "LoraFile": "file",
    "open_lora": "file",
    "Inspection": "inspection",
    "inspect_lora": "inspection",
    "Leak": "leaks",
    "header_leaks": "leaks",
    "LoraModule": "module",
    "ScrubResult": "scrub",
    "scrub_lora": "scrub",
    "LoraWeights": "weights",
    "write_lora": "write",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"diffward.lora.{_HOME[name]}"), name)
