"""The list of all settings, for `--help` and for docs/settings.md: `python -m experiments.config.documentation`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING, OmegaConf

from experiments.config.benchmark_schema import BenchConfig, CostConfig
from experiments.config.data_schema import DATA
from experiments.config.schema import MODELS, Config, TrainConfig
from experiments.markdown import markdown_cell, markdown_table

_ALTERNATIVES: dict[str, dict[str, type]] = {"model": MODELS, "data": DATA}


@dataclass(frozen=True)
class Setting:
    """One setting of the configuration.

    Attributes:
        key: Dotted name, as on the command line.
        type: Its Python type.
        default: Its default as YAML, "???" if it is required.
        help: One line that says what it is.
        only: The schemas that have it ("checkpoint"), "" for all.
    """

    key: str
    type: str
    default: str
    help: str
    only: str = ""


def settings() -> list[Setting]:
    """Return every setting, in the order of the schema."""
    found = []
    for field in dataclasses.fields(Config):
        if field.name in _ALTERNATIVES:
            found += _settings_of_alternatives(field.name)
        elif field.name in ("bench", "cost"):
            found += _settings_of(BenchConfig if field.name == "bench" else CostConfig, f"{field.name}.")
        else:
            found += _settings_of_field(Config, field, "")
    return found


def _settings_of_alternatives(group: str) -> list[Setting]:
    """Return the settings of a group that has several schemas; shared settings come first and once."""
    schemas = {name: _settings_of(config, f"{group}.") for name, config in _ALTERNATIVES[group].items()}
    names: dict[Setting, list[str]] = {}
    for name, entries in schemas.items():
        for entry in entries:
            names.setdefault(entry, []).append(name)
    return [
        dataclasses.replace(entry, only="" if len(having) == len(schemas) else ", ".join(having))
        for entry, having in sorted(names.items(), key=lambda item: len(item[1]) < len(schemas))
    ]


def _settings_of(config: type, prefix: str) -> list[Setting]:
    return [entry for field in dataclasses.fields(config) for entry in _settings_of_field(config, field, prefix)]


def _settings_of_field(config: type, field: dataclasses.Field[Any], prefix: str) -> Iterator[Setting]:
    annotation = get_type_hints(config)[field.name]
    if annotation is TrainConfig and prefix:
        yield Setting(f"{prefix}{field.name}.*", "TrainConfig", "as train.*", field.metadata["help"])
        return
    if dataclasses.is_dataclass(annotation):
        yield from _settings_of(annotation, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        return
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    shown = "???" if default == MISSING else OmegaConf.to_yaml({"value": default}).removeprefix("value: ").strip()
    if isinstance(default, list):
        shown = f"[{', '.join(map(str, default))}]"
    name = re.sub(r"[\w.]+\.(\w+)", r"\1", str(annotation)) if get_args(annotation) else annotation.__name__
    yield Setting(prefix + field.name, name, shown, field.metadata["help"])


def help_text() -> str:
    """Return one line for each setting, for `--help`."""
    lines = []
    for entry in settings():
        only = f" [{entry.only}]" if entry.only else ""
        lines.append(f"{entry.key}={entry.default}  # {entry.help}{only}")
    return "\n".join(lines)


def markdown() -> str:
    """Return the page docs/settings.md."""
    rows = []
    for entry in settings():
        only = f" ({entry.only} only)" if entry.only else ""
        cells = (f"`{entry.key}`", f"`{entry.type}`", f"`{entry.default}`", entry.help + only)
        rows.append([markdown_cell(cell) for cell in cells])
    return "\n".join(
        [
            "# Settings",
            "",
            "Every setting of `python -m experiments.run`, as `key=value`. `???` marks a setting without a default.",
            "This page is made by `python -m experiments.config.documentation`.",
            "",
            markdown_table(["setting", "type", "default", "meaning"], rows),
            "",
        ]
    )


def register_help() -> None:
    """Register the resolver `${settings_help:}`, which conf/config.yaml puts into Hydra's `--help`."""
    # Hydra substitutes $NAME in its help texts, so a literal $ is doubled.
    OmegaConf.register_new_resolver("settings_help", lambda: help_text().replace("$", "$$"), replace=True)


if __name__ == "__main__":
    print(markdown(), end="")
