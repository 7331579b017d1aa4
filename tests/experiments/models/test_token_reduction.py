"""In-LLM reduction and pre-fusion within the language model, as cells run them."""

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
from experiments.cost.estimate import Geometry, Prompt
from experiments.data.encoding import Collator, Encoder
from experiments.data.samples import single_questions
from experiments.evaluation.accuracy import correct
from experiments.evaluation.flops import forward_cost
from experiments.evaluation.questions import Questions
from experiments.models import reduction_schedule, token_reduction
from experiments.models.build import _mini
from experiments.models.reduction_schedule import first_layers, visual_by_layer
from experiments.models.token_reduction import fusing_inside, in_answering, in_training, patches
from experiments.sweeps.plan import identify
from experiments.sweeps.runner import attempt
from experiments.training.trainer import train
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor
from llava_mini.video import Video
from probes.tokens.token_map import TokenMap
from tests.probes import by_hand

CPU = torch.device("cpu")
PATCHES, LAYERS = 9, 4  # of the fixture `deep`
REDUCTIONS = {
    "fastv": ReductionConfig("fastv", [1], keep=0.5),
    "vtw": ReductionConfig("vtw", [2]),
    "pyramid_drop": ReductionConfig("pyramid_drop", [1, 3], keep=0.6),
}


@pytest.fixture
def mini(deep, processor) -> tuple[LlavaMiniForConditionalGeneration, LlavaMiniProcessor]:
    """A LLaVA-Mini whose language model sees the nine patches and four compressed tokens."""
    torch.manual_seed(1)
    fields = {"compressor": "query", "compressor_size": 2, "prefusion_layers": 0, "keep_patches": True}
    model = LlavaMiniForConditionalGeneration.from_llava(deep, **fields)
    return model, LlavaMiniProcessor.from_llava(processor, model.config)


def config(**parts) -> Config:
    return Config(**parts)


@pytest.mark.parametrize(
    ("name", "layers", "keep"),
    [
        ("fastv", {32: [2], 6: [1], 40: [3]}, 0.5),
        ("vtw", {32: [15], 6: [3], 40: [19]}, 0),
        ("pyramid_drop", {32: [8, 16, 24], 6: [2, 3, 5], 40: [10, 20, 30]}, 0.5),
    ],
)
def test_published_settings_in_models_of_other_depths(composed, name, layers, keep):
    published = OmegaConf.to_object(composed(f"reduction={name}")).reduction
    assert published.keep == keep
    for depth, expected in layers.items():
        assert first_layers(published, depth) == expected


@pytest.mark.parametrize(
    ("given", "depth", "said"),
    [
        (ReductionConfig("vtw", [6]), 6, r"\[6\] in a model of 6 layers; vtw needs ascending ones, 0 to 5"),
        (ReductionConfig("fastv", [0]), 6, "fastv needs ascending ones, 1 to 5"),
        (ReductionConfig("pyramid_drop", [3, 2]), 6, r"\[3, 2\]"),
        (
            ReductionConfig("pyramid_drop", [8, 16, 24], of=32),
            2,
            r"\[8, 16, 24\] of 32 are \[1, 1, 2\] in a model of 2",
        ),
    ],
)
def test_layers_that_the_model_has_not(given, depth, said):
    with pytest.raises(ValueError, match=said):
        first_layers(given, depth)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ReductionConfig("fastvv"), "reduction.name: no 'fastvv'; use none, fastv, vtw, pyramid_drop"),
        (lambda: ReductionConfig("none", [1]), "reduction.layers: 'none' drops nothing"),
        (lambda: ReductionConfig("fastv", [1, 2]), "reduction.layers: fastv drops tokens once"),
        (lambda: ReductionConfig("vtw"), "reduction.layers: vtw drops tokens once"),
        (lambda: ReductionConfig("pyramid_drop"), "pyramid_drop needs at least one layer"),
        (lambda: ReductionConfig("vtw", [1], keep=0.5), "reduction.keep: vtw has no share"),
        (lambda: ReductionConfig("fastv", [1], keep=1), "reduction.keep: a share from 0 to below 1, found 1"),
        (lambda: ReductionConfig("fastv", [1], of=-1), "reduction.of: must be at least 0"),
        (lambda: PrefusionConfig(place="within"), "prefusion.place: no 'within'; use outside or inside"),
        (lambda: PrefusionConfig(place="inside"), "prefusion.layers: must be at least 1 inside"),
    ],
)
def test_settings_that_do_not_go(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"reduction": ReductionConfig("vtw", [9])}, r"reduction.layers: \[9\] in a model of 4 layers"),
        (
            {"reduction": REDUCTIONS["vtw"], "prefusion": PrefusionConfig(2, place="inside")},
            "reduction=vtw: prefusion.place=inside takes patches out itself",
        ),
        ({"prefusion": PrefusionConfig(4, place="inside")}, "prefusion.layers: 4 inside a language model of 4 layers"),
        ({"reduction": REDUCTIONS["vtw"], "probe": ProbeConfig(removal=True)}, "probe.removal .* with reduction=vtw"),
        ({"reduction": REDUCTIONS["vtw"], "probe": ProbeConfig(lens=True)}, "probe.lens .* with reduction=vtw"),
        (
            {"prefusion": PrefusionConfig(2, place="inside"), "probe": ProbeConfig(attention=True)},
            "probe.attention .* with prefusion.place=inside",
        ),
    ],
)
def test_cells_that_cannot_be_run(deep, parts, said):
    with pytest.raises(ValueError, match=said):
        token_reduction.check(deep, config(**parts))


def test_inside_needs_something_compressed(deep, processor):
    with pytest.raises(ValueError, match=r"prefusion.place=inside .* choose a compressor with at least one token"):
        _mini(deep, processor, CompressorConfig(), PrefusionConfig(2, place="inside"), 1)


def test_no_visual_token_to_drop(deep):
    none = LlavaMiniForConditionalGeneration.from_llava(deep, compressor="query", compressor_size=0, prefusion_layers=1)
    with pytest.raises(ValueError, match="the language model sees no visual token"):
        token_reduction.check(none, config(reduction=REDUCTIONS["vtw"]))


@pytest.mark.parametrize("name", REDUCTIONS)
def test_cost_is_what_the_estimate_says(deep, questions, name):
    found = forward_cost(deep, questions, in_answering(config(reduction=REDUCTIONS[name])))
    shares = visual_by_layer(REDUCTIONS[name], LAYERS, PATCHES)
    counts = {"fastv": [9, 4, 4, 4], "vtw": [9, 9, 0, 0], "pyramid_drop": [9, 5, 5, 3]}[name]
    assert [share * PATCHES for share in shares] == pytest.approx(counts)
    estimate = Geometry(deep.config)(Prompt(found["text_tokens"], visual_by_layer=shares))
    assert found["visual_tokens"] == PATCHES
    assert found["visual_tokens_mean"] == pytest.approx(sum(counts) / LAYERS)
    assert found["cache_bytes"] == pytest.approx(estimate.cache_bytes(4))
    assert found["flops"] == pytest.approx(estimate.flops("full"), rel=0.005)
    assert found["flops"] < 0.99 * forward_cost(deep, questions)["flops"]


def test_nothing_dropped_costs_what_it_did(deep, questions):
    found = forward_cost(deep, questions, in_answering(config()))
    assert found["visual_tokens_mean"] == found["visual_tokens"] == PATCHES
    estimate = Geometry(deep.config)(Prompt(found["text_tokens"]))
    assert found["flops"] == pytest.approx(estimate.flops("full"), rel=0.005)


def test_answers_come_from_the_reduced_model(deep, questions):
    """VTW against layers run by hand, of which the last two do not attend to the picture."""
    logits = []
    hook = deep.lm_head.register_forward_hook(lambda module, args, output: logits.append(output))
    correct(deep, questions, "test", in_answering(config(reduction=REDUCTIONS["vtw"])))
    hook.remove()
    assert len(logits) == 3
    for found, inputs in zip(logits, questions.batches("test"), strict=True):
        ids = inputs["input_ids"]
        vision = ids[0] == deep.config.image_token_id
        hidden = deep.get_input_embeddings()(ids)
        hidden[0, vision] = deep.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        cut = {layer: vision.expand(len(vision), -1) for layer in (2, 3)}
        expected, _ = by_hand.run(deep, hidden, cut)
        last = slice(-found.shape[1], None)  # logits are of the answer alone
        assert not vision[last].any()
        torch.testing.assert_close(found[0], expected[last], atol=2e-5, rtol=1e-4)
        assert not torch.allclose(deep(**inputs).logits[0, last], expected[last], atol=1e-3)


def test_text_alone_has_nothing_to_drop(deep):
    ids = torch.tensor([[1, 5, 6]])
    with in_answering(config(reduction=REDUCTIONS["vtw"]))(deep, {"input_ids": ids}) as receipt:
        assert receipt is None


def batch(few, processor) -> dict[str, torch.Tensor]:
    """Two right-padded rows of different length, as training has them."""
    encode = Encoder(processor)
    items = [encode(sample) for sample in list(single_questions(few.samples))[:8]]
    items.sort(key=lambda item: len(item["input_ids"]))
    inputs = Collator(processor)([items[0], items[-1]])
    assert not inputs["attention_mask"].all()
    return inputs


def test_patches_are_told_from_compressed_tokens(mini, few):
    model, processor = mini
    inputs = batch(few, processor)
    tokens = TokenMap.from_inputs(model, inputs)
    vision, found = tokens.mask("vision"), patches(tokens)
    assert [row[place].tolist() for row, place in zip(found, vision, strict=True)] == [[True] * 9 + [False] * 4] * 2
    assert not found[~vision].any()


def test_patches_of_several_pictures_and_tiles(mini, few):
    """A row of two pictures, one of them in tiles, and a row of a video: compressed tokens are the last of each frame."""
    model, processor = mini
    picture = few.samples[0].image
    rows = processor(images=[picture, picture], text="<image> a <image>", return_tensors="pt")
    processor.tiles = 2
    more = processor(videos=Video([picture] * 2), text="<video>", return_tensors="pt")
    ids = nn.utils.rnn.pad_sequence([rows["input_ids"][0], more["input_ids"][0]], batch_first=True)
    layout = torch.cat([rows["visual_layout"], more["visual_layout"] + torch.tensor([1, 0, 0])])
    pixels = torch.cat([rows["pixel_values"], more["pixel_values"]])
    inputs = {"input_ids": ids, "visual_layout": layout, "pixel_values": pixels}
    tokens = TokenMap.from_inputs(model, inputs)
    first, second = (row[place].tolist() for row, place in zip(patches(tokens), tokens.mask("vision"), strict=True))
    assert first == ([True] * 9 + [False] * 4) * 2
    assert second == ([True] * 36 + [False] * 4) * 2


@torch.no_grad()
def test_inside_against_layers_run_by_hand(mini, few):
    model, processor = mini
    inputs = batch(few, processor)
    tokens = TokenMap.from_inputs(model, inputs)
    with fusing_inside(model, tokens, 2):
        logits = model(**inputs).logits
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1)):
        ids = inputs["input_ids"][row : row + 1, :length]
        hidden, _ = model.model.fuse(ids, inputs["pixel_values"][row : row + 1])
        gone = torch.zeros(length, dtype=torch.bool)
        gone[(ids[0] == model.config.image_token_id).nonzero()[:9, 0]] = True
        expected, _ = by_hand.run(model, hidden, {layer: gone.expand(len(gone), -1) for layer in (2, 3)})
        torch.testing.assert_close(logits[row, :length][~gone], expected[~gone], atol=2e-5, rtol=1e-4)


def test_dropped_and_hidden_patches_train_alike(mini, few):
    model, processor = mini
    inputs = batch(few, processor)
    tokens = TokenMap.from_inputs(model, inputs)
    found: dict[str, tuple[float, dict[str, torch.Tensor]]] = {}

    def run(how: str, around: AbstractContextManager) -> None:
        model.zero_grad()
        with around:
            loss = model.train()(**inputs).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[how] = (loss.item(), gradients)

    run("whole", in_training(config())(model, inputs))
    run("mask", fusing_inside(model, tokens, 2, "mask"))
    run("drop", in_training(config(prefusion=PrefusionConfig(2, place="inside")))(model, inputs))
    assert found["drop"][0] == pytest.approx(found["mask"][0], rel=1e-6)
    assert found["drop"][1].keys() == found["mask"][1].keys()
    for name, gradient in found["drop"][1].items():
        torch.testing.assert_close(gradient, found["mask"][1][name], atol=1e-6, rtol=1e-4, msg=name)
    assert abs(found["drop"][0] - found["whole"][0]) > 1e-5
    towers = [gradient for name, gradient in found["drop"][1].items() if "vision_tower" in name]
    assert max(gradient.abs().max() for gradient in towers) > 0


@pytest.mark.parametrize(
    ("parts", "gone"),
    [
        ({"prefusion": PrefusionConfig(2, place="inside")}, [0, 0, 9, 9]),
        ({"reduction": REDUCTIONS["vtw"]}, [0, 0, 0, 0]),
    ],
)
def test_what_training_runs_without(mini, few, tmp_path, parts, gone):
    """Pre-fusion inside is part of the model; a reduction is for answering alone."""
    model, processor = mini
    sizes = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda mlp, args: sizes.append(args[0].shape[1]))
        for layer in model.model.language_model.layers
    ]
    train(model, processor, few.samples, TrainConfig(1, batch_size=2), tmp_path, 0, CPU, in_training(config(**parts)))
    for hook in hooks:
        hook.remove()
    assert [sizes[0] - size for size in sizes] == gone
    left = [m for m in model.model.language_model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not left


def test_inside_costs_what_the_estimate_says(mini, few):
    model, processor = mini
    questions = Questions(list(single_questions(few.samples))[:1], processor, 1, CPU)
    found = forward_cost(model, questions, in_answering(config(prefusion=PrefusionConfig(2, place="inside"))))
    shares = reduction_schedule.visual_inside(2, LAYERS, 13, 4)
    estimate = Geometry(model.config)(Prompt(found["text_tokens"], visual_by_layer=shares))
    assert (found["visual_tokens"], found["visual_tokens_mean"]) == (13, 8.5)
    assert found["cache_bytes"] == pytest.approx(estimate.cache_bytes(4))
    assert found["flops"] == pytest.approx(estimate.flops("full"), rel=0.005)


TINY = ("data.test=10", "data.train=10", "device=cpu", "model=tiny")


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
def test_a_cell_of_each(composed, tmp_path, overrides, model, name):
    given = composed(*TINY, f"results={tmp_path}", *overrides)
    record = attempt(identify(given), record_all=False).record
    assert {key: record["model"][key] for key in model} == pytest.approx(model)
    assert name in record["name"]
    assert len(record["accuracy"]["image"]) == 10
    assert record["cost"]["visual_tokens_mean"] == record["model"]["visual_tokens_mean"]
