"""Changing what vLLM's own classes do, where it has no place for a plugin."""

import functools
from collections.abc import Callable
from typing import Any


def wrap_once(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Have a method of `owner` run as `around(inner, self, ...)`, with `inner` the method as it was.

    Safe to call again with the same function, which wraps the method only once.
    """
    inner: Any = getattr(owner, name)
    if getattr(inner, "semiopen_around", None) is around:
        return

    @functools.wraps(inner)
    def wrapper(self: Any, *arguments: Any, **named: Any) -> Any:
        return around(inner, self, *arguments, **named)

    setattr(wrapper, "semiopen_around", around)  # noqa: B010 - a function has no such attribute for type checkers
    setattr(owner, name, wrapper)
