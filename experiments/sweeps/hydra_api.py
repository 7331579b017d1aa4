"""TODO"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra import initialize_config_module
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict


@contextmanager
def hydra() -> Iterator[Hydra]:
    """Hydra, at home in conf/."""
    with initialize_config_module("conf", job_name="run", version_base="1.3"):
        yield GlobalHydra.instance().hydra  # type: ignore[misc]


def _compose(
    hydra: Hydra, sweep: DictConfig, job: Sequence[str], composed: dict[tuple[str, ...], DictConfig]
) -> DictConfig:
    """A job's configuration. Those whose files are the same are read from them once and kept in `composed`: it is the
    files that take time."""
    parsed = OverridesParser.create(hydra.config_loader).parse_overrides(list(job))
    values = [
        override
        for override in parsed
        if isinstance(override.value(), dict) or not hydra.config_loader.repository.group_exists(override.key_or_group)
    ]
    files = tuple(text for text, override in zip(job, parsed, strict=True) if override not in values)
    if files not in composed:
        composed[files] = hydra.config_loader.load_sweep_config(sweep, list(files))
        with open_dict(composed[files]):
            del composed[files]["hydra"]
    config = copy.deepcopy(composed[files])
    hydra.config_loader._apply_overrides_to_config(values, config)
    return config
