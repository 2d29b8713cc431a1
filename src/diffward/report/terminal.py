"""What the commands print: short, aligned, and readable without colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffward.lora import Inspection


def show_inspection(found: Inspection) -> None:
    """Print what `inspect` found, the leaks last."""
    facts = {
        "file": found.path,
        "format": f"{found.format}, {found.kind}",
        "base": found.base_family
        + (f" (but {found.family_conflict})" if found.family_conflict else ""),
        "modules": f"{found.modules}"
        + (f", {len(found.dead_modules)} of them dead" if found.dead_modules else ""),
        "rank": found.rank,
        "alpha": found.alpha,
        "parameters": f"{found.parameters:,}",
        "types": ", ".join(f"{k} x {v}" for k, v in found.dtypes.items()),
        "norms": _spread(found.norms),
        "effective rank": _spread(found.effective_rank),
        "measured": f"{found.measured_modules} of {found.modules} modules (--full for all)"
        if found.measured_modules < found.modules
        else None,
        "embeddings": ", ".join(found.extras) or None,
        "sha256": found.sha256,
    }
    for key, value in facts.items():
        if value not in (None, ""):
            print(f"{key.ljust(15)} {value}")
    if not found.leaks:
        print("\nThe header tells nothing of the training data.")
        return
    print(f"\nThe file tells {len(found.leaks)} things to anyone who opens it:")
    for leak in found.leaks:
        print(f"  {leak.key}: {leak.reveals}")
    print("\ndiffward scrub FILE --out CLEAN.safetensors removes what the header tells.")


def show_report(report: Mapping[str, Any]) -> None:
    """Print the verdict of an audit and its figures."""
    print()
    print(report["overall"]["headline"])
    for question in report["questions"]:
        print(
            f"  {question['id']}: {question['level'] or question['claim']}. {question['statement']}"
        )
    membership = report.get("membership")
    for name, attack in (membership or {}).get("attacks", {}).items():
        low, high = attack["auc_ci95"]
        controls = attack["controls"]
        blind = "not run" if controls["blind_auc"] is None else f"{controls['blind_auc']:.2f}"
        print(
            f"  {name}: AUC {attack['auc']:.3f} [{low:.3f}, {high:.3f}], "
            f"{attack['n_members']} members, {attack['n_non_members']} non-members; "
            f"controls: base model {controls['base_model_auc']:.2f}, blind {blind}"
        )


def show_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of the same keys, one block a row."""
    for row in rows:
        first, *rest = row.items()
        print(first[1])
        for key, value in rest:
            if value:
                print(f"  {key}: {value}")


def _spread(values: Mapping[str, float] | None) -> str | None:
    if not values:
        return None
    return ", ".join(f"{k} {v:.4g}" for k, v in values.items())
