"""Checks of a configuration's fields."""

from __future__ import annotations

from typing import Any


def choice(field: str, value: Any, accepted: tuple[Any, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``accepted``; by type as well, because 1 == True."""
    if not any(type(value) is type(a) and value == a for a in accepted):
        raise ValueError(f"{field}: got {value!r}; accepted are {', '.join(map(repr, accepted))}")


def is_number(value: Any) -> bool:
    """Whether ``value`` is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def positive(field: str, value: Any) -> None:
    """Raise unless ``value`` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field}: got {value!r}; accepted is an int of at least 1")
    if value < 1:
        raise ValueError(f"{field}: got {value}; accepted is an int of at least 1")


def layer_numbers(field: str, value: Any) -> tuple[int, ...]:
    """``value`` as sorted layer numbers, each once; raises for what are none."""
    try:
        layers = tuple(value)
    except TypeError:
        raise TypeError(f"{field}: got {value!r}; accepted is a list of layer numbers") from None
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers):
        raise ValueError(f"{field}: got {value!r}; accepted are layer numbers counted from 0")
    return tuple(sorted(set(layers)))
