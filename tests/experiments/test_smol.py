"""The adapter that ships with the project fits the model that its configuration names, and its card says what was measured."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from experiments.files import ASSETS
from experiments.models import lora
from experiments.records.files import load_records
from experiments.records.views import parse_outcomes

SMOL = ASSETS / "smol_grids"
RECORDS = ASSETS.parents[1] / "results" / "smol" / "training" / "records"


@pytest.fixture(scope="module")
def model():
    """DINOv2-small and SmolLM2-135M's shapes with random weights, and a small vocabulary, which the adapter leaves alone."""
    torch.manual_seed(0)
    language = LlamaConfig(
        vocab_size=64,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    vision = Dinov2Config(hidden_size=384, num_hidden_layers=1, num_attention_heads=6)
    config = LlavaConfig(vision_config=vision, text_config=language, image_token_id=63, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


def test_merge_saved_adapter_changes_exactly_the_trained_weights(model):
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    lora.merge_saved_adapter(model, str(SMOL))
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    linear = re.compile(r"language_model\.layers\.\d+\..*_proj\.weight$")
    expected = {name for name in before if linear.search(name) or "multi_modal_projector" in name}
    assert len(expected) == 30 * 7 + 4
    assert changed == expected
    with safe_open(SMOL / "adapter_model.safetensors", "pt") as stored:
        assert len(stored.keys()) == 2 * 30 * 7 + 4


def test_it_is_small():
    assert sum(path.stat().st_size for path in SMOL.iterdir()) < 40e6


def test_adapter_files_name_no_path_of_one_machine():
    config = json.loads((SMOL / "adapter_config.json").read_text())
    assert not str(config["base_model_name_or_path"]).startswith("/")


def test_card_shows_the_numbers_of_the_record():
    (record,) = (record for record in load_records(RECORDS).finished if record["experiment"] == "smol_stage2")
    card = (SMOL / "README.md").read_text()
    views = {**record["accuracy"], "guess": record["data"]["guess"]}
    shown = [100 * parse_outcomes(views[name]).mean() for name in ("image", "blank", "shuffled", "guess")]
    row = " | ".join(f"{value:.1f}" for value in shown)
    assert f"| **all** | {record['data']['examples']} | {row} |" in card
