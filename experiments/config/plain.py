"""TODO"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config.schema import DATA, MODELS, Config

_NOT_RECORDED = ("rows", "row", "retry_failed")


def resolved(config: Config | DictConfig) -> dict[str, Any]:
    """Plain containers with every interpolation resolved, of a configuration whose row has been chosen.

    Raises:
        omegaconf.MissingMandatoryValue: if a field that has no default was not given.
    """
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in _NOT_RECORDED}


def typed(plain: dict[str, Any]) -> Config:
    """The configuration that `resolved` gave these containers of: what a record holds becomes what ran. Settings that a
    record lacks have their defaults.

    Raises:
        ValueError: if there are settings that this version does not know.
    """
    schema = OmegaConf.structured(Config)
    for part, kinds in (("model", MODELS), ("data", DATA)):
        given = set(plain.get(part, {}))
        kind = next((kind for kind in kinds.values() if given <= {field.name for field in fields(kind)}), None)
        if kind is None:
            raise ValueError(f"{part}: no kind of it has the settings {', '.join(sorted(given))}")
        schema[part] = kind
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema, plain))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"not a configuration of this version: {str(error).splitlines()[0]}") from error
