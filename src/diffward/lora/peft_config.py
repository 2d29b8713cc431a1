"""The PEFT configuration that makes PEFT build the very modules a LoRA has."""

from __future__ import annotations

from collections import Counter
from typing import Any

from diffward.errors import InputError
from diffward.lora.module import LoraModule

_COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "revision": None,
    "task_type": None,
}


def component_config(modules: dict[str, LoraModule], source: str = "") -> dict[str, Any]:
    """`adapter_config.json` for the modules {path inside the component: module} of one component.

    Raises `InputError` where one configuration cannot describe them all.
    """
    families = {_family(module) for module in modules.values()}
    if len(families) > 1:
        raise InputError(
            f"{source or 'this LoRA'}: mixes {' and '.join(sorted(families))} in one model, "
            "which PEFT cannot express; use kohya"
        )
    family = families.pop()
    if family == "LOHA":
        return _loha(modules)
    if family == "LOKR":
        return _lokr(modules, source)
    config = {
        **_COMMON,
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_dora": family == "DORA",
    }
    return config | _ranks(modules, "lora_alpha")


def compact(config: dict[str, Any]) -> dict[str, Any]:
    """The entries that diffusers hands to `LoraConfig`: everything but what has its default."""
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora")
    return {key: config[key] for key in keys}


def _family(module: LoraModule) -> str:
    if "down" in module.tensors:
        return "DORA" if module.kind == "dora" else "LORA"
    return "LOHA" if "hada_w1_a" in module.tensors else "LOKR"


def _integral(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _pattern(name: str, names: list[str]) -> str:
    """PEFT matches a pattern to the end of a path; anchor it where another module ends the same."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def _ranks(
    modules: dict[str, LoraModule], alpha_key: str, ranks: dict[str, int] | None = None
) -> dict[str, Any]:
    """Rank and alpha: the commonest as default, the others by pattern."""
    ranks = ranks or {name: module.rank for name, module in modules.items()}
    alphas = {name: _integral(module.scale * ranks[name]) for name, module in modules.items()}
    # alpha / rank * rank may be off by a bit; the stored alpha is exact.
    for name, module in modules.items():
        if ranks[name] == module.rank:
            alphas[name] = _integral(module.effective_alpha)
    # Sorted, so that the order in which a file lists its modules leaves no trace.
    rank, alpha = _commonest(list(ranks.values())), _commonest(list(alphas.values()))
    names = list(modules)
    return {
        "r": rank,
        alpha_key: alpha,
        "rank_pattern": {_pattern(n, names): r for n, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {_pattern(n, names): a for n, a in sorted(alphas.items()) if a != alpha},
        "target_modules": sorted(names),
    }


def _commonest(values: list[Any]) -> Any:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _loha(modules: dict[str, LoraModule]) -> dict[str, Any]:
    config = {
        **_COMMON,
        "peft_type": "LOHA",
        "init_weights": True,
        "module_dropout": 0.0,
        "rank_dropout": 0.0,
        "use_effective_conv2d": any("hada_t1" in module.tensors for module in modules.values()),
    }
    return config | _ranks(modules, "alpha")


def factorization(size: int, factor: int) -> tuple[int, int]:
    """How LyCORIS and PEFT split a dimension for LoKr: (smaller, larger), nearest to a square, the
    smaller at most `factor` (-1: any); a factor that divides is taken as it is."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small, large = 1, size
    for candidate in range(2, int(size**0.5) + 1):
        if size % candidate == 0 and candidate <= limit:
            small, large = candidate, size // candidate
    return small, large


def _lokr(modules: dict[str, LoraModule], source: str) -> dict[str, Any]:
    """PEFT rebuilds LoKr's shapes from one factor; find the one that gives those of the file."""
    dims = {name: _lokr_dims(module) for name, module in modules.items()}
    ranks = {}
    for name, module in modules.items():
        full = "lokr_w2" in module.tensors and "lokr_w1" in module.tensors
        ranks[name] = max(dims[name][0][1], dims[name][1][1]) if full else module.rank
    both = any("lokr_w1_a" in module.tensors for module in modules.values())
    for factor in [-1, *sorted({size for d in dims.values() for size in (d[0][0], d[1][0])})]:
        if all(
            factorization(o * p, factor) == (o, p) and factorization(i * j, factor) == (i, j)
            for (o, p), (i, j) in dims.values()
        ):
            break
    else:
        raise InputError(
            f"{source or 'this LoRA'}: PEFT cannot rebuild this LoKr's factors; use kohya"
        )
    for name, module in modules.items():
        (o, p), (i, j) = dims[name]
        split_w1 = both and ranks[name] < max(o, i) / 2
        split_w2 = ranks[name] < max(p, j) / 2
        if (split_w1, split_w2) != ("lokr_w1_a" in module.tensors, "lokr_w2_a" in module.tensors):
            raise InputError(
                f"{source or 'this LoRA'}: PEFT would build module {name} otherwise; use kohya"
            )
    config = {
        **_COMMON,
        "peft_type": "LOKR",
        "decompose_both": both,
        "decompose_factor": factor,
        "init_weights": True,
        "module_dropout": 0.0,
        "rank_dropout": 0.0,
        "use_effective_conv2d": any("lokr_t2" in module.tensors for module in modules.values()),
    }
    return config | _ranks(modules, "alpha", ranks)


def _lokr_dims(module: LoraModule) -> tuple[tuple[int, int], tuple[int, int]]:
    """((out of w1, out of w2), (in of w1, in of w2)), the kernel taken out where it is known."""
    t = module.tensors
    first = (
        t["lokr_w1"].shape if "lokr_w1" in t else (t["lokr_w1_a"].shape[0], t["lokr_w1_b"].shape[1])
    )
    out, inner = module.weight_shape[:2]
    if "lokr_w2" in t:
        second = (t["lokr_w2"].shape[0], t["lokr_w2"].shape[1])
    else:
        second = (out // first[0], inner // first[1])
    return (int(first[0]), int(second[0])), (int(first[1]), int(second[1]))
