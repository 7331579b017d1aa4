"""Report requests: the experiments and settings that select what a report covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config.plain import flatten_config
from experiments.config.renamed_keys import current_name
from experiments.records.files import Records, select_records
from experiments.report.experiment_specs import ExperimentSpec

_RESULTS = "results="


@dataclass(frozen=True)
class ReportRequest:
    """What a report covers.

    Args:
        experiments: Names of experiments, () for all.
        settings: Required settings by dotted key, as the user wrote them.
    """

    experiments: tuple[str, ...]
    settings: Mapping[str, Any]

    def select_specs(self, specs: Sequence[ExperimentSpec]) -> tuple[ExperimentSpec, ...]:
        """Return the requested specs, in the requested order.

        Args:
            specs: All specs of the project.

        Raises:
            ValueError: if a requested experiment has no spec.
        """
        by_name = {spec.name: spec for spec in specs}
        for name in self.experiments:
            if name not in by_name:
                raise ValueError(f"experiment: there is no table '{name}'; choose from {', '.join(by_name)}")
        return tuple(by_name[name] for name in self.experiments) if self.experiments else tuple(specs)

    def select_records(self, records: Records) -> Records:
        """Return the records whose configurations have all requested settings.

        The name of a config group selects by that name: model=tiny means model.name=tiny. Old names of renamed settings
        work too.

        Args:
            records: The records of a results folder.

        Raises:
            ValueError: if no record has a requested setting.
        """
        selected = [(record, dict(flatten_config(record["config"]))) for record in (*records.finished, *records.failed)]
        for name, value in self.settings.items():
            key = current_name(name)
            full_key = key if any(key in config for _, config in selected) else f"{key}.name"
            values = sorted({str(config[full_key]) for _, config in selected if full_key in config})
            selected = [(record, config) for record, config in selected if config.get(full_key) == value]
            if not selected:
                recorded = f"; recorded values: {', '.join(values)}" if values else ""
                raise ValueError(f"{name}={value}: no record has this setting{recorded}")
        return select_records(records, (record for record, _ in selected)) if self.settings else records


def split_results(words: Sequence[str], option: Path | None) -> tuple[Path, list[str]]:
    """Take results=FOLDER out of the words of a request.

    Args:
        words: One KEY=VALUE each. The folder may be quoted, and may hold interpolations such as ${oc.env:HOME}. Of several
            the last counts.
        option: The value of --results, None if it was not given.

    Returns:
        The results folder ("results" by default), and the other words.

    Raises:
        ValueError: if the folder is empty or cannot be resolved, or if both ways name different ones.
    """
    others = [word for word in words if not word.startswith(_RESULTS)]
    given = [word.removeprefix(_RESULTS) for word in words if word.startswith(_RESULTS)]
    if not given:
        return option or Path("results"), others
    text = given[-1].strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    try:
        folder = str(OmegaConf.create({"folder": text})["folder"])
    except OmegaConfBaseException as error:
        raise ValueError(f"{_RESULTS}{given[-1]}: {str(error).splitlines()[0]}") from None
    if folder in ("", "null", "None"):
        raise ValueError(f"'{_RESULTS}{given[-1]}' names no folder; write results=FOLDER")
    if option is not None and option != Path(folder):
        raise ValueError(f"--results {option} and results={folder} name two folders; leave out one of them")
    return Path(folder), others


def parse_request(words: Sequence[str]) -> ReportRequest:
    """Parse words such as "experiment=table6_prefusion,table8_compression" and "train.max_steps=60".

    Args:
        words: One KEY=VALUE each; `experiment` may list several names, separated by commas.

    Raises:
        ValueError: if a word is not KEY=VALUE.
    """
    experiments: list[str] = []
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not (key and equals and text):
            raise ValueError(
                f"'{word}' is not a setting; write KEY=VALUE, such as experiment=table6_prefusion or train.max_steps=60"
            )
        if key == "experiment":
            experiments += text.split(",")
            continue
        try:
            settings[key] = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(f"'{word}' is not a setting: {str(error).splitlines()[0]}") from None
    return ReportRequest(tuple(dict.fromkeys(experiments)), settings)
