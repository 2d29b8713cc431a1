from __future__ import annotations


def cite() -> None:
    """The papers behind what diffward does."""
    from diffward.finetune import METHODS
    from diffward.guard import GUARDS
    from diffward.inversion.decoders import DECODERS
    from diffward.membership.evaluate import ATTACKS
    from diffward.metrics.metric import METRICS

    for registry in (ATTACKS, METHODS, DECODERS, GUARDS, METRICS):
        for entry in registry:
            if entry.paper:
                print(f"{registry.role} {entry.name}: {entry.paper}")
    print(
        "reading weights: Yao et al. 2024 (arXiv 2409.08482); canonical tokens: Han 2026 (arXiv 2603.15990)"
    )
    print("words from weights, decoded as by Petrov et al. 2024 (arXiv 2405.15586)")
    print(
        "guided extraction: Wu et al. 2025 (arXiv 2410.03039); dataset size: Salama et al. 2024 (arXiv 2406.19395)"
    )
    print("blind control: Das, Zhang and Tramer 2024 (arXiv 2406.16201)")
    print("AUC intervals: Newcombe 2006, method 5, and the stratified bootstrap")
