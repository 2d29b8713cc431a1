from __future__ import annotations

from typing import Any, Literal


def listing(
    what: Literal["attacks", "methods", "decoders", "guards", "metrics", "bases"],
    json: bool = False,
) -> None:
    """What diffward knows of, with paper, access needed and cost.

    Args:
        what: attacks, methods, decoders, guards, metrics or bases.
        json: print JSON.
    """
    rows = _rows(what)
    if json:
        from json import dumps

        print(dumps(rows, indent=2))
        return
    from diffward.report.terminal import show_rows

    show_rows(rows)


def _rows(what: str) -> list[dict[str, Any]]:
    if what == "bases":
        return [
            {"name": "mini", "what": "the embedded base: small, complete, drawn pictures only"},
            {"name": "a folder", "what": "a diffusers pipeline of Stable Diffusion 1.x or 2.x"},
            {"name": "a file", "what": "a single-file checkpoint of Stable Diffusion 1.x or 2.x"},
            {"name": "a hub id", "what": "owner/name of such a model on the Hugging Face hub"},
        ]
    if what == "attacks":
        from diffward.membership.evaluate import ATTACKS as registry
    elif what == "methods":
        from diffward.finetune import METHODS as registry  # type: ignore[assignment]
    elif what == "decoders":
        from diffward.inversion.decoders import DECODERS as registry  # type: ignore[assignment]
    elif what == "guards":
        from diffward.guard import GUARDS as registry  # type: ignore[assignment]
    else:
        from diffward.metrics import METRICS as registry  # type: ignore[assignment]
    return [
        {"name": e.name, "what": e.summary, "paper": e.paper, "access": e.access, "cost": e.cost}
        for e in registry
    ]
