"""The feature cache: it holds the vision tower's features, computes each once, and recovers from faults."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageOps

from experiments.config.data_schema import ShapesData
from experiments.config.schema import Config, ReductionConfig, TrainConfig
from experiments.data.encoding import Collator, SampleEncoder
from experiments.data.llava_json import load_llava_json
from experiments.data.samples import IndexedImageLoader, Sample, llava_conversation
from experiments.data.shapes import load_shapes
from experiments.evaluation.accuracy import blank_images, shuffled_images
from experiments.evaluation.questions import EncodedQuestions
from experiments.models.feature_cache import VisionFeatureCache, open_feature_cache
from experiments.models.token_reduction import token_dropper_for_inference
from experiments.training.trainer import train_llava
from llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.video import Video

CPU = torch.device("cpu")


def round_vision_features(model) -> None:
    """Round the output of the vision tower to bf16, as the cache does."""

    def hook(_, args, kwargs, output):
        output.hidden_states = tuple(x if x is None else x.bfloat16().to(x.dtype) for x in output.hidden_states)
        return output

    model.model.vision_tower.register_forward_hook(hook, with_kwargs=True)


def collate(processor, samples, features=None):
    """Return a batch of samples, with pixels or with cached features."""
    encode = SampleEncoder(processor)
    if features is None:
        return Collator(processor)([encode(sample) for sample in samples])
    return Collator(processor)([features.encode_sample(encode, sample) for sample in samples])


@pytest.mark.parametrize("layers", [-2, [-2, 1]], ids=["one layer", "two layers"])
@pytest.mark.parametrize("tiles", [1, 2])
def test_as_pixel_values_of_a_llava_mini_gives_the_output_of_rounded_features(
    mini, mini_processor, shapes_split, tmp_path, layers, tiles
):
    if tiles == 2:
        mini_processor.tiles = 2
    if layers != -2:
        fields = {"compressor_size": 2, "prefusion_layers": 1, "vision_feature_layer": layers}
        config = type(mini.config)(**(mini.config.to_dict() | fields))
        torch.manual_seed(2)
        mini = LlavaMiniForConditionalGeneration(config).eval()
    features = VisionFeatureCache(tmp_path, mini, mini_processor, shapes_split)
    samples = list(shapes_split.samples)[:3]
    cached = collate(mini_processor, samples, features)
    pixels = collate(mini_processor, samples)
    assert cached["pixel_values"].shape[:2] == (3 * (1 if tiles == 1 else 5), 1 if layers == -2 else 2)
    assert torch.equal(cached["input_ids"], pixels["input_ids"])
    assert torch.equal(cached["labels"], pixels["labels"])
    with torch.no_grad(), features.as_pixel_values():
        output = mini(**cached)
    round_vision_features(mini)
    with torch.no_grad():
        expected = mini(**pixels)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-4, rtol=1e-4)


def test_as_pixel_values_of_a_llava_gives_the_output_of_rounded_features(llava, processor, shapes_split, tmp_path):
    features = VisionFeatureCache(tmp_path, llava, processor, shapes_split)
    samples = list(shapes_split.samples)[:3]
    cached, pixels = collate(processor, samples, features), collate(processor, samples)
    assert torch.equal(cached["input_ids"], pixels["input_ids"])
    with torch.no_grad(), features.as_pixel_values():
        logits = llava(**cached).logits
    round_vision_features(llava)
    with torch.no_grad():
        torch.testing.assert_close(logits, llava(**pixels).logits, atol=1e-3, rtol=1e-3)


def test_get_computes_once_for_llava_and_mini_and_loads_no_cached_image(
    llava, processor, mini, mini_processor, shapes_split, tmp_path, tower_runs
):
    samples = list(shapes_split.samples)
    first = collate(processor, samples, VisionFeatureCache(tmp_path, llava, processor, shapes_split))["pixel_values"]
    tower_runs.clear()

    def fail_to_load():
        raise AssertionError("a cached image was loaded")

    without_images = [
        dataclasses.replace(s, loaders=(IndexedImageLoader(i, fail_to_load),)) for i, s in enumerate(samples)
    ]
    for model, its_processor in ((llava, processor), (mini, mini_processor)):
        features = VisionFeatureCache(tmp_path, model, its_processor, shapes_split)
        assert torch.equal(collate(its_processor, without_images, features)["pixel_values"], first)
    assert len(tower_runs) == 2  # each encodes a blank image for the shape
    assert len(list(tmp_path.iterdir())) == 1


def test_get_inside_autocast_is_as_outside(llava, processor, shapes_split, tmp_path):
    load = shapes_split.samples[0].loaders[0]
    outside = VisionFeatureCache(tmp_path / "outside", llava, processor, shapes_split).get(load)
    with torch.autocast("cpu", torch.bfloat16):
        inside = VisionFeatureCache(tmp_path / "inside", llava, processor, shapes_split).get(load)
    assert torch.equal(inside, outside)


def test_path_differs_by_code_that_makes_images(llava, processor, shapes_split, tmp_path, monkeypatch):
    before = VisionFeatureCache(tmp_path, llava, processor, shapes_split).path
    render = type(shapes_split.samples).render
    monkeypatch.setattr(type(shapes_split.samples), "render", lambda *arguments: ImageOps.invert(render(*arguments)))
    assert VisionFeatureCache(tmp_path, llava, processor, shapes_split).path != before


def test_path_differs_by_an_image_file_that_was_replaced_by_one_of_the_same_size(llava, processor, tmp_path):
    """Bitmaps of one size are equally long, and only the first image's pixels count besides."""
    entries = []
    for number, color in enumerate(("red", "blue")):
        Image.new("RGB", (24, 24), color).save(tmp_path / f"{number}.bmp")
        turns = [{"from": "human", "value": "<image> what"}, {"from": "gpt", "value": color}]
        entries.append({"id": str(number), "image": f"{number}.bmp", "conversations": turns})
    (tmp_path / "questions.json").write_text(json.dumps(entries))
    paths, fingerprints = [], []
    for color in ("blue", "white"):
        Image.new("RGB", (24, 24), color).save(tmp_path / "1.bmp")
        split = load_llava_json(str(tmp_path / "questions.json"), str(tmp_path), "test")
        fingerprints.append(split.fingerprint)
        paths.append(VisionFeatureCache(tmp_path / "features", llava, processor, split).path)
    assert fingerprints[0] == fingerprints[1]
    assert paths[0] != paths[1]


def test_get_depends_on_the_image_alone(llava, processor, shapes_split, tmp_path):
    orders = ([0, 1, 2, 3, 4, 5, 6, 7], [5, 3, 7], [7, 6, 5, 4, 3, 2, 1, 0])
    by_order = []
    for i, order in enumerate(orders):
        features = VisionFeatureCache(tmp_path / str(i), llava, processor, shapes_split)
        by_order.append({n: features.get(shapes_split.samples[n].loaders[0]) for n in order})
    assert all(torch.equal(by_order[0][n], other[n]) for other in by_order[1:] for n in other)


def test_path_differs_by_vision_tower_layers_images_and_processing(
    llava, processor, mini, mini_processor, shapes_split, tmp_path
):
    def name(model=llava, model_processor=processor, split=shapes_split) -> str:
        return VisionFeatureCache(tmp_path, model, model_processor, split).path.name

    names = [name(), name(split=load_shapes("train", 9)), name(split=load_shapes("test", 8))]
    assert name(mini, mini_processor) == names[0]
    mini_processor.tiles = 2
    names.append(name(mini, mini_processor))
    mini_processor.tiles, mini_processor.pad_to_square = 1, True
    names.append(name(mini, mini_processor))
    llava.config.vision_feature_layer = 1
    names.append(name())
    llava.config.vision_feature_layer = mini.config.vision_feature_layer
    with torch.no_grad():
        next(llava.model.vision_tower.parameters()).flatten()[0] += 1e-3
    names.append(name())
    names.append(name(llava.bfloat16()))
    torch.set_num_threads(torch.get_num_threads() + 1)
    names.append(name())
    torch.set_num_threads(torch.get_num_threads() - 1)
    assert len(set(names)) == len(names)


FILL_CACHE = """
import sys
from pathlib import Path
import numpy as np
import torch
from experiments.data.scenes import IMAGE_SIZE
from experiments.data.shapes import load_shapes
from experiments.models import scratch
from experiments.models.feature_cache import VisionFeatureCache
folder, turn, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
shapes_split = load_shapes("train", 8)
processor = scratch.build_processor(scratch.train_tokenizer(shapes_split.samples, 384), IMAGE_SIZE, patch=16)
torch.manual_seed(0)
llava = scratch.build_llava(processor.tokenizer, IMAGE_SIZE, patch=16, width=32, layers=2).eval()
features = VisionFeatureCache(folder, llava, processor, shapes_split)
for i in np.random.default_rng(turn).permutation(8).tolist():
    features.get(shapes_split.samples[i].loaders[0])
"""


def test_get_in_several_processes_fills_one_file(llava, processor, shapes_split, tmp_path, tower_runs):
    """The processes are not forks: a fork of a process whose torch has threads may hang."""
    loads = [sample.loaders[0] for sample in shapes_split.samples]
    expected = [VisionFeatureCache(tmp_path / "alone", llava, processor, shapes_split).get(load) for load in loads]
    threads = str(torch.get_num_threads())
    started = [subprocess.Popen([sys.executable, "-c", FILL_CACHE, tmp_path, str(turn), threads]) for turn in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(list(tmp_path.glob("*.features"))) == 1
    tower_runs.clear()
    features = VisionFeatureCache(tmp_path, llava, processor, shapes_split)
    assert all(torch.equal(features.get(load), row) for load, row in zip(loads, expected, strict=True))
    assert len(tower_runs) == 1


def test_as_pixel_values_restores_the_vision_tower_and_checkpoints_hold_it(
    mini, mini_processor, shapes_split, tmp_path
):
    start = {name: value.clone() for name, value in mini.state_dict().items()}
    features = VisionFeatureCache(tmp_path / "features", mini, mini_processor, shapes_split)
    config = TrainConfig(max_steps=2, batch_size=4, warmup_steps=0, save_steps=1)
    train_llava(mini, mini_processor, shapes_split.samples, config, tmp_path / "work", 0, CPU, features=features)
    saved = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "work" / "checkpoint-2").state_dict()
    after = mini.state_dict()
    assert all(torch.equal(saved[name], after[name]) for name in after)
    assert all(
        torch.equal(start[name], after[name]) == ("vision_tower" in name) for name in after if "rotary" not in name
    )
    with pytest.raises(RuntimeError, match="stop"), features.as_pixel_values():
        raise RuntimeError("stop")
    assert "forward" not in vars(mini.model.vision_tower)


def test_train_llava_gives_equal_weights_whatever_is_cached(mini, mini_processor, shapes_split, tmp_path, tower_runs):
    """Weights are equal bit for bit, and the loss is close to that of training on pixels."""
    start = {name: value.clone() for name, value in mini.state_dict().items()}
    config = TrainConfig(max_steps=10, batch_size=4, warmup_steps=0, learning_rate=1e-3)

    def run(name, features):
        mini.load_state_dict(start)
        tower_runs.clear()
        log = train_llava(
            mini, mini_processor, shapes_split.samples, config, tmp_path / name, 0, CPU, features=features
        )
        return log[0]["loss"], {name: value.clone() for name, value in mini.state_dict().items()}

    def open_cache(name):
        return VisionFeatureCache(tmp_path / name, mini, mini_processor, shapes_split)

    loss, fresh = run("fresh", open_cache("a"))
    assert len(tower_runs) == 8  # one for each image
    partly_filled = open_cache("b")
    for i in (6, 1, 3):
        partly_filled.get(shapes_split.samples[i].loaders[0])
    for name, features in (("half", partly_filled), ("all", open_cache("a"))):
        assert run(name, features)[0] == loss
        assert all(torch.equal(fresh[key], value) for key, value in mini.state_dict().items())
    assert len(tower_runs) == 0
    assert run("pixels", None)[0] == pytest.approx(loss, rel=2e-3)


def test_encode_sample_of_videos_text_and_several_images(mini, mini_processor, shapes_split, tmp_path):
    def clip(level: int) -> Video:
        return Video([Image.new("RGB", (48, 48), (level, i, 0)) for i in (50, 200)])

    text = Sample("t", (), llava_conversation([("is there a ring?", "no")], []), ["x"])
    turns = [("what colour is at row 1 column 2?", "red")]
    video = Sample("v", (lambda: clip(9),), llava_conversation(turns, ["<video>"]), ["x"])
    two = Sample(
        "w",
        (shapes_split.samples[1].loaders[0], shapes_split.samples[0].loaders[0]),
        llava_conversation(turns, ["<image>"] * 2),
        ["x"],
    )
    both = Sample(
        "b",
        (shapes_split.samples[2].loaders[0], lambda: clip(200)),
        llava_conversation(turns, ["<image>", "<video>"]),
        ["x"],
    )
    mini_processor.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}"
        "{{ p['text'] if p['type'] == 'text' else '<' + p['type'] + '>' }}{% endfor %}"
        "{{ eos_token if m['role'] == 'assistant' }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
    )
    features = VisionFeatureCache(tmp_path, mini, mini_processor, shapes_split)
    samples = [text, video, two, both, shapes_split.samples[3]]
    cached, pixels = collate(mini_processor, samples, features), collate(mini_processor, samples)
    assert torch.equal(cached["visual_layout"], pixels["visual_layout"])
    with torch.no_grad(), features.as_pixel_values():
        logits = mini(**cached).logits
    round_vision_features(mini)
    with torch.no_grad():
        torch.testing.assert_close(logits, mini(**pixels).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("reduction", [ReductionConfig("fastv", [1], keep=0.5), ReductionConfig("vtw", [1])])
def test_token_droppers_work_on_cached_features(llava, processor, shapes_split, tmp_path, reduction):
    config = Config(data=ShapesData(name="shapes"), reduction=reduction)
    features = VisionFeatureCache(tmp_path, llava, processor, shapes_split)
    samples = list(shapes_split.samples)[:3]
    cached, pixels = collate(processor, samples, features), collate(processor, samples)
    with torch.no_grad(), features.as_pixel_values(), token_dropper_for_inference(config)(llava, cached):
        logits = llava(**cached).logits
    round_vision_features(llava)
    with torch.no_grad(), token_dropper_for_inference(config)(llava, pixels):
        torch.testing.assert_close(logits, llava(**pixels).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("control", [list, blank_images, shuffled_images])
def test_encoded_questions_with_features_hold_the_same_images(mini, mini_processor, shapes_split, tmp_path, control):
    samples = control(list(shapes_split.samples))
    features = VisionFeatureCache(tmp_path, mini, mini_processor, shapes_split)
    with_features = EncodedQuestions(samples, mini_processor, 4, CPU, features)
    with_pixels = EncodedQuestions(samples, mini_processor, 4, CPU)
    for cached, pixels in zip(with_features.batches(""), with_pixels.batches(""), strict=True):
        output = mini.model.vision_tower(pixels["pixel_values"], output_hidden_states=True)
        expected = output.hidden_states[mini.config.vision_feature_layer]
        torch.testing.assert_close(cached["pixel_values"][:, 0].float(), expected, atol=2e-2, rtol=1e-2)
        assert torch.equal(cached["input_ids"], pixels["input_ids"])


def test_open_feature_cache_returns_none_or_raises_where_features_cannot_be_cached(
    llava, mini, processor, mini_processor, shapes_split, tmp_path
):
    config = Config(data=ShapesData(name="shapes"), results=str(tmp_path), keep_features=True)
    assert open_feature_cache(dataclasses.replace(config, keep_features=False), llava, processor, shapes_split) is None
    assert open_feature_cache(config, llava, processor, None) is None
    assert open_feature_cache(config, llava, processor, shapes_split).path.parent == tmp_path / "shared"
    assert open_feature_cache(config, mini, mini_processor, shapes_split) is not None
    mini.model.compressor.needs = ("text", "text_mask")
    assert open_feature_cache(config, mini, mini_processor, shapes_split) is not None
    mini.model.compressor.needs = ("saliency",)
    assert open_feature_cache(config, mini, mini_processor, shapes_split) is None
    small = LlavaMiniForConditionalGeneration.from_llava(
        llava, compressor="downsample", compressor_size=1, prefusion_layers=0
    )
    assert open_feature_cache(config, small, mini_processor, shapes_split) is None
    with pytest.raises(ValueError, match=r"train\.train_vision") as error:
        dataclasses.replace(config, train=TrainConfig(train_vision=True))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"keep_features: .*CLIPVisionModel"):
        open_feature_cache(config, llava.model.vision_tower, processor, shapes_split)
