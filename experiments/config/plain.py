"""Configurations as plain containers, which records hold, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config.data_schema import DATA
from experiments.config.schema import MODELS, Config

_NOT_RECORDED = ("rows", "row", "retry_failed")


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a nested configuration with their dotted names.

    Example:
        >>> dict(flatten_config({"train": {"max_steps": 60}, "seed": 0}))
        {'train.max_steps': 60, 'seed': 0}
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten_config(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_plain(config: Config | DictConfig) -> dict[str, Any]:
    """Return a configuration as nested dicts and lists, with every interpolation resolved.

    Args:
        config: A configuration whose table row has been applied.

    Raises:
        omegaconf.MissingMandatoryValue: If a required setting is missing.
    """
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in _NOT_RECORDED}


def unknown_settings(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted settings of a configuration that its schema does not have. Hydra's `+` and `++` can add such.

    Args:
        config: The configuration.
        prefix: The dotted name of its group, with a final dot.
    """
    schema = OmegaConf.get_type(config)
    if not is_dataclass(schema):
        return  # rows and other free-form parts
    names = {field.name for field in fields(schema)}
    for key in map(str, config):
        if key not in names:
            yield f"{prefix}{key}"
        elif OmegaConf.is_dict(config) and not OmegaConf.is_missing(config, key):
            node = config._get_node(key)
            if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
                yield from unknown_settings(node, f"{prefix}{key}.")


def from_plain(plain: dict[str, Any]) -> Config:
    """Return the typed configuration that `to_plain` made these containers of. Missing settings get their defaults.

    Args:
        plain: Nested containers with today's names (`experiments.config.renamed_keys.migrate`).

    Raises:
        ValueError: If there is a setting that this version does not know.
    """
    schema = OmegaConf.structured(Config)
    for group, classes in (("model", MODELS), ("data", DATA)):
        given = set(plain.get(group, {}))
        matching = (each for each in classes.values() if given <= {field.name for field in fields(each)})
        if (config_class := next(matching, None)) is None:
            raise ValueError(f"{group}: no {group} configuration has the settings {', '.join(sorted(given))}")
        schema[group] = config_class
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema, plain))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"not a configuration of this version: {str(error).splitlines()[0]}") from error
