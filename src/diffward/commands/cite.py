from __future__ import annotations


def cite() -> None:
    """The papers behind what diffward does."""
    from diffward.finetune import METHODS
    from diffward.guard import GUARDS
    from diffward.membership.evaluate import ATTACKS
    from diffward.metrics.metric import METRICS

    for registry in (ATTACKS, METHODS, GUARDS, METRICS):
        for entry in registry:
            if entry.paper:
                print(f"{registry.role} {entry.name}: {entry.paper}")
    print("blind control: Das, Zhang and Tramer 2024 (arXiv 2406.16201)")
    print("AUC intervals: Newcombe 2006, method 5, and the stratified bootstrap")
