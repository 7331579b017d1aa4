"""TODO"""

from __future__ import annotations

from dataclasses import fields
from typing import Any


def request(arguments: list[str], kind: Any) -> Any:
    """The options of a `kind`, from `key=value` words. Raises ValueError for a word that is none, or an unknown key."""
    known = [field.name for field in fields(kind)]
    given = dict(word.partition("=")[::2] for word in arguments)
    for key in given:
        if key not in known:
            raise ValueError(f"no option {key!r}: use {', '.join(known)}, each as {known[0]}=VALUE")
    return kind(**given)


def whole(name: str, text: str) -> int:
    if not text.isdecimal() or (name != "prefusion" and int(text) == 0):
        raise ValueError(f"{name}: {text!r} is no whole number{'' if name == 'prefusion' else ' above 0'}")
    return int(text)
