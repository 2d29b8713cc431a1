from __future__ import annotations


def demo(out: str = "runs/demo", seed: int = 0, device: str = "auto") -> None:
    """Fine-tune, audit and compare, on the embedded base; ends with a page to open.

    Two LoRAs learn the same fictional person from the same pictures. One is trained until it has
    memorised them, the other is stopped early. Both are audited as `diffward audit` would.

    Args:
        out: folder for everything; running again resumes.
        seed: another seed draws another person.
    """
    from pathlib import Path

    from diffward.report.demo import run_demo

    page = run_demo(Path(out), seed, device)
    print(f"\nopen {page}")
