"""Reduction methods and pre-fusion inside the language model, as cells run them."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from experiments.config.schema import (
    CompressorConfig,
    Config,
    PrefusionConfig,
    ProbeConfig,
    ReductionConfig,
    TrainConfig,
)
from experiments.cost.estimate import CostModel, Prompt
from experiments.data.encoding import Collator, SampleEncoder
from experiments.data.samples import single_questions
from experiments.evaluation.accuracy import correct_answers
from experiments.evaluation.flops import forward_cost
from experiments.evaluation.questions import EncodedQuestions
from experiments.models import reduction_schedule, token_reduction
from experiments.models.build import build_model
from experiments.models.reduction_schedule import reduction_layers, reduction_token_shares
from experiments.models.token_reduction import (
    patch_mask,
    prefuse_inside,
    token_dropper_for_inference,
    token_dropper_for_training,
)
from experiments.sweeps.plan import identify_cell
from experiments.sweeps.runner import run_if_needed
from experiments.training.trainer import train_llava
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor
from llava_mini.video import Video
from probes.tokens.token_map import TokenMap
from tests.probes import reference_llama

CPU = torch.device("cpu")
PATCHES, LAYERS = 9, 4  # of the fixture `deep_llava`
REDUCTIONS = {
    "fastv": ReductionConfig("fastv", [1], keep=0.5),
    "vtw": ReductionConfig("vtw", [2]),
    "pyramid_drop": ReductionConfig("pyramid_drop", [1, 3], keep=0.6),
    "dart": ReductionConfig("dart", [1], keep=0.7),
    "sparsevlm": ReductionConfig("sparsevlm", [1, 3], keep=0.6),
    "random_drop": ReductionConfig("random_drop", [0], keep=0.5),
}


@pytest.fixture
def mini_with_patches(deep_llava, processor) -> tuple[LlavaMiniForConditionalGeneration, LlavaMiniProcessor]:
    """A LLaVA-Mini whose language model gets the nine patches and four compressed tokens, and its processor."""
    torch.manual_seed(1)
    fields = {"compressor": "query", "compressor_size": 2, "prefusion_layers": 0, "keep_patches": True}
    model = LlavaMiniForConditionalGeneration.from_llava(deep_llava, **fields)
    return model, LlavaMiniProcessor.from_llava(processor, model.config)


@pytest.mark.parametrize(
    ("name", "layers", "keep"),
    [
        ("fastv", {32: [2], 6: [1], 40: [3]}, 0.5),
        ("vtw", {32: [15], 6: [3], 40: [19]}, 0),
        ("pyramid_drop", {32: [8, 16, 24], 6: [2, 3, 5], 40: [10, 20, 30]}, 0.5),
        ("dart", {32: [2], 6: [1], 40: [3]}, 0.3333),
        ("sparsevlm", {32: [2, 6, 15], 6: [1, 2, 3], 40: [3, 8, 19]}, 0.58),
        ("random_drop", {32: [2], 6: [1], 40: [3]}, 0.5),
    ],
)
def test_reduction_layers_of_published_settings_scale_with_depth(compose_config, name, layers, keep):
    published = OmegaConf.to_object(compose_config(f"reduction={name}")).reduction
    assert published.keep == keep
    for depth, expected in layers.items():
        assert reduction_layers(published, depth) == expected


@pytest.mark.parametrize(
    ("reduction", "depth", "message"),
    [
        (ReductionConfig("vtw", [6]), 6, r"\[6\] in a model of 6 layers; vtw .* 0 to 5"),
        (ReductionConfig("fastv", [0]), 6, r"\[0\] .*fastv .* 1 to 5"),
        (ReductionConfig("pyramid_drop", [3, 2]), 6, r"\[3, 2\]"),
        (
            ReductionConfig("pyramid_drop", [8, 16, 24], reference_depth=32),
            2,
            r"\[8, 16, 24\] of 32 are \[1, 2, 3\] in a model of 2",
        ),
    ],
)
def test_reduction_layers_outside_the_model_raise(reduction, depth, message):
    with pytest.raises(ValueError, match=message):
        reduction_layers(reduction, depth)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReductionConfig("fastvv"), r"reduction\.name: .*'fastvv'.*none, fastv, vtw, pyramid_drop"),
        (lambda: ReductionConfig("none", [1]), r"reduction\.layers: .*'none'.*\[1\]"),
        (lambda: ReductionConfig("fastv", [1, 2]), r"reduction\.layers: fastv .*\[1, 2\]"),
        (lambda: ReductionConfig("vtw"), r"reduction\.layers: vtw .*\[\]"),
        (lambda: ReductionConfig("pyramid_drop"), r"reduction\.layers: pyramid_drop .*\[\]"),
        (lambda: ReductionConfig("sparsevlm"), r"reduction\.layers: sparsevlm .*\[\]"),
        (lambda: ReductionConfig("dart", [1, 2]), r"reduction\.layers: dart .*\[1, 2\]"),
        (lambda: ReductionConfig("random_drop"), r"reduction\.layers: random_drop .*\[\]"),
        (lambda: ReductionConfig("vtw", [1], keep=0.5), r"reduction\.keep: .*'vtw'.*0\.5"),
        (lambda: ReductionConfig("fastv", [1], keep=1), r"reduction\.keep: .*found 1"),
        (lambda: ReductionConfig("fastv", [1], reference_depth=-1), r"reduction\.reference_depth: .*-1"),
        (lambda: PrefusionConfig(location="within"), r"prefusion\.location: .*'within'.*outside or inside"),
        (lambda: PrefusionConfig(location="inside"), r"prefusion\.layers: .*at least 1 inside.*0"),
    ],
)
def test_config_with_a_wrong_reduction_or_prefusion_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": ReductionConfig("vtw", [9])}, r"reduction.layers: \[9\] in a model of 4 layers"),
        (
            {"reduction": REDUCTIONS["vtw"], "prefusion": PrefusionConfig(2, location="inside")},
            r"reduction=vtw: prefusion\.location=inside",
        ),
        (
            {"prefusion": PrefusionConfig(4, location="inside")},
            "prefusion.layers: 4 inside a language model of 4 layers",
        ),
        ({"reduction": REDUCTIONS["vtw"], "probe": ProbeConfig(removal=True)}, r"probe\.removal.* with reduction=vtw"),
        ({"reduction": REDUCTIONS["vtw"], "probe": ProbeConfig(lens=True)}, r"probe\.lens.* with reduction=vtw"),
        (
            {"prefusion": PrefusionConfig(2, location="inside"), "probe": ProbeConfig(attention=True)},
            r"probe\.attention.* with prefusion\.location=inside",
        ),
    ],
)
def test_check_token_reduction_of_an_impossible_cell_raises(deep_llava, settings, message):
    with pytest.raises(ValueError, match=message):
        token_reduction.check_token_reduction(deep_llava, Config(**settings))


def test_build_model_with_inside_prefusion_and_no_compressor_raises():
    config = Config(compressor=CompressorConfig(), prefusion=PrefusionConfig(2, location="inside"))
    with pytest.raises(ValueError, match=r"prefusion\.location=inside.* compressor"):
        build_model(config, None)


def test_check_token_reduction_without_visual_tokens_raises(deep_llava):
    mini = LlavaMiniForConditionalGeneration.from_llava(
        deep_llava, compressor="query", compressor_size=0, prefusion_layers=1
    )
    with pytest.raises(ValueError, match=r"reduction=vtw: .*compressor\.size=0"):
        token_reduction.check_token_reduction(mini, Config(reduction=REDUCTIONS["vtw"]))


@pytest.mark.parametrize("name", REDUCTIONS)
def test_forward_cost_with_a_reduction_equals_the_estimate(deep_llava, questions, name):
    cost = forward_cost(deep_llava, questions, token_dropper_for_inference(Config(reduction=REDUCTIONS[name])))
    shares = reduction_token_shares(REDUCTIONS[name], LAYERS, PATCHES)
    counts = {
        "fastv": [9, 4, 4, 4],
        "vtw": [9, 9, 0, 0],
        "pyramid_drop": [9, 5, 5, 3],
        "dart": [9, 6, 6, 6],
        "sparsevlm": [9, 5, 5, 3],
        "random_drop": [4, 4, 4, 4],
    }[name]
    assert [share * PATCHES for share in shares] == pytest.approx(counts)
    estimate = CostModel(deep_llava.config)(Prompt(cost["text_tokens"], visual_by_layer=shares))
    assert cost["visual_tokens"] == PATCHES
    assert cost["visual_tokens_mean"] == pytest.approx(sum(counts) / LAYERS)
    assert cost["cache_bytes"] == pytest.approx(estimate.cache_bytes(4))
    # The products that choose raters are not in the estimate; beside this small model they are 1%.
    assert cost["flops"] == pytest.approx(estimate.flops("full"), rel=0.02 if name == "sparsevlm" else 0.005)
    assert cost["flops"] < 0.99 * forward_cost(deep_llava, questions)["flops"]


def test_forward_cost_without_a_reduction_equals_the_estimate(deep_llava, questions):
    cost = forward_cost(deep_llava, questions, token_dropper_for_inference(Config()))
    assert cost["visual_tokens_mean"] == cost["visual_tokens"] == PATCHES
    estimate = CostModel(deep_llava.config)(Prompt(cost["text_tokens"]))
    assert cost["flops"] == pytest.approx(estimate.flops("full"), rel=0.005)


def test_correct_answers_with_vtw_uses_the_reduced_model(deep_llava, questions):
    """The reference decoder's last two layers do not attend to the image."""
    logits = []
    hook = deep_llava.lm_head.register_forward_hook(lambda module, args, output: logits.append(output))
    correct_answers(deep_llava, questions, "test", token_dropper_for_inference(Config(reduction=REDUCTIONS["vtw"])))
    hook.remove()
    assert len(logits) == 3
    for actual, inputs in zip(logits, questions.batches("test"), strict=True):
        ids = inputs["input_ids"]
        vision = ids[0] == deep_llava.config.image_token_id
        hidden = deep_llava.get_input_embeddings()(ids)
        hidden[0, vision] = deep_llava.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        hidden_from = {layer: vision.expand(len(vision), -1) for layer in (2, 3)}
        expected, _ = reference_llama.run_decoder(deep_llava, hidden, hidden_from)
        last = slice(-actual.shape[1], None)  # only the answer has logits
        assert not vision[last].any()
        torch.testing.assert_close(actual[0], expected[last], atol=2e-5, rtol=1e-4)
        assert not torch.allclose(deep_llava(**inputs).logits[0, last], expected[last], atol=1e-3)


def test_token_dropper_of_text_alone_yields_no_receipt(deep_llava):
    ids = torch.tensor([[1, 5, 6]])
    with token_dropper_for_inference(Config(reduction=REDUCTIONS["vtw"]))(deep_llava, {"input_ids": ids}) as receipt:
        assert receipt is None


def right_padded_batch(shapes_split, processor) -> dict[str, torch.Tensor]:
    """Return two right-padded rows of different lengths, as in training."""
    encode = SampleEncoder(processor)
    items = [encode(sample) for sample in list(single_questions(shapes_split.samples))[:8]]
    items.sort(key=lambda item: len(item["input_ids"]))
    inputs = Collator(processor)([items[0], items[-1]])
    assert not inputs["attention_mask"].all()
    return inputs


def test_patch_mask_excludes_compressed_tokens(mini_with_patches, shapes_split):
    model, processor = mini_with_patches
    inputs = right_padded_batch(shapes_split, processor)
    tokens = TokenMap.from_inputs(model, inputs)
    vision, patches = tokens.mask("vision"), patch_mask(tokens)
    assert [row[is_vision].tolist() for row, is_vision in zip(patches, vision, strict=True)] == [
        [True] * 9 + [False] * 4
    ] * 2
    assert not patches[~vision].any()


def test_patch_mask_of_several_images_and_tiles(mini_with_patches, shapes_split):
    """A row of two images and a row of a tiled video: compressed tokens are the last of each frame."""
    model, processor = mini_with_patches
    image = shapes_split.samples[0].image
    rows = processor(images=[image, image], text="<image> a <image>", return_tensors="pt")
    processor.tiles = 2
    more = processor(videos=Video([image] * 2), text="<video>", return_tensors="pt")
    ids = nn.utils.rnn.pad_sequence([rows["input_ids"][0], more["input_ids"][0]], batch_first=True)
    layout = torch.cat([rows["visual_layout"], more["visual_layout"] + torch.tensor([1, 0, 0])])
    pixels = torch.cat([rows["pixel_values"], more["pixel_values"]])
    inputs = {"input_ids": ids, "visual_layout": layout, "pixel_values": pixels}
    tokens = TokenMap.from_inputs(model, inputs)
    first, second = (
        row[is_vision].tolist() for row, is_vision in zip(patch_mask(tokens), tokens.mask("vision"), strict=True)
    )
    assert first == ([True] * 9 + [False] * 4) * 2
    assert second == ([True] * 36 + [False] * 4) * 2


@torch.no_grad()
def test_prefuse_inside_equals_the_reference_decoder(mini_with_patches, shapes_split):
    model, processor = mini_with_patches
    inputs = right_padded_batch(shapes_split, processor)
    tokens = TokenMap.from_inputs(model, inputs)
    with prefuse_inside(model, tokens, 2):
        logits = model(**inputs).logits
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1)):
        ids = inputs["input_ids"][row : row + 1, :length]
        hidden, _ = model.model.fuse(ids, inputs["pixel_values"][row : row + 1])
        is_patch = torch.zeros(length, dtype=torch.bool)
        is_patch[(ids[0] == model.config.image_token_id).nonzero()[:9, 0]] = True
        expected, _ = reference_llama.run_decoder(
            model, hidden, {layer: is_patch.expand(len(is_patch), -1) for layer in (2, 3)}
        )
        torch.testing.assert_close(logits[row, :length][~is_patch], expected[~is_patch], atol=2e-5, rtol=1e-4)


def test_prefuse_inside_gives_the_same_gradients_with_drop_and_mask(mini_with_patches, shapes_split):
    model, processor = mini_with_patches
    inputs = right_padded_batch(shapes_split, processor)
    tokens = TokenMap.from_inputs(model, inputs)
    results: dict[str, tuple[float, dict[str, torch.Tensor]]] = {}

    def run(name: str, context: AbstractContextManager) -> None:
        model.zero_grad()
        with context:
            loss = model.train()(**inputs).loss
        loss.backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        results[name] = (loss.item(), gradients)

    run("no removal", token_dropper_for_training(Config())(model, inputs))
    run("mask", prefuse_inside(model, tokens, 2, "mask"))
    run("drop", token_dropper_for_training(Config(prefusion=PrefusionConfig(2, location="inside")))(model, inputs))
    assert results["drop"][0] == pytest.approx(results["mask"][0], rel=1e-6)
    assert results["drop"][1].keys() == results["mask"][1].keys()
    for name, gradient in results["drop"][1].items():
        torch.testing.assert_close(gradient, results["mask"][1][name], atol=1e-6, rtol=1e-4, msg=name)
    assert abs(results["drop"][0] - results["no removal"][0]) > 1e-5
    vision_tower_gradients = [gradient for name, gradient in results["drop"][1].items() if "vision_tower" in name]
    assert max(gradient.abs().max() for gradient in vision_tower_gradients) > 0


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        ({"prefusion": PrefusionConfig(2, location="inside")}, [0, 0, 9, 9]),
        ({"reduction": REDUCTIONS["vtw"]}, [0, 0, 0, 0]),
    ],
)
def test_train_llava_drops_patches_only_with_inside_prefusion(
    mini_with_patches, shapes_split, tmp_path, settings, dropped
):
    """Inside pre-fusion is part of the model. A reduction is used only to answer."""
    model, processor = mini_with_patches
    sizes = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda mlp, args: sizes.append(args[0].shape[1]))
        for layer in model.model.language_model.layers
    ]
    train_llava(
        model,
        processor,
        shapes_split.samples,
        TrainConfig(1, batch_size=2),
        tmp_path,
        0,
        CPU,
        token_dropper_for_training(Config(**settings)),
    )
    for hook in hooks:
        hook.remove()
    assert [sizes[0] - size for size in sizes] == dropped
    remaining_hooks = [m for m in model.model.language_model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not remaining_hooks


def test_forward_cost_with_inside_prefusion_equals_the_estimate(mini_with_patches, shapes_split):
    model, processor = mini_with_patches
    questions = EncodedQuestions(list(single_questions(shapes_split.samples))[:1], processor, 1, CPU)
    cost = forward_cost(
        model, questions, token_dropper_for_inference(Config(prefusion=PrefusionConfig(2, location="inside")))
    )
    shares = reduction_schedule.inside_prefusion_token_shares(2, LAYERS, 13, 4)
    estimate = CostModel(model.config)(Prompt(cost["text_tokens"], visual_by_layer=shares))
    assert (cost["visual_tokens"], cost["visual_tokens_mean"]) == (13, 8.5)
    assert cost["cache_bytes"] == pytest.approx(estimate.cache_bytes(4))
    assert cost["flops"] == pytest.approx(estimate.flops("full"), rel=0.005)


TINY = ("data.test_samples=10", "data.train_samples=10", "device=cpu", "model=tiny")


@pytest.mark.parametrize(
    ("overrides", "model", "name"),
    [
        (["reduction=fastv"], {"compressor": "fastv", "visual_tokens_mean": 21}, "fastv keeping 0.5 at 2 of 32"),
        (["reduction=vtw"], {"compressor": "vtw", "visual_tokens_mean": 18}, "vtw at 15 of 32"),
        (
            ["reduction=pyramid_drop"],
            {"compressor": "pyramid_drop", "visual_tokens_mean": (36 * 2 + 18 + 9 * 2 + 4) / 6},
            "pyramid_drop keeping 0.5 at 8, 16, 24 of 32",
        ),
        (
            ["prefusion=inside", "compressor=query_4", "prefusion.layers=2"],
            {"compressor": "query", "visual_tokens": 40, "visual_tokens_mean": 16, "prefusion_place": "inside"},
            "4 tokens by query, 2 pre-fusion layers inside",
        ),
    ],
)
def test_run_if_needed_with_each_method_records_its_tokens(compose_config, tmp_path, overrides, model, name):
    config = compose_config(*TINY, f"results={tmp_path}", *overrides)
    record = run_if_needed(identify_cell(config), record_input_errors=False).record
    assert {key: record["model"][key] for key in model} == pytest.approx(model)
    assert name in record["name"]
    assert len(record["accuracy"]["image"]) == 10
    assert record["cost"]["visual_tokens_mean"] == record["model"]["visual_tokens_mean"]
