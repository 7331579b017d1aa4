"""Fields of the schema: a default, a help text, and bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from omegaconf import MISSING


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field with a help text, as transformers' HfArgumentParser has them.

    Args:
        default: The default value. A list is copied for each configuration; `MISSING` marks a required setting.
        help: One line that says what the setting is, with its unit.
    """
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def group(config: type, help: str) -> Any:
    """Return a dataclass field that holds a group of settings with their defaults."""
    return field(default_factory=config, metadata={"help": help})


def require_at_least(prefix: str, config: Any, bounds: Mapping[str, float]) -> None:
    """Check lower bounds of settings.

    Args:
        prefix: The settings' group, for the message: "train"; "" for settings outside a group.
        config: The object that holds them.
        bounds: The least value of each setting. A list is checked entry by entry; a missing value is not checked.

    Raises:
        ValueError: If a value is below its bound.
    """
    for name, bound in bounds.items():
        value = getattr(config, name)
        for number in value if isinstance(value, list) else [value]:
            if number != MISSING and not number >= bound:
                setting_name = f"{prefix}.{name}" if prefix else name
                raise ValueError(f"{setting_name}: must be at least {bound}, found {number}")


def require_entries(prefix: str, config: Any, names: Sequence[str]) -> None:
    """Check that lists have entries.

    Args:
        prefix: The settings' group, for the message.
        config: The object that holds them.
        names: The settings.

    Raises:
        ValueError: If a list is empty.
    """
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"{prefix}.{name}: must have at least one entry, found {getattr(config, name)}")
