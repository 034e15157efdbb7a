"""What is public is documented: every argument by its name."""

from __future__ import annotations

import inspect
import re

import pytest

import fastadapt as fa

PUBLIC = {f"fa.{name}": getattr(fa, name) for name in fa.__all__}
PUBLIC |= {f"fa.ops.{name}": getattr(fa.ops, name) for name in fa.ops.__all__}
CALLED = {name: thing for name, thing in PUBLIC.items() if inspect.isclass(thing) or inspect.isfunction(thing)}


def documented(thing) -> set[str]:
    """The names that have an entry under Args or Attributes, of a class those of what it inherits from too."""
    owners = [c for c in thing.__mro__ if c.__module__.startswith("fastadapt.")] if inspect.isclass(thing) else [thing]
    docs = [inspect.getdoc(c) or "" for c in owners]
    docs += [inspect.getdoc(c.__init__) or "" for c in owners if inspect.isclass(c) and "__init__" in vars(c)]
    found: set[str] = set()
    for doc in docs:
        for section in re.findall(r"^(?:Args|Attributes):\n((?:(?: .*)?(?:\n|\Z))*)", doc, re.MULTILINE):
            for names in re.findall(r"^ {4}(\w+(?:, \w+)*):", section, re.MULTILINE):
                found |= set(names.split(", "))
            found |= set(re.findall(r"``(\w+)``:", section))  # beside another, as in bottleneck's
    return found


@pytest.mark.parametrize("name", CALLED)
def test_every_argument_is_documented(name):
    missing = [p for p in inspect.signature(CALLED[name]).parameters if p not in documented(CALLED[name])]
    assert not missing, f"{name} says nothing about {', '.join(missing)}"
