"""Registration of the schema and of the resolvers with Hydra."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from experiments.config.data_schema import DATA
from experiments.config.documentation import register_help
from experiments.config.rows import register_resolvers
from experiments.config.schema import (
    MODELS,
    CompressorConfig,
    Config,
    PrefusionConfig,
    ProbeConfig,
    ReductionConfig,
    TrainConfig,
)


def register_configs() -> None:
    """Register the schema and the resolvers, under the names that the files in conf/ use."""
    register_resolvers()
    register_help()
    store = ConfigStore.instance()
    store.store("schema", Config)
    groups: dict[str, dict[str, type]] = {
        "model": MODELS,
        "data": DATA,
        "compressor": {"": CompressorConfig},
        "prefusion": {"": PrefusionConfig},
        "reduction": {"": ReductionConfig},
        "train": {"": TrainConfig},
        "probe": {"": ProbeConfig},
    }
    for group, classes in groups.items():
        for name, config in classes.items():
            store.store(f"schema_{name}" if name else "schema", config, group=group)
