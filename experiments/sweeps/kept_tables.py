"""Tables that the project does not ship: a run keeps their rows beside the records, where the report finds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf

from experiments.config.rows import read_rows
from experiments.config.schema import Config
from experiments.files import write_atomically
from experiments.report.experiment_specs import KEPT_SPECS, first_comment_sentence, shipped_rows
from experiments.sweeps.hydra_api import parse_overrides
from experiments.sweeps.store import RecordStore


@dataclass(frozen=True)
class KeptTable:
    """The rows of a table as a run read them.

    Attributes:
        name: Name of the table, which its records hold as their experiment.
        text: YAML text with title, name and rows; None if the project ships this table.
    """

    name: str
    text: str | None

    def keep(self, results: str | Path) -> None:
        """Write the table into a results folder, and remove an older one of a name whose rows are now the project's.

        Args:
            results: The results folder.

        Raises:
            ResultsFolderError: If the folder cannot be written.
        """
        path = Path(results) / KEPT_SPECS / f"{self.name}.yaml"
        if self.text is None:
            path.unlink(missing_ok=True)
        elif not path.is_file() or path.read_text(encoding="utf-8") != self.text:
            RecordStore(results).prepare()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, self.text)


def table_of(config: DictConfig, overrides: Sequence[str], sources: Iterable[Any]) -> KeptTable | None:
    """Return the table that a configuration runs a row of.

    Args:
        config: The composed configuration, with its rows.
        overrides: The overrides that it was composed with.
        sources: Hydra's configuration sources (`hydra.runtime.config_sources`), to find the title of the table.

    Returns:
        The table, or None if the configuration selects no row.

    Raises:
        ValueError: If the rows are malformed, or the name cannot name a file.
    """
    if config.row is None or not config.rows:
        return None
    chosen = _chosen_experiment(overrides)
    name = str(config.name if config.name != Config.name or not chosen else chosen.replace("/", "_"))
    if Path(name).name != name:
        raise ValueError(f"name: '{name}' cannot name the files of a table; leave out '/'")
    rows = _plain_rows(config)
    if tuple(read_rows(name, rows)) == shipped_rows(name):
        return KeptTable(name, None)
    title = _title(chosen, sources) or name
    body = yaml.safe_dump({"name": name, "rows": rows}, sort_keys=False, width=1000)
    return KeptTable(name, f"# {title}\n{body}")


def _plain_rows(config: DictConfig) -> Any:
    """Return the rows with their interpolations, which differ from model to model, but without environment variables."""
    rows: Any = OmegaConf.to_container(config.rows, resolve=False)
    for number, row in enumerate(rows):
        for key, value in row.items():
            if "${oc.env:" in str(value):
                row[key] = OmegaConf.to_container(config.rows[number], resolve=True)[key]  # type: ignore[index, call-overload]
    return rows


def _chosen_experiment(overrides: Sequence[str]) -> str:
    values = [o.value() for o in parse_overrides(overrides) if o.key_or_group == "experiment"]
    return values[-1] if values and isinstance(values[-1], str) else ""


def _title(experiment: str, sources: Iterable[Any]) -> str:
    """Return the first sentence of the comment in an experiment's file, "" if Hydra did not read it from a file."""
    for source in sources:
        if source.schema not in ("file", "pkg"):
            continue
        try:
            folder = Path(source.path) if source.schema == "file" else resources.files(source.path.replace("/", "."))
            text = folder.joinpath("experiment", f"{experiment}.yaml").read_text(encoding="utf-8")
        except (OSError, ImportError, UnicodeDecodeError):
            continue
        return first_comment_sentence(text)
    return ""
