"""Configurations as plain containers, and settings that a schema does not have."""

import pytest
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue

from experiments.config.plain import from_plain, to_plain, unknown_settings


def test_to_plain_resolves_interpolations_and_leaves_out_row_selection(compose_config):
    plain = to_plain(compose_config("model=tiny", "compressor.size=${model.grid}"))
    assert plain["compressor"]["size"] == plain["model"]["grid"] == 6
    assert not {"rows", "row", "retry_failed"} & plain.keys()


def test_to_plain_with_missing_setting_raises(compose_config):
    with pytest.raises(MissingMandatoryValue, match=r"model\.path"):
        to_plain(compose_config("model=checkpoint"))


@pytest.mark.parametrize("model", ["tiny", "scratch", "smol"])
def test_from_plain_of_to_plain_gives_equal_settings(compose_config, model):
    photos = ["data.photos=x"] if model == "smol" else []
    plain = to_plain(
        compose_config(f"model={model}", *(["data=photos", *photos] if photos else []), "train.max_steps=7")
    )
    assert to_plain(from_plain(plain)) == plain


def test_unknown_settings_names_additions_at_every_depth(compose_config):
    config = compose_config("model=scratch", "experiment=table6_prefusion", "row=1")
    assert list(unknown_settings(config)) == []
    with open_dict(config):
        OmegaConf.update(config, "first", 1, force_add=True)
        OmegaConf.update(config, "train.second", 2, force_add=True)
        OmegaConf.update(config, "model.vision_pretraining.third", 3, force_add=True)
    assert set(unknown_settings(config)) == {"first", "train.second", "model.vision_pretraining.third"}
