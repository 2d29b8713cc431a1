"""A tiny registry: a decorator, a clash error, and a listing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from diffward.errors import InputError

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered thing: what it is called, where it is from, what it needs, what it costs."""

    name: str
    obj: T
    summary: str
    paper: str = ""
    access: str = ""
    cost: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


class Registry(Generic[T]):
    """Named callables of one kind. `role` is the word used in messages ("attack", "method")."""

    def __init__(self, role: str) -> None:
        self.role = role
        self._entries: dict[str, Entry[T]] = {}

    def register(
        self, name: str, *, paper: str = "", access: str = "", cost: str = "", **extra: Any
    ) -> Callable[[T], T]:
        """Decorator. The first line of the docstring becomes the summary."""

        def decorate(obj: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.role} {name!r} is registered twice")
            doc = (obj.__doc__ or "").strip()
            if not doc:
                raise ValueError(f"{self.role} {name!r} needs a docstring")
            self._entries[name] = Entry(name, obj, doc.splitlines()[0], paper, access, cost, extra)
            return obj

        return decorate

    def __getitem__(self, name: str) -> Entry[T]:
        try:
            return self._entries[name]
        except KeyError:
            known = ", ".join(self._entries) or "none"
            raise InputError(f"unknown {self.role} {name!r}; known: {known}") from None

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return list(self._entries)
