"""What a LoRA file gives away by itself: no base model, no GPU, no torch for a safetensors file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from diffward.lora.file import Entry, LoraFile, open_lora
from diffward.lora.leaks import Leak, file_leaks
from diffward.lora.spectrum import cost, effective_rank, singular_values

# Weights read, and operations spent, on norms and spectra unless `full` is asked for: they keep any
# file under a second and the memory small.
BUDGET_BYTES = 64 << 20
BUDGET_FLOPS = 10e9
MODULE_BYTES = 16 << 20
# Files larger than this are hashed only on `full`, for the same reason.
HASH_BYTES = 256 << 20


@dataclass(frozen=True)
class ModuleReport:
    """One module. `norm` (Frobenius, scale included) and `effective_rank` are None if unmeasured."""

    name: str
    kind: str
    rank: int
    alpha: float | None
    shape: list[int]
    dtype: str
    parameters: int
    dead: bool
    norm: float | None = None
    effective_rank: float | None = None


@dataclass
class Inspection:
    """What `inspect_lora` found; `to_dict()` gives it as JSON.

    `rank` and `alpha` are one number, or the sorted list of all, or None. `dead_modules` have a
    factor that is zero everywhere: they change nothing. `measured_modules` says for how many the
    norm and the effective rank were computed; all modules are counted and checked for being dead.
    """

    path: str
    bytes: int
    sha256: str | None
    format: str
    kind: str
    base_family: str
    family_conflict: str | None
    rank: int | list[int] | None
    alpha: float | list[float] | None
    modules: int
    parameters: int
    dtypes: dict[str, int]
    components: dict[str, int]
    dead_modules: list[str]
    measured_modules: int
    norms: dict[str, float] | None
    effective_rank: dict[str, float] | None
    leaks: list[Leak]
    extras: dict[str, list[int]]
    per_module: list[ModuleReport] = field(repr=False, default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        result = dict(self.__dict__)
        result["leaks"] = [leak.to_dict() for leak in self.leaks]
        result["per_module"] = [dict(module.__dict__) for module in self.per_module]
        return result


def inspect_lora(path: str | Path, full: bool = False) -> Inspection:
    """Inspect a LoRA file or folder.

    Reads headers, the first page of every tensor, and as much of the weights as the budget above
    allows, evenly over the modules (`full`: all of them, and the hash of large files). Raises `InputError` where the
    file cannot be read, or where a tensor that was read holds NaN or infinity.
    """
    file = open_lora(path)
    measured = set(file.entries) if full else set(_affordable(file))
    # The matrices are small: more threads than one cost more than they give, and many times more
    # where the cores are busy with something else.
    with threadpool_limits(limits=1):
        modules = [_report(entry, name in measured) for name, entry in file.entries.items()]
    for source, key in file.extras.values():
        source.array(key)
    small = file.bytes <= HASH_BYTES
    return Inspection(
        path=str(path),
        bytes=file.bytes,
        sha256=file.sha256 if full or small else None,
        format=file.format,
        kind=file.kind,
        base_family=file.base_family,
        family_conflict=file.family_conflict,
        rank=_one([module.rank for module in modules]),
        alpha=_one([module.alpha for module in modules if module.alpha is not None]),
        modules=len(modules),
        parameters=sum(module.parameters for module in modules),
        dtypes=dict(Counter(module.dtype for module in modules)),
        components=dict(Counter(module.name.replace(":", ".").split(".")[0] for module in modules)),
        dead_modules=[module.name for module in modules if module.dead],
        measured_modules=sum(module.norm is not None for module in modules),
        norms=_summary([m.norm for m in modules if m.norm is not None], total=True),
        effective_rank=_summary(
            [m.effective_rank for m in modules if m.effective_rank is not None]
        ),
        leaks=file_leaks(file),
        extras={name: list(source.shapes[key]) for name, (source, key) in file.extras.items()},
        per_module=modules,
    )


def _bytes(entry: Entry) -> int:
    return sum(entry.source.nbytes(key) for key in entry.factors.values())


def _affordable(file: LoraFile) -> Iterator[str]:
    """Names of modules to measure: all if the budget allows, else evenly over the file.

    By a count of bytes and operations and not by the clock, so that the same file always gives the
    same report.
    """
    costs = {}
    for name, entry in file.entries.items():
        shapes = {role: entry.source.shapes[key] for role, key in _products(entry).items()}
        size = _bytes(entry)
        if size <= MODULE_BYTES:
            costs[name] = max(size / BUDGET_BYTES, cost(shapes) / BUDGET_FLOPS)
    share = min(1.0, 1 / sum(costs.values())) if costs else 1.0
    credit = 0.0
    for name, price in costs.items():
        credit += share * price
        if credit >= price * (1 - 1e-9):
            credit -= price
            yield name


def _products(entry: Entry) -> dict[str, str]:
    """The factors whose product is the change: magnitudes left out."""
    return {k: key for k, key in entry.factors.items() if k not in ("magnitude", "dora_scale")}


def _report(entry: Entry, measure: bool) -> ModuleReport:
    factors = _products(entry)
    alpha = entry.alpha()
    dead = any(entry.source.is_zero(key) for key in factors.values())
    norm = spectrum = None
    if measure:
        arrays = {role: entry.source.array(key) for role, key in factors.items()}
        values = singular_values(arrays)
        if values is not None:
            scale = entry.scale_override()
            if scale is None:
                scale = 1.0 if alpha is None else alpha / entry.rank
            norm = float(np.sqrt((values**2).sum()) * abs(scale))
            spectrum = effective_rank(values)
    return ModuleReport(
        entry.name,
        entry.kind,
        entry.rank,
        alpha,
        list(entry.shape),
        entry.dtype,
        entry.parameters,
        # A magnitude of its own still changes the weight.
        dead and entry.kind != "dora",
        norm,
        spectrum,
    )


def _one(values: list[Any]) -> Any:
    distinct = sorted(set(values))
    return None if not distinct else distinct[0] if len(distinct) == 1 else distinct


def _summary(values: list[float], total: bool = False) -> dict[str, float] | None:
    if not values:
        return None
    array = np.array(values)
    summary = {
        "min": float(array.min()),
        "median": float(np.median(array)),
        "mean": float(array.mean()),
        "max": float(array.max()),
    }
    if total:
        summary["total"] = float(np.sqrt((array**2).sum()))
    return summary
