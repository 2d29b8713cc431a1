from __future__ import annotations


def bench(name: str, quick: bool = False) -> None:
    """Measure one table of bench/ and write bench/results/NAME.json and .md. Run it in a checkout.

    Args:
        name: a module of bench/.
        quick: a small slice of the same code, in about a minute; nothing is written to bench/results.
    """
    import importlib
    import sys
    from pathlib import Path

    from diffward.errors import InputError

    folder = Path("bench")
    known = sorted(
        p.stem.replace("_", "-")
        for p in folder.glob("[a-z]*.py")
        if "\ndef run(" in p.read_text(encoding="utf-8")
    )
    if name not in known:
        hint = f"known: {', '.join(known)}" if known else "run it in a checkout of the repository"
        raise InputError(f"no benchmark {name!r} here; {hint}")
    sys.path.insert(0, str(Path.cwd()))
    module = importlib.import_module(f"bench.{name.replace('-', '_')}")
    module.run(quick=quick)
