"""The list of settings: the page docs/settings.md, and `--help`."""

from pathlib import Path

from omegaconf import OmegaConf

from experiments.config.data_schema import DATA
from experiments.config.documentation import help_text, markdown, settings
from experiments.config.schema import MODELS, BenchConfig, Config, CostConfig

PAGE = Path(__file__).resolve().parents[3] / "docs" / "settings.md"


def leaves(config, prefix=""):
    """Yield the dotted name of every setting below a configuration."""
    for key in config:
        node = None if OmegaConf.is_missing(config, key) else config[key]
        if OmegaConf.is_dict(node):
            yield from leaves(node, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_markdown_equals_the_page_in_docs():
    assert PAGE.read_text() == markdown()


def test_settings_have_a_help_text_of_one_line():
    for entry in settings():
        assert entry.help.strip() == entry.help, entry.key
        assert entry.help, entry.key
        assert "\n" not in entry.help, entry.key


def test_settings_cover_every_schema():
    """Every setting that a configuration can have is listed, under its dotted name."""
    keys = {entry.key for entry in settings()}
    nested_training = ("model.vision_pretraining.", "model.caption_pretraining.")
    for name, alternatives in (
        ("model", MODELS),
        ("data", DATA),
        ("bench", {"": BenchConfig}),
        ("cost", {"": CostConfig}),
    ):
        for schema in alternatives.values():
            for key in leaves(OmegaConf.structured(schema), f"{name}."):
                group = next((group for group in nested_training if key.startswith(group)), None)
                assert (f"{group}*" if group else key) in keys
    for key in leaves(OmegaConf.structured(Config)):
        assert key in keys or key in ("model", "data", "bench", "cost")


def test_settings_are_listed_once_with_the_schemas_that_have_them():
    entries = settings()
    assert len({(entry.key, entry.only) for entry in entries}) == len(entries)
    only = {entry.key: entry.only for entry in entries}
    assert only["model.path"] == "checkpoint"
    assert only["model.name"] == only["data.name"] == only["train.max_steps"] == ""
    assert {entry.only for entry in entries if entry.key == "data.frames"} == {"shapes_video", "llava_json", "lmms"}


def test_settings_show_type_and_default():
    entries = {entry.key: entry for entry in settings()}
    assert (entries["train.max_steps"].type, entries["train.max_steps"].default) == ("int", "0")
    assert entries["model.path"].default == "???"
    assert entries["save"].default == "null"
    assert entries["reduction.layers"].default == "[]"
    assert entries["model.vision_pretraining.*"].default == "as train.*"


def test_help_text_has_one_line_for_each_setting():
    lines = help_text().splitlines()
    assert len(lines) == len(settings())
    for line, entry in zip(lines, settings(), strict=True):
        assert line.startswith(f"{entry.key}={entry.default}  # {entry.help}")
