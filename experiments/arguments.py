"""Command lines of `key=value` words, for programs that need no Hydra."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any


def parse_arguments(words: list[str], options: type, description: str | None) -> Any:
    """Return an options object from a command line. With -h or --help, print the options and end the program.

    Args:
        words: `key=value` words.
        options: A dataclass whose fields are strings.
        description: What --help prints above the options.

    Raises:
        ValueError: If a word is not of this form, or names no field.
    """
    names = [field.name for field in fields(options)]
    if {"-h", "--help"} & set(words):
        defaults = "\n".join(f"  {field.name}={field.default}" for field in fields(options))
        print(f"{description or ''}\nOptions and their defaults:\n{defaults}")
        sys.exit(0)
    given = dict(word.partition("=")[::2] for word in words)
    for key in given:
        if key not in names:
            raise ValueError(f"no option {key!r}: use {', '.join(names)}, each as {names[0]}=VALUE")
    return options(**given)


def parse_count(name: str, text: str) -> int:
    """Return a whole number: at least 0 for `prefusion`, at least 1 for other options.

    Args:
        name: The option, for the message.
        text: Its value on the command line.

    Raises:
        ValueError: If it is not such a number.
    """
    if not text.isdecimal() or (name != "prefusion" and int(text) == 0):
        raise ValueError(f"{name}: {text!r} is no whole number{'' if name == 'prefusion' else ' above 0'}")
    return int(text)
