"""The shape of report.json, `"schema": "diffward.report/1"`, and a check of it.

`level` is null where `claim` is "refused": a control failed, so neither a leak nor its absence may
be claimed. `overall.claim` is "partial" if some but not all questions were refused.
"""

# No `from __future__ import annotations`: it would hide NotRequired from __required_keys__.
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

SCHEMA = "diffward.report/1"
FULL_MODEL = "full model"  # the `format` of a subject that is no LoRA
QUESTIONS = ("metadata", "membership", "identity", "copies", "prompt", "dataset_size")

Level = Literal["none_shown", "low", "medium", "high", "critical"]
Claim = Literal["made", "partial", "refused"]

CAPTIONS = ("known", "unknown", "none")
LEVELS: tuple[Level, ...] = ("none_shown", "low", "medium", "high", "critical")


class Subject(TypedDict):
    """The audited file.

    Of a full model `modules` and `parameters` count the tensors that are not the base's, and are null where no
    base was given to compare with; it has no rank.
    """

    path: str
    sha256: str | None
    format: str
    base_family: str
    rank: int | list[int] | None
    modules: int | None
    parameters: int | None


class Leak(TypedDict):
    """A header entry and what it tells; `category` as in `diffward.lora.leaks`."""

    key: str
    reveals: str
    category: NotRequired[str]


class Controls(TypedDict):
    """AUC of the two controls and whether each is at chance; null = not run."""

    base_model_auc: float | None
    base_model_ok: bool | None
    blind_auc: float | None
    blind_ok: bool | None
    base_model_reason: NotRequired[str]
    blind_reason: NotRequired[str]


class Attack(TypedDict):
    """`membership.statistics.summarise` plus what the attack needs and its controls.

    p_value    of the attack against guessing, two-sided; `p_holm` the same, adjusted for all attacks run
    inflation  1, or by how much cross-fitted scores widen the intervals of the AUC
    frozen     TPR and FPR at thresholds fixed on other non-members; null where those are too few
    """

    auc: float
    auc_ci95: list[float]
    auc_delong_ci95: list[float]
    p_value: float
    p_holm: float
    inflation: float
    advantage: float
    frozen: dict[str, dict[str, Any] | None]
    frozen_reason: dict[str, str]
    auc_signfree: float
    auc_signfree_ci95: list[float]
    tpr_at_fpr: dict[str, float | None]
    tpr_at_fpr_ci95: dict[str, list[float] | None]
    tpr_at_fpr_reason: dict[str, str]
    n_members: int
    n_non_members: int
    access: str
    queries_per_image: float
    controls: Controls


class Evaluations(TypedDict):
    """Denoiser evaluations for each picture: as shared by all attacks, and if each had asked alone."""

    made: float
    one_by_one: float


class Exposure(TypedDict):
    """How often training saw each picture. `source`: "run.json" or "header"."""

    passes: float
    steps: int
    source: str


class DatasetInference(TypedDict):
    """Are the training pictures, taken as a set, shown to have been used? So if p_value < alpha.

    `pictures_needed`: how many of them suffice; null where all of them do not.
    """

    p_value: float
    pictures_needed: int | None
    alpha: float


class EpsilonBound(TypedDict):
    """A lower bound on epsilon from pictures that a coin put in or out of the training.

    Of `canaries` such pictures the attack guessed at `guesses` and was right on `correct`.
    """

    attack: str
    epsilon: float
    delta: float
    confidence: float
    guesses: int
    correct: int
    canaries: int


class Membership(TypedDict):
    """`best` names the attack the verdict rests on; `per_image` the CSV beside the report.

    skipped   {attack: why it was not run}
    captions  known, unknown (left out by `--captions unknown`) or none (there are none)
    """

    attacks: dict[str, Attack]
    best: str
    per_image: str | None
    skipped: dict[str, str]
    captions: str
    evaluations_per_image: Evaluations
    exposure: Exposure | None
    dataset_inference: DatasetInference | None
    epsilon: EpsilonBound | None


class Question(TypedDict):
    """One question about the file and its answer in plain words."""

    id: str
    level: Level | None
    claim: Claim
    statement: str
    statistic: str | None
    value: float | None
    ci95: list[float] | None
    control: str | None
    evidence: list[str]
    advice: list[str]


class Overall(TypedDict):
    """The worst question; `headline` is one sentence."""

    level: Level | None
    claim: Claim
    headline: str


class Report(TypedDict):
    """report.json."""

    schema: str
    subject: Subject
    overall: Overall
    questions: list[Question]
    leaks: list[Leak]
    membership: Membership | None
    provenance: dict[str, Any]


_OPTIONAL: dict[str, Any] = {
    "exposure": Exposure,
    "dataset_inference": DatasetInference,
    "epsilon": EpsilonBound,
}


def validate_report(report: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with `report`; an empty list if it keeps the schema."""
    found: list[str] = []
    if report.get("schema") != SCHEMA:
        found.append(f"schema is {report.get('schema')!r}, not {SCHEMA!r}")
    for name, kind in (
        ("subject", Mapping),
        ("overall", Mapping),
        ("questions", Sequence),
        ("leaks", Sequence),
        ("provenance", Mapping),
    ):
        if not isinstance(report.get(name), kind):
            found.append(f"{name} is missing or of the wrong type")
    if found:
        return found
    found += _missing("subject", report["subject"], Subject.__required_keys__)
    found += _missing("overall", report["overall"], Overall.__required_keys__)
    found += _level("overall", report["overall"])
    for index, question in enumerate(report["questions"]):
        where = f"questions[{index}]"
        found += _missing(where, question, Question.__required_keys__) + _level(where, question)
        if question.get("id") not in QUESTIONS:
            found.append(f"{where}.id {question.get('id')!r} is not one of {', '.join(QUESTIONS)}")
    for index, leak in enumerate(report["leaks"]):
        found += _missing(f"leaks[{index}]", leak, Leak.__required_keys__)
    if (membership := report.get("membership")) is not None:
        found += _membership(membership)
    return found


def _membership(membership: Mapping[str, Any]) -> list[str]:
    found = _missing("membership", membership, Membership.__required_keys__)
    attacks = membership.get("attacks") or {}
    if membership.get("best") not in attacks:
        found.append(f"membership.best {membership.get('best')!r} is not an attack")
    for name, attack in attacks.items():
        found += _attack(f"membership.attacks.{name}", attack)
    for name in sorted(set(attacks) & set(membership.get("skipped") or ())):
        found.append(f"membership.skipped: {name} was run")
    if (captions := membership.get("captions", "none")) not in CAPTIONS:
        found.append(f"membership.captions {captions!r} is not one of {', '.join(CAPTIONS)}")
    if (budget := membership.get("evaluations_per_image")) is not None:
        found += _missing("membership.evaluations_per_image", budget, Evaluations.__required_keys__)
    for key, kind in _OPTIONAL.items():
        if (part := membership.get(key)) is not None:
            found += _missing(f"membership.{key}", part, kind.__required_keys__)
    exposure, together = membership.get("exposure") or {}, membership.get("dataset_inference") or {}
    if not exposure.get("passes", 0) >= 0:
        found.append(f"membership.exposure.passes is {exposure['passes']}")
    for key in ("p_value", "alpha"):
        if not 0 <= together.get(key, 0) <= 1:
            found.append(f"membership.dataset_inference.{key} is {together[key]}")
    epsilon = membership.get("epsilon") or {}
    if not epsilon.get("epsilon", 0) >= 0:
        found.append(f"membership.epsilon.epsilon is {epsilon['epsilon']}")
    counts = [epsilon.get(key, 0) for key in ("correct", "guesses", "canaries")]
    if epsilon and not 0 <= counts[0] <= counts[1] <= counts[2]:
        found.append(f"membership.epsilon: {counts[0]} correct of {counts[1]} of {counts[2]}")
    return found


def _attack(where: str, attack: Mapping[str, Any]) -> list[str]:
    found = _missing(where, attack, Attack.__required_keys__)
    found += _missing(f"{where}.controls", attack.get("controls") or {}, Controls.__required_keys__)
    value, (low, high) = attack.get("auc", 0.5), attack.get("auc_ci95", (0, 1))
    if not 0 <= low <= value <= high <= 1:
        found.append(f"{where}: {low} <= {value} <= {high} does not hold within 0 and 1")
    p_value, adjusted = attack.get("p_value", 0), attack.get("p_holm", 1)
    if not 0 <= p_value <= adjusted + 1e-12 <= 1 + 1e-9:
        found.append(f"{where}: p_value {p_value} and p_holm {adjusted} do not fit")
    return found


def _missing(where: str, entry: Mapping[str, Any], keys: frozenset[str]) -> list[str]:
    return [f"{where}.{key} is missing" for key in sorted(keys - set(entry))]


def _level(where: str, entry: Mapping[str, Any]) -> list[str]:
    level, claim = entry.get("level"), entry.get("claim")
    if claim not in ("made", "partial", "refused"):
        return [f"{where}.claim is {claim!r}"]
    if claim == "refused":
        return [] if level is None else [f"{where}.level must be null where the claim is refused"]
    return [] if level in LEVELS else [f"{where}.level is {level!r}"]
