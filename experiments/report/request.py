"""What a report was asked for on the command line: experiments by name, and settings that narrow their cells down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.records.files import Records, chosen
from experiments.records.views import flatten
from experiments.report.experiment_specs import Definition


@dataclass(frozen=True)
class Asked:
    """`experiments` by name, () for all; `settings` by dotted key as they were written."""

    experiments: tuple[str, ...]
    settings: Mapping[str, Any]

    def definitions(self, known: Sequence[Definition]) -> tuple[Definition, ...]:
        """The definitions asked for, in the order asked.

        Raises:
            ValueError: if one is not known.
        """
        by_name = {definition.name: definition for definition in known}
        for name in self.experiments:
            if name not in by_name:
                raise ValueError(f"experiment: no table '{name}'; there are {', '.join(by_name)}")
        return tuple(by_name[name] for name in self.experiments) if self.experiments else tuple(known)

    def records(self, records: Records) -> Records:
        """The records whose configurations have all settings asked for. A group is asked for by its name: model=tiny.

        Raises:
            ValueError: if none has one.
        """
        kept = [(record, dict(flatten(record["config"]))) for record in (*records.finished, *records.failed)]
        for key, value in self.settings.items():
            full = key if any(key in config for _, config in kept) else f"{key}.name"
            found = sorted({str(config[full]) for _, config in kept if full in config})
            kept = [(record, config) for record, config in kept if config.get(full) == value]
            if not kept:
                there = f"; found {', '.join(found)}" if found else ""
                raise ValueError(f"{key}={value}: no record has it{there}")
        return chosen(records, (record for record, _ in kept)) if self.settings else records


def parse(words: Sequence[str]) -> Asked:
    """What `experiment=table6_prefusion,table8_compression train.steps=60` asks for.

    Raises:
        ValueError: if a word is no setting.
    """
    experiments: list[str] = []
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not (key and equals and text):
            raise ValueError(
                f"'{word}' is no setting; write KEY=VALUE, as experiment=table6_prefusion or train.steps=60"
            )
        if key == "experiment":
            experiments += text.split(",")
            continue
        try:
            settings[key] = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(f"'{word}' is no setting: {str(error).splitlines()[0]}") from None
    return Asked(tuple(dict.fromkeys(experiments)), settings)
