"""`diffward`: a table of commands; each is one typed function, imported only when it is called."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from diffward import __version__
from diffward.errors import DiffwardError

# name: (module in this package, what it does in a line). The function is called like the command.
COMMANDS = {
    "demo": ("demo", "the main job, start to end, on the embedded base; ends with a page to open"),
    "inspect": ("inspect", "what a LoRA file itself gives away: header, format, ranks, spectrum"),
    "scrub": ("scrub", "keep what other tools need of a header, drop what tells of the data"),
    "convert": ("convert", "write a LoRA for another tool: diffusers, peft or kohya"),
    "split": ("split", "divide pictures at random into members and non-members"),
    "train": ("train", "fine-tune a base on a folder of pictures"),
    "sample": ("sample", "draw pictures with a base and a LoRA"),
    "audit": ("audit", "what a LoRA gives away: a page to read and a file for machines"),
    "bench": ("bench", "measure: the tables of bench/, in a checkout"),
    "list": ("listing", "attacks, methods and metrics, with paper, access needed and cost"),
    "doctor": ("doctor", "is everything here that diffward needs?"),
    "cite": ("cite", "the papers behind what diffward does"),
}


def _stop(*_: object) -> NoReturn:
    """To be asked to stop is like Ctrl-C. Not through SIGINT: a job in the background ignores that."""
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> None:
    """Run one command; exits with 0, 1 (a gate was crossed), 2 (wrong input) or 3 (interrupted)."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        raise SystemExit(0)
    if args[0] in ("-V", "--version"):
        print(f"diffward {__version__}")
        raise SystemExit(0)
    name = args.pop(0)
    if name not in COMMANDS:
        _fail(f"diffward: unknown command {name!r}; known: {', '.join(COMMANDS)}")
    # A scheduler's stop is as good a reason to save as Ctrl-C.
    signal.signal(signal.SIGTERM, _stop)
    try:
        raise SystemExit(_run(name, args))
    except DiffwardError as error:
        _fail(f"diffward {name}: {error}", error.exit_code)
    except KeyboardInterrupt:
        _fail(f"diffward {name}: interrupted; run the same command again to go on", 3)
    except BrokenPipeError:
        raise SystemExit(0) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"diffward {name}: {where}{error.strerror or error}; check the path and its rights")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "not enough memory" not in str(error):
            raise
        _fail(f"diffward {name}: out of memory; lower --batch or --resolution")


def _run(name: str, args: list[str]) -> int:
    from diffward.commands.cli import call

    return int(call(command(name), f"diffward {name}", args) or 0)


def command(name: str) -> Callable[..., int | None]:
    """The function behind a command."""
    module = importlib.import_module(f"diffward.commands.{COMMANDS[name][0]}")
    function: Callable[..., int | None] = getattr(module, COMMANDS[name][0])
    return function


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {told}" for name, (_, told) in COMMANDS.items()]
    return "\n".join(
        ["diffward: know what your fine-tuned diffusion model gives away, before you share it.", "",
         "usage: diffward COMMAND [options]; diffward COMMAND --help says more", "", *lines]
    )  # fmt: skip


def _fail(message: str, code: int = 2) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
