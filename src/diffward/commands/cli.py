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
    a dataclass within it keeps its name (`--dp.epsilon`);
    `--config FILE.yaml` reads options from a file. `--fail-above` and `--fail_above` are the same.
    """
    if {"-h", "--help"} & set(args):
        # What stands under a dataclass's field is read from the source: only where it will be shown.
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
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
    flags = set().union(*(_flags(thing) for thing in (function, *spread.values())))
    config = parser.parse_args(_switched([_underscored(a) for a in args], flags))
    config.pop("config", None)
    values = dict(config.as_dict())
    for name, kind in spread.items():
        values[name] = _build(
            kind, {field: values.pop(field) for field in kind.__dataclass_fields__}
        )
    return values


def _build(kind: Any, given: dict[str, Any]) -> Any:
    """A dataclass of its fields' values, those of nested ones as dictionaries."""
    hints = get_type_hints(kind)
    return kind(
        **{k: _build(hints[k], v) if is_dataclass(hints[k]) else v for k, v in given.items()}
    )


def _flags(thing: Any) -> set[str]:
    """Names of the switches of a function or dataclass; `group.name` of those in a nested one."""
    found = set()
    for name in inspect.signature(thing).parameters:
        kind = get_type_hints(thing)[name]
        if kind is bool:
            found.add(name)
        elif is_dataclass(kind):
            found |= {f"{name}.{inner}" for inner in _flags(kind)}
    return found


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
