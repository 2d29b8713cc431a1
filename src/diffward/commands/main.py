"""`diffward`: a table of commands; each is one typed function, imported only when it is called."""

from __future__ import annotations

import errno
import importlib
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from diffward import __version__
from diffward.errors import DiffwardError

# name: (module in this package, what it does in a line). The function is called like the command, or like
# the last part of the module's name.
COMMANDS = {
    "demo": ("demo", "the main job, start to end, on the embedded base; ends with a page to open"),
    "inspect": ("inspect", "what a LoRA file itself gives away: header, format, ranks, spectrum"),
    "scrub": ("scrub", "keep what other tools need of a header, drop what tells of the data"),
    "convert": ("convert", "write a LoRA for another tool: diffusers, peft or kohya"),
    "split": ("split", "divide pictures at random into members and non-members"),
    "train": ("train", "fine-tune a base on a folder of pictures"),
    "sample": ("sample", "draw pictures with a base and a LoRA"),
    "audit": (
        "audit",
        "what a LoRA or a fine-tuned model gives away: a page to read and a file for machines",
    ),
    "zoo": ("zoo", "many LoRAs of known subjects: build"),
    "inverter": ("inverter", "the network that reads LoRAs: train"),
    "guard": (
        "guard",
        "freeze what a forbidden domain needs: learn, apply, train, verify, evaluate",
    ),
    "bench": ("bench", "measure: the tables of bench/, in a checkout"),
    "list": (
        "listing",
        "attacks, methods, decoders, guards and metrics, with paper, access needed and cost",
    ),
    "doctor": ("doctor", "is everything here that diffward needs?"),
    "cite": ("cite", "the papers behind what diffward does"),
}
# Commands that have commands of their own.
GROUPS = {
    "inverter": {
        "train": ("inverter.train", "from a zoo: a network that reads LoRAs"),
    },
    "zoo": {
        "build": ("zoo.build", "train many LoRAs of known subjects, resumable"),
    },
    "guard": {
        "learn": ("guard.learn", "from two domains: which tensors to freeze, or how to edit them"),
        "apply": ("guard.apply", "a guarded base to publish, or a mask in diffward's format"),
        "train": ("guard.train", "fine-tune a base under a mask; all options of diffward train"),
        "verify": ("guard.verify", "did a fine-tuned model keep to the mask? exit code 1 if not"),
        "evaluate": ("guard.evaluate", "what attackers still can do: a page to read, and JSON"),
    },
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
    name, args = find(args)
    if name in GROUPS:
        print(overview(name))
        raise SystemExit(0)
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
    except Exception as error:
        if (told := _told(error)) is None:
            raise
        _fail(f"diffward {name}: {told}")


def find(args: list[str]) -> tuple[str, list[str]]:
    """The command that a command line names (`guard learn`; `guard` for help on it), and its arguments."""
    name, *rest = args
    if name not in COMMANDS:
        _fail(f"diffward: unknown command {name!r}; known: {', '.join(COMMANDS)}")
    if name not in GROUPS or not rest or rest[0] in ("-h", "--help", "help"):
        return name, rest
    inner, *rest = rest
    if inner not in GROUPS[name]:
        _fail(f"diffward {name}: unknown command {inner!r}; known: {', '.join(GROUPS[name])}")
    return f"{name} {inner}", rest


def _run(name: str, args: list[str]) -> int:
    from diffward.commands.cli import call

    return int(call(command(name), f"diffward {name}", args) or 0)


def command(name: str) -> Callable[..., int | None]:
    """The function behind a command: `train`, `guard train`."""
    group, _, inner = name.rpartition(" ")
    path = (GROUPS[group] if group else COMMANDS)[inner][0]
    module = importlib.import_module(f"diffward.commands.{path}")
    function: Callable[..., int | None] = getattr(module, path.rpartition(".")[2])
    return function


def overview(group: str = "") -> str:
    """All commands, or those of a group, in a line each."""
    commands = GROUPS[group] if group else COMMANDS
    program = f"diffward {group}".strip()
    what = "know what your fine-tuned diffusion model gives away, before you share it."
    width = max(map(len, commands))
    lines = [f"  {name.ljust(width)}  {told}" for name, (_, told) in commands.items()]
    return "\n".join(
        [f"{program}: {COMMANDS[group][1] if group else what}", "",
         f"usage: {program} COMMAND [options]; {program} COMMAND --help says more", "", *lines]
    )  # fmt: skip


def _told(error: Exception) -> str | None:
    """What to say of an error that is the machine's, not ours; None of one that is ours."""
    text = str(error)
    # How torch and safetensors say that the disk is full.
    unwritten = ("inline_container", "iostream error", "Error while serializing")
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "make room on the disk" if full else "check the path and its rights"
        return f"{where}{error.strerror or error}; {hint}"
    if any(words in text for words in unwritten) and "StreamReader" not in text:
        return f"cannot write a file ({text[:120]}); nothing is half-written: make room on the disk"
    if isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "not enough memory" in text
    ):
        return "out of memory; lower --batch or --resolution"
    return None


def _fail(message: str, code: int = 2) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
