"""Test every registered compressor in a model: training, saving, loading and cost."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.cost.estimate import CostModel, Prompt
from llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.compressors import COMPRESSORS
from tests.llava_mini.compress import build, configure, random_inputs

every_compressor = pytest.mark.parametrize("name", sorted(COMPRESSORS))


def batch_of_three(sample, visual):
    """Return three images with their questions; `visual` placeholders each."""
    rows = [sample(visual, 6, seed) for seed in range(3)]
    return {"input_ids": torch.stack([ids for ids, _ in rows]), "pixel_values": torch.stack([x for _, x in rows])}


@every_compressor
@pytest.mark.parametrize("before", [True, False])
def test_model_after_two_training_steps_saves_and_loads_unchanged(name, before, tiny_mini, sample, tmp_path):
    """Two steps, because an output map that starts at zero passes no gradient on in the first."""
    model = tiny_mini(compressor=name, compress_before_projection=before)
    batch = batch_of_three(sample, 4)
    labels = batch["input_ids"].where(torch.arange(10) > 6, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = {key: p.clone() for key, p in model.named_parameters()}
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, start[key])}
    assert {key for key in start if ".compressor." in key} <= moved
    model.eval().save_pretrained(tmp_path)

    torch.manual_seed(1)  # loading must not draw parameters again
    loaded, info = LlavaMiniForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    generated = (m.generate(**batch, max_new_tokens=5, do_sample=False) for m in (model, loaded))
    assert torch.equal(*generated)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, loaded(**batch).logits)


@every_compressor
def test_from_llava_same_seed_gives_same_compressor(name, tiny_llava):
    """transformers first builds the module on the meta device, as `from_pretrained` does."""
    llava = tiny_llava()

    def compressor_parameters(seed):
        torch.manual_seed(seed)
        model = LlavaMiniForConditionalGeneration.from_llava(llava, compressor=name, prefusion_layers=0)
        return model.model.compressor.state_dict()

    first, again, other = (compressor_parameters(seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not first or any(not torch.equal(first[key], other[key]) for key in first)
    assert all(value.isfinite().all() for value in first.values())


def test_random_permutation_loaded_in_another_dtype_stays_unchanged(tiny_mini, tmp_path):
    model = tiny_mini(compressor="random")
    order = model.model.compressor.order
    assert sorted(order.tolist()) == list(range(16))
    model.save_pretrained(tmp_path)
    loaded = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16, compressor_size=3)
    assert loaded.model.compressor.order.dtype == torch.long
    assert torch.equal(loaded.model.compressor.order, order)


def test_nested_query_checkpoint_loads_at_smaller_size(tiny_mini, sample, tmp_path):
    model = tiny_mini(compressor="nested_query", prefusion_layers=0)
    model.save_pretrained(tmp_path)
    loaded, info = LlavaMiniForConditionalGeneration.from_pretrained(
        tmp_path, compressor_size=1, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    with torch.no_grad():
        four, one = (m(**batch_of_three(sample, n)).image_hidden_states for m, n in ((model, 4), (loaded, 1)))
    torch.testing.assert_close(one, four[::4])
    assert loaded.generate(**batch_of_three(sample, 1), max_new_tokens=3, min_new_tokens=3).shape == (3, 10)


def test_nested_query_in_training_does_not_depend_on_frames_per_chunk(tiny_mini, sample):
    model = tiny_mini(compressor="nested_query").train()
    losses = []
    for model.config.frames_per_chunk in (1, 2, 32):
        torch.manual_seed(0)
        losses.append(model(**batch_of_three(sample, 4)).logits)
    torch.testing.assert_close(losses[0], losses[2])
    torch.testing.assert_close(losses[1], losses[2])


@every_compressor
def test_estimate_of_compressor_equals_counted_flops(name):
    size = 3
    model = CostModel(configure(name, size))
    work = model(Prompt(text=5)).components["compressor"]
    compressor = build(name, size)
    arguments = random_inputs(compressor, batch=1)
    arguments["features"] = arguments["features"][:, : model.patches]  # fewer if the image is encoded at a smaller size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        compressor(**arguments)
    assert work.flops("full") == counter.get_total_flops()


W, N, P, T = 32, 4, 36, 5  # width, tokens, patches, text tokens of width 24


@pytest.mark.parametrize(
    ("name", "linear", "other"),
    [
        ("uniform", 0, 0),
        ("random", 0, 0),
        ("average", 0, N * P * W),
        ("pixel_shuffle", N * (P // N * W) * W, 0),
        ("nested_query", (2 * N + 2 * P) * W * W, 2 * N * P * W),
        ("token_packer", (3 * N + 6 * P) * W * W, 3 * N * P * W),
        ("qformer", 2 * (4 * N + 2 * N + 2 * P + 8 * N) * W * W, 2 * (2 * N * N + 2 * N * P) * W),
        ("conv", 3 * ((P + N) * (2 * W * W + 9 * W) + 2 * 2 * W * W // 4) + N * W * W, N * P * W),
        ("prumerge", 0, 2 * N * P * W),
        ("visionzip", 0, N * P * W + 33 * W // 2),  # 33 patches against one target, in the width of one of two heads
        ("llama_vid", (T * 24 + P * W + W) * W, (T + N) * P * W),
        # rounds that leave 18, 9, 5 and 4
        ("tome", 0, (18 * 18 + 18 * P + 9 * 9 + 9 * P + 5 * 4 + 5 * P + 3 * 2 + 4 * P) * W),
    ],
)
def test_estimate_of_compressor_equals_closed_form(name, linear, other):
    """The table counts multiplications; a FLOP counter counts each as two."""
    work = CostModel(configure(name)).compressor_flops(P, T)
    assert (work.linear, work.other) == (2 * linear, 2 * other)


@every_compressor
def test_model_image_in_tiles_gives_tokens_of_stitched_grid(name, tiny_mini, sample):
    """With 2 x 2 tiles and the whole image, the compressor gets a grid of twice the side."""
    model = tiny_mini(compressor=name)
    ids, _ = sample(4, 6)
    crops = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[None], "pixel_values": crops, "visual_layout": torch.tensor([[0, 1, 2]])}
    if name == "pixel_shuffle":
        with pytest.raises(ValueError, match=r"pixel_shuffle .*tiles"):
            model(**batch)
        return
    tokens = model(**batch).image_hidden_states
    assert tokens.shape == (4, 24)
    changed = model(**batch | {"pixel_values": crops.index_fill(0, torch.tensor(3), 0.0)}).image_hidden_states
    assert not torch.equal(changed[3], tokens[3])  # the last token changes with the tile under it


@pytest.mark.parametrize("name", ["conv", "pixel_shuffle", "random", "token_packer"])
@pytest.mark.parametrize("vision", ["siglip", "dinov2"])
def test_model_other_vision_tower_gives_tokens(name, vision, tiny_mini, sample):
    """These compressors read the vision tower's sizes from its configuration."""
    model = tiny_mini(vision=vision, compressor=name, compressor_size=4)
    assert model(**batch_of_three(sample, 16)).image_hidden_states.shape == (48, 24)


@every_compressor
def test_model_image_below_vision_tower_size_gives_tokens(name, tiny_mini, sample):
    """DINOv2 resizes its position table, so images of 3 x 3 patches pass through a tower for 4 x 4."""
    model = tiny_mini(vision="dinov2", compressor=name)
    batch = batch_of_three(sample, 4)
    batch["pixel_values"] = batch["pixel_values"][..., :18, :18]
    if name == "pixel_shuffle":
        with pytest.raises(ValueError, match="for a 4 x 4 grid of patches, got 3 x 3"):
            model(**batch)
        return
    prefusion_patches = []
    model.model.prefusion.register_forward_pre_hook(lambda module, args: prefusion_patches.append(args[0]))
    assert model(**batch).image_hidden_states.shape == (12, 24)
    positions, _ = model.prefusion_positions(**batch)
    assert ((positions < -1).sum(dim=1) == prefusion_patches[0].shape[1]).all()
