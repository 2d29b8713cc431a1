"""The audit's rules about weights: how often they say "none shown" of LoRAs that hold no person, and of those that do.

How much a LoRA must look as if it held a subject is chosen in `gate`, on LoRAs that are used for nothing else; `nobody`
judges on people and things that neither the inverter nor that choice has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from bench.weight_inversion import Rows, Setting
    from diffward.inversion.findings import IdentityFinding, SubjectFinding
    from diffward.inversion.subjects import Subjects
    from diffward.inversion.tokens import Tokens
    from diffward.inversion.zoo import Row, Zoo

GATES = (0.02, 0.05, 0.1, 0.2, 0.3, 1.0)
LEAST = 0.95  # of LoRAs without a person are to be "none shown"
KINDS = ("logo", "garment")
JUDGED = 192  # people of a zoo of their own
STRANGERS = 977  # seed of people who are in no zoo

Asked = tuple["IdentityFinding", "SubjectFinding | None"]


def gate(setting: Setting) -> Rows:
    """Of each gate the share of "none shown" of LoRAs of things, in zoos of their own.

    The rule: the loosest gate at which at least 95 % are "none shown", however they are asked. `chosen` marks it, and
    `weights_verdict.SUBJECT_GATE` must be it.
    """
    from diffward.report.weights_verdict import SUBJECT_GATE, identity_question

    accuracy = setting.inverter.facts.held_out["floor"]
    groups: dict[str, list[Asked]] = {}
    for kind in KINDS:
        zoo = setting.zoo(f"{kind}s-gate", f"world:{kind}", 128, {"logo": 15, "garment": 16}[kind])
        rows = zoo.last_saves(zoo.rows)
        for what, whose in _ways(kind, zoo, 5 * 10**6):
            groups[f"LoRAs of {kind}s, {what}"] = list(_ask(setting, zoo, rows, whose))
    found: Rows = []
    for limit in GATES:
        for name, asked in groups.items():
            levels = []
            for identity, subject in asked:
                level = identity_question(identity, None, accuracy)["level"]
                levels.append(level if subject is None or subject.p_value < limit else "none_shown")
            found.append({"gate": limit, **_silent(name, levels)})
    good = [g for g in GATES if all(r["none_shown"] >= LEAST for r in found if r["gate"] == g)]
    chosen = max(good, default=min(GATES))
    if chosen != SUBJECT_GATE:
        print(f"gate: the rule chooses {chosen}, weights_verdict.SUBJECT_GATE is {SUBJECT_GATE}")
    return [{**r, "chosen": r["gate"] == chosen} for r in found]


def nobody(setting: Setting) -> Rows:
    """LoRAs that hold no person, or nothing, and LoRAs of people asked with pictures of the right person and of another.

    Those without a person are asked with pictures of their own kind, of a person who is not in them, and without pictures.
    """
    cases: Rows = []
    for kind in KINDS:
        zoo = setting.zoo(f"{kind}s-judged", f"world:{kind}", 64, {"logo": 25, "garment": 26}[kind])
        rows = zoo.last_saves(zoo.rows)
        for what, whose in _ways(kind, zoo, 2 * 10**6):
            cases.append(_rules(f"LoRAs of {kind}s, {what}", setting, list(_ask(setting, zoo, rows, whose))))  # fmt: skip
        cases.append(_alone(f"LoRAs of {kind}s", setting, setting.inverter.basis.of_zoo(zoo, rows)))
    never = _never_trained(setting, 4 if setting.quick else 100)
    others = [(3 * 10**6 + i, _people()) for i in range(len(never))]
    cases.append(_rules("never trained (B = 0), a person who is not in it", setting, list(_asked(setting, never, others))))  # fmt: skip
    cases.append(_alone("never trained (B = 0)", setting, never))
    zoo = setting.zoo("judged", "world", JUDGED, 9)
    rows = zoo.last_saves(zoo.rows)
    own = _whose(zoo)
    for what, whose in (
        ("its own person", own),
        ("another person", lambda row: (4 * 10**6 + row.lora, _people())),
    ):
        cases.append(_rules(f"LoRAs of people, {what}", setting, list(_ask(setting, zoo, rows, whose))))  # fmt: skip
    return cases


Whose = Callable[["Row"], "tuple[int, Subjects]"]


def _ways(kind: str, zoo: Zoo, strangers: int) -> Iterator[tuple[str, Whose]]:
    yield "its own kind", _whose(zoo)
    yield "a person who is not in it", lambda row: (strangers + row.lora, _people())


def _whose(zoo: Zoo) -> Whose:
    from diffward.inversion.subjects import open_subjects

    subjects = open_subjects(zoo.head.subjects, seed=zoo.head.seed, side=zoo.head.resolution)
    return lambda row: (row.identity, subjects)


def _people() -> Subjects:
    from diffward.inversion.subjects import World

    return World("", seed=STRANGERS)


def _ask(setting: Setting, zoo: Zoo, rows: list[Row], whose: Whose) -> Iterator[Asked]:
    return _asked(setting, setting.inverter.basis.of_zoo(zoo, rows), [whose(row) for row in rows])


def _asked(setting: Setting, tokens: Tokens, whose: list[tuple[int, Subjects]]) -> Iterator[Asked]:
    """Each LoRA with pictures of somebody or something."""
    from diffward.inversion.findings import identity_finding, subject_finding
    from diffward.inversion.identity import subject_features

    for i, (number, subjects) in enumerate(whose):
        one = tokens.of([i])
        features = subject_features(subjects, [number], setting.material.eye, [3])[0]
        finding = identity_finding(setting.inverter, one, features, seed=i)
        yield finding, subject_finding(setting.inverter, one)


def _rules(name: str, setting: Setting, asked: list[Asked]) -> dict[str, Any]:
    from diffward.report.weights_verdict import identity_question

    accuracy = setting.inverter.facts.held_out["floor"]
    return _silent(name, [identity_question(*one, accuracy)["level"] for one in asked])


def _alone(name: str, setting: Setting, tokens: Tokens) -> dict[str, Any]:
    from diffward.inversion.findings import subject_finding
    from diffward.report.weights_verdict import subject_question

    accuracy = setting.inverter.facts.held_out["floor"]
    found = [subject_finding(setting.inverter, tokens.of([i])) for i in range(len(tokens))]
    return _silent(f"{name}, no pictures", [subject_question(one, accuracy)["level"] for one in found])  # fmt: skip


def _silent(name: str, levels: list[Any]) -> dict[str, Any]:
    from diffward.metrics.shares import wilson

    none = sum(level == "none_shown" for level in levels)
    return {
        "method": "audit's rules", "control": name, "victims": len(levels), "none_shown": none / len(levels),
        "none_shown_ci95": list(wilson(none, len(levels))), "high": float(np.mean([level == "high" for level in levels])),
    }  # fmt: skip


def _never_trained(setting: Setting, count: int) -> Any:
    """Tokens of fresh LoRAs, B = 0."""
    from diffward.inversion.tokens import Tokens

    parts = []
    for seed in range(count):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            weights = setting.denoiser.inject(
                8, 8.0, ["to_q", "to_k", "to_v", "to_out.0"], text_encoder=False
            ).weights()
        setting.denoiser.detach()
        parts.append(setting.inverter.tokens(weights))
    return Tokens.cat(parts)
