"""The rows of `private-lora`, from what is kept of its cases, and the curve drawn from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench._squeezenet import NAME
from bench.private_cases import PEOPLE, Case
from bench.private_utility import PAIRS, eye, read_utility
from diffward.errors import TrainingError
from diffward.files import atomic_path
from diffward.membership.statistics import cluster_interval
from diffward.metrics.kid import kid
from diffward.metrics.paired import kid_difference
from diffward.metrics.roc import signfree_interval

if TYPE_CHECKING:
    from bench.private_lora import Bench

FPR = "0.05"
MARKERS = "sDv^<>PX*hpd8"  # not as many as colours, so that the pairs repeat late
NOTES = (
    "mini people: 10 new fictional people a seed, 160 portraits that train (40 of them auxiliary), 80 auxiliary ones "
    "that do not; judged: 120 members and 120 non-members that no method compared. clothing: photographs, 200 "
    "that train and 200 that do not, a quarter of either auxiliary. A seed is other people, another split and "
    "another start",
    "LoRA on all layers, AdamW, learning rate 1e-3 constant, batch 8; text: on the keys and values of the "
    "cross-attention alone, learning rate 2e-3; full: all weights of the UNet at 1e-4, which was not tuned. All methods have the same split. exposure: passes over each picture "
    "up to the weights that are judged",
    f"heldout_loss_ratio: error on the judged non-members ({PAIRS} fixed pairs) over that of plain LoRA at its best, "
    "which is the snapshot with the least error on the gauge's validation pictures; base_loss_ratio: the untouched "
    "base over the same; gain_kept: (base - method) / (base - best plain)",
    "kid: pictures drawn for the captions of the judged non-members, one each, against these pictures; features: "
    f"mini's attribute network (d = 192) for mini people, {NAME}, for clothing. "
    "kid_difference_ci95: KID less that of best plain, same captions and noise",
    "identity_match: share of drawn pictures that show the person named (at most one of eight attributes differs); "
    "caption_agreement: share of the named attributes that they show",
    "attacks: sign-free AUC, max(AUC, 1 - AUC), captions known; worst_attack: the one with the largest, found on the "
    "pictures it is judged on, so that with nothing to find it still lies somewhat above 0.5; worst_p_holm: its p "
    "value as one of all attacks; tpr_at_5_fpr: of the worst attack",
    "seed all: means over the seeds; an attack's AUC is averaged with its sign and made sign-free after that, the "
    "worst is the largest of these, and its interval resamples runs and pictures",
    "controls: base_model_auc is that of the attack whose control is farthest from 0.5 on the base alone; "
    "off_chance names attacks whose control is off chance",
    "commit: of the table that a row was first told in, where it was not measured anew",
    "effective_weight: w in L - w CE, whose gradient the objective has but for a common factor: lambda for mp, the "
    "mean of lambda L / (1 + lambda CE) over the run for smp",
    "cost rows: processor time (with a commit: wall time) of a whole optimizer step against a plain one, rounds in turns in one process, medians; step_ratio "
    "and memory_ratio (peak of a process of its own that trains, the teachers of distill included) to plain; "
    "total_ratio: processor time of a whole run above, with gauge and teachers, to that of plain on the same layers "
    "with as many passes, mean over the runs",
)  # fmt: skip


def table_rows(bench: Bench) -> tuple[list[dict[str, Any]], list[tuple[str, Case]]]:
    """Rows of all cases that are measured, each seed's and then the means; and those that are not, in words too."""
    table = _Table(bench)
    rows: list[tuple[Case, dict[str, Any]]] = []
    missing: list[tuple[str, Case]] = []
    for case in bench.cases:
        try:
            there = bench.is_measured(case)
        except TrainingError:
            continue  # told in the notes
        if there and table.best(case.dataset, case.seed):
            rows.append((case, table.row(case)))
        else:
            told = f"{case.method} ({case.told}, {case.passes:g} passes, seed {case.seed})"
            missing.append((told, case))
    means = []
    for case, _ in rows:
        alike = [(c, r) for c, r in rows if _kind(c) == _kind(case)]
        if len(alike) > 1 and alike[0][0] == case:
            means.append(_over_seeds(bench, alike))
    return [row for _, row in rows] + means, missing


def _kind(case: Case) -> tuple[Any, ...]:
    return case.dataset, case.method, case.told, case.recipe.at, case.passes


class _Table:
    """One row a case."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.best = lru_cache(maxsize=None)(self._best)
        self.real = lru_cache(maxsize=None)(self._real)

    def _best(self, dataset: str, seed: int) -> dict[str, Any] | None:
        """Utility of plain LoRA at its best validation."""
        found = []
        for case in self.bench.cases:
            curve = case.method == "plain" and not case.recipe.label and len(case.recipe.at) > 1
            if curve and (case.dataset, case.seed) == (dataset, seed):
                if not self.bench.is_measured(case):
                    return None  # the best may be the one that is missing
                found.append(read_utility(self.bench.file(case, "utility.json")))
        return min(found, key=lambda one: float(np.mean(one["validation"])), default=None)

    def _real(self, dataset: str, seed: int) -> np.ndarray:
        """Features (n, d) of the judged non-members themselves."""
        material = self.bench.material(dataset, seed)
        return eye(material)(material.sides.non_members.pixels(self.bench.denoiser.resolution))

    def row(self, case: Case) -> dict[str, Any]:
        bench, at = self.bench, (case.dataset, case.seed)
        base, best, real = bench.base_utility(*at), self.best(*at), self.real(*at)
        assert best is not None
        own = read_utility(bench.file(case, "utility.json"))
        run = json.loads(bench.file(case, "run.json").read_text(encoding="utf-8"))
        untouched, least, error = (float(np.mean(one["heldout"])) for one in (base, best, own))
        distance = kid(own["features"], real)
        apart = [0.0, 0.0]
        if own["weights"] != best["weights"]:
            apart = list(kid_difference(own["features"], best["features"], real).interval)
        return {
            "dataset": case.dataset, "method": case.method, "settings": case.told,
            "exposure": run["passes_per_picture"], "seed": case.seed,
            "heldout_loss_ratio": error / least, "base_loss_ratio": untouched / least,
            "gain_kept": (untouched - error) / (untouched - least) if least < untouched else None,
            "kid": distance.value, "kid_ci95": list(distance.interval), "kid_difference_ci95": apart,
            "identity_match": own["identity_match"], "base_identity_match": base["identity_match"],
            "caption_agreement": own["caption_agreement"],
            **_privacy(_audit(bench, case)["membership"]["attacks"]),
            "effective_weight": run["effective_weight"],
        }  # fmt: skip


def _audit(bench: Bench, case: Case) -> dict[str, Any]:
    return dict(json.loads(bench.file(case, "audit.json").read_text(encoding="utf-8")))


def _privacy(attacks: dict[str, Any]) -> dict[str, Any]:
    """What an audit found, in short."""
    worst = max(attacks, key=lambda name: float(attacks[name]["auc_signfree"]))
    controls = {name: found["controls"] for name, found in attacks.items()}
    return {
        "attacks": {name: found["auc_signfree"] for name, found in attacks.items()},
        "worst_attack": worst,
        "worst_auc": attacks[worst]["auc_signfree"],
        "worst_auc_ci95": attacks[worst]["auc_signfree_ci95"],
        "worst_p_holm": attacks[worst]["p_holm"],
        "calibrated_auc": attacks["calibrated"]["auc"],
        "tpr_at_5_fpr": attacks[worst]["tpr_at_fpr"].get(FPR),
        "controls": {
            "base_model_auc": max(
                (c["base_model_auc"] for c in controls.values()), key=lambda value: abs(value - 0.5)
            ),
            "blind_auc": controls[worst]["blind_auc"],
            "off_chance": [
                *(name for name, c in controls.items() if not c["base_model_ok"]),
                *(["blind"] if controls[worst]["blind_ok"] is False else []),
            ],
        },
    }


def _over_seeds(bench: Bench, alike: Sequence[tuple[Case, dict[str, Any]]]) -> dict[str, Any]:
    """The mean row of one case over its seeds."""
    rows = [row for _, row in alike]
    audits = [_audit(bench, case) for case, _ in alike]
    signed = {
        name: float(np.mean([a["membership"]["attacks"][name]["auc"] for a in audits]))
        for name in rows[0]["attacks"]
    }
    free = {name: max(value, 1 - value) for name, value in signed.items()}
    worst = max(free, key=free.__getitem__)
    _, interval = cluster_interval([_scores(audit, worst) for audit in audits])
    figures = (
        "exposure", "heldout_loss_ratio", "base_loss_ratio", "gain_kept", "kid", "identity_match",
        "base_identity_match", "caption_agreement", "effective_weight",
    )  # fmt: skip
    return {
        **{key: rows[0][key] for key in ("dataset", "method", "settings")},
        **{key: _mean([row[key] for row in rows]) for key in figures},
        "seed": "all",
        "kid_ci95": _mean_interval([row["kid_ci95"] for row in rows]),
        "kid_difference_ci95": _mean_interval([row["kid_difference_ci95"] for row in rows]),
        "attacks": free,
        "worst_attack": worst,
        "worst_auc": free[worst],
        "worst_auc_ci95": list(signfree_interval(interval)),
        "calibrated_auc": signed["calibrated"],
        "tpr_at_5_fpr": _mean(
            [a["membership"]["attacks"][worst]["tpr_at_fpr"].get(FPR) for a in audits]
        ),
        "controls": {
            "base_model_auc": _mean([row["controls"]["base_model_auc"] for row in rows]),
            "blind_auc": _mean([row["controls"]["blind_auc"] for row in rows]),
            "off_chance": [name for row in rows for name in row["controls"]["off_chance"]],
        },
    }


def _scores(audit: dict[str, Any], attack: str) -> tuple[np.ndarray, np.ndarray]:
    scores, member = np.array(audit["scores"][attack]), np.array(audit["member"])
    return scores[member], scores[~member]


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if len(found) == len(values) else None


def _mean_interval(intervals: Sequence[Sequence[float]]) -> list[float]:
    """Of the mean of independent figures, from the interval of each."""
    ends = np.array(intervals)
    middle, half = ends.mean(), np.sqrt((np.diff(ends) ** 2).sum()) / 2 / len(ends)
    return [float(middle - half), float(middle + half)]


def draw_curve(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Worst attack against what is kept of the quality, one marker a way of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    people = [row for row in rows if row.get("dataset") == PEOPLE]
    shown = [row for row in people if row["seed"] == "all"] or people
    plain = sorted(
        (row for row in shown if (row["method"], row["settings"]) == ("plain", "rank 8")),
        key=lambda row: row["exposure"],
    )
    if not shown or not plain:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True)
    others = [row for row in shown if row not in plain]
    for axis, what, label in zip(
        axes,
        ("gain_kept", "identity_match"),
        ("share of the held-out gain kept", "drawn pictures that show the person named"),
        strict=True,
    ):
        xs, ys = ([row[key] for row in plain] for key in ("worst_auc", what))
        axis.plot(xs, ys, "o-", color="0.4", label="plain LoRA, by passes (early stopping)")
        for row, x, y in zip(plain, xs, ys, strict=True):
            axis.annotate(f"{row['exposure']:g}", (x, y), (4, -10), textcoords="offset points", fontsize=8)  # fmt: skip
        for number, row in enumerate(others):
            name = f"{row['method']}{row['settings'].removeprefix('rank 8')}, {row['exposure']:.3g} passes"
            colour, marker = f"C{number % 10}", MARKERS[number % len(MARKERS)]
            axis.plot(row["worst_auc"], row[what], marker, color=colour, label=name, linestyle="")
        axis.set(xlabel="AUC of the worst attack (sign-free)", ylabel=label, xlim=(0.49, 1.01))
        if what == "identity_match":
            axis.set_ylim(-0.02, 1)
        axis.axvline(0.6, color="0.8", linewidth=1, zorder=0)
        axis.grid(alpha=0.2)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=150)
    pyplot.close(figure)
