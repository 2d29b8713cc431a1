"""What the commands print: short, aligned, and readable without colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffward.lora import Inspection


MOST_ATTACKS = 6


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
    """Print the verdict of an audit, its best attacks, and the controls."""
    print()
    print(report["overall"]["headline"])
    # What was refused comes first.
    for question in sorted(report["questions"], key=lambda q: q["claim"] != "refused"):
        level = question["level"] or "no claim"
        print(f"  {question['id']}: {level.replace('_', ' ')}. {question['statement']}")
    if report.get("membership"):
        refused = any(
            q["claim"] == "refused" and q["id"] == "membership" for q in report["questions"]
        )
        _show_membership(report["membership"], refused)


def _show_membership(membership: Mapping[str, Any], refused: bool) -> None:
    from diffward.report.evidence import p_number, skipped_words
    from diffward.report.verdict import ranked_attacks

    attacks, skipped = membership["attacks"], membership["skipped"]
    names = ranked_attacks(attacks)
    best = attacks[names[0]]
    wide = max(len("attack"), *(len(name) for name in names[:MOST_ATTACKS]))
    print()
    if refused:
        print(f"  {_controls_line(attacks, names[0])}")
        print("  For the record only, these figures prove nothing:")
    many = f", all {len(names)} attacks" if len(names) > 1 else ""
    print(f"  {'attack'.ljust(wide)}  AUC    95 % interval   p{many}")
    for name in names[:MOST_ATTACKS]:
        attack = attacks[name]
        low, high = attack["auc_ci95"]
        p_value = p_number(attack["p_holm"])
        print(f"  {name.ljust(wide)}  {attack['auc']:.3f}  {low:.3f} to {high:.3f}  {p_value}")
    if len(names) > MOST_ATTACKS:
        print(f"  {len(names) - MOST_ATTACKS} more attacks: report.html")
    print(f"  {best['n_members']} members, {best['n_non_members']} non-members")
    if not refused:
        print(f"  {_controls_line(attacks, names[0])}")
    if skipped:
        reasons = "; ".join(skipped_words(skipped))
        print(f"  {len(skipped)} {'attack' if len(skipped) == 1 else 'attacks'} not run: {reasons}")
    if (epsilon := membership["epsilon"]) and not refused:
        sure = f"delta {epsilon['delta']:g}, {100 * epsilon['confidence']:g} % confidence"
        bound = epsilon["epsilon"]
        print(f"  epsilon {f'at least {bound:.2f}' if bound > 0 else 'above 0 not shown'} ({sure})")


def _controls_line(attacks: Mapping[str, Any], name: str) -> str:
    from diffward.report.verdict import failed_controls, worst_base_control

    worst, controls = worst_base_control(attacks), attacks[name]["controls"]
    base = "not run"
    if worst:
        base = f"{worst[1]:.2f}" + (f" at the farthest ({worst[0]})" if len(attacks) > 1 else "")
    blind = "not run" if controls["blind_auc"] is None else f"{controls['blind_auc']:.2f}"
    outcome = ""
    if failed_controls(attacks):
        outcome = "OFF CHANCE, should be near 0.5"
    elif worst or controls["blind_auc"] is not None:
        outcome = "at chance"
    return f"controls: base model {base}, blind {blind}{': ' if outcome else ''}{outcome}"


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
