"""From a function's signature to its command line and its YAML schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, NoReturn, get_type_hints

import jsonargparse

from diffward.errors import InputError


class _Parser(jsonargparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        text = " ".join(str(message).split())
        raise InputError(f"{text} (see {self.prog} --help)")


def call(function: Callable[..., Any], program: str, args: list[str]) -> Any:
    """Parse `args` by the signature of `function` and call it."""
    return function(**parse(function, program, args))


def parse(function: Callable[..., Any], program: str, args: list[str]) -> dict[str, Any]:
    """The keyword arguments that a command line gives to `function`.

    Parameters without default are positional; a dataclass parameter is spread into plain options;
    `--config FILE.yaml` reads options from a file. `--fail-above` and `--fail_above` are the same.
    """
    doc = (inspect.getdoc(function) or "").strip()
    parser = _Parser(prog=program, description=doc.split("\n\n")[0], default_env=False)
    parser.add_argument("--config", action="config", help="YAML file with options")
    spread: dict[str, Any] = {
        name: kind
        for name, kind in get_type_hints(function).items()
        if is_dataclass(kind) and name != "return"
    }
    parser.add_function_arguments(
        function, as_positional=True, as_group=False, skip=set(spread), sub_configs=False
    )
    for kind in spread.values():
        parser.add_class_arguments(kind, as_group=False)
    flags = {
        name
        for signature in (
            inspect.signature(function),
            *(inspect.signature(kind) for kind in spread.values()),
        )
        for name, parameter in signature.parameters.items()
        if parameter.annotation in (bool, "bool")
    }
    config = parser.parse_args(_switched([_underscored(a) for a in args], flags))
    config.pop("config", None)
    values = dict(config.as_dict())
    for name, kind in spread.items():
        fields = kind.__dataclass_fields__
        values[name] = kind(**{field: values.pop(field) for field in fields})
    return values


def _underscored(arg: str) -> str:
    """`--fail-above=x` to `--fail_above=x`; values are left alone."""
    if not arg.startswith("--") or arg == "--":
        return arg
    name, equals, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _switched(args: list[str], flags: set[str]) -> list[str]:
    """A bare `--thumbnails` is `--thumbnails=true`."""
    words = ("true", "false", "yes", "no")
    followed = [*args[1:], ""]
    return [
        f"{arg}=true"
        if arg[2:] in flags and arg.startswith("--") and after.lower() not in words
        else arg
        for arg, after in zip(args, followed, strict=False)
    ]
