"""Kept features: they are the tower's, are computed once, and neither faults nor other processes change what a cell finds."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.config.schema import Config, ReductionConfig, ShapesData, TrainConfig
from experiments.data.encoding import Collator, Encoder
from experiments.data.llava_json import load_llava_json
from experiments.data.samples import Numbered, Sample, conversation
from experiments.data.shapes import load_shapes
from experiments.evaluation.accuracy import blank, shuffled
from experiments.evaluation.questions import Questions
from experiments.models.feature_cache import Features, keep_features
from experiments.models.token_reduction import in_answering
from experiments.training.trainer import train
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor
from llava_mini.video import Video

CPU = torch.device("cpu")


@pytest.fixture
def mini(llava):
    torch.manual_seed(1)
    return LlavaMiniForConditionalGeneration.from_llava(llava, compressor_size=2, prefusion_layers=1).eval()


@pytest.fixture
def mini_processor(processor, mini):
    return LlavaMiniProcessor.from_llava(processor, mini.config)


@pytest.fixture
def tower_runs(llava, mini):
    """How many crops the towers have run on, one entry a run."""
    runs = []
    for model in (llava, mini):
        model.model.vision_tower.encoder.register_forward_hook(
            lambda _, args, kwargs, out: runs.append(1), with_kwargs=True
        )
    return runs


def rounded(model) -> None:
    """Let the tower itself say everything in bf16's precision, all pictures of a batch at once."""

    def hook(_, args, kwargs, output):
        output.hidden_states = tuple(x if x is None else x.bfloat16().to(x.dtype) for x in output.hidden_states)
        return output

    model.model.vision_tower.register_forward_hook(hook, with_kwargs=True)


def batch(processor, samples, features=None):
    encode = Encoder(processor)
    if features is None:
        return Collator(processor)([encode(sample) for sample in samples])
    return Collator(processor)([features.encoded(encode, sample) for sample in samples])


@pytest.mark.parametrize("layers", [-2, [-2, 1]], ids=["one layer", "two layers"])
@pytest.mark.parametrize("tiles", [1, 2])
def test_a_model_says_with_features_what_it_says_with_rounded_ones_of_its_tower(
    mini, mini_processor, few, tmp_path, layers, tiles
):
    if tiles == 2:
        mini_processor.tiles = 2
    if layers != -2:
        fields = {"compressor_size": 2, "prefusion_layers": 1, "vision_feature_layer": layers}
        config = type(mini.config)(**(mini.config.to_dict() | fields))
        torch.manual_seed(2)
        mini = LlavaMiniForConditionalGeneration(config).eval()
    features = Features(tmp_path, mini, mini_processor, few)
    samples = list(few.samples)[:3]
    given = batch(mini_processor, samples, features)
    pixels = batch(mini_processor, samples)
    assert given["pixel_values"].shape[:2] == (3 * (1 if tiles == 1 else 5), 1 if layers == -2 else 2)
    assert torch.equal(given["input_ids"], pixels["input_ids"])
    assert torch.equal(given["labels"], pixels["labels"])
    with torch.no_grad(), features.given():
        found = mini(**given)
    rounded(mini)
    with torch.no_grad():
        expected = mini(**pixels)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=1e-4)


def test_a_plain_llava_too(llava, processor, few, tmp_path):
    features = Features(tmp_path, llava, processor, few)
    samples = list(few.samples)[:3]
    given, pixels = batch(processor, samples, features), batch(processor, samples)
    assert torch.equal(given["input_ids"], pixels["input_ids"])
    with torch.no_grad(), features.given():
        found = llava(**given).logits
    rounded(llava)
    with torch.no_grad():
        torch.testing.assert_close(found, llava(**pixels).logits, atol=1e-3, rtol=1e-3)


def test_computed_once_for_llava_and_mini_and_pictures_are_not_drawn_again(
    llava, processor, mini, mini_processor, few, tmp_path, tower_runs
):
    samples = list(few.samples)
    first = batch(processor, samples, Features(tmp_path, llava, processor, few))["pixel_values"]
    tower_runs.clear()

    def drawn():
        raise AssertionError("drawn again")

    unseen = [dataclasses.replace(s, load=(Numbered(i, drawn),)) for i, s in enumerate(samples)]
    for model, its_processor in ((llava, processor), (mini, mini_processor)):
        features = Features(tmp_path, model, its_processor, few)
        assert torch.equal(batch(its_processor, unseen, features)["pixel_values"], first)
    assert len(tower_runs) == 2  # each asked for a shape
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_kept_hangs_on_the_picture_alone(llava, processor, few, tmp_path):
    orders = ([0, 1, 2, 3, 4, 5, 6, 7], [5, 3, 7], [7, 6, 5, 4, 3, 2, 1, 0])
    found = []
    for i, order in enumerate(orders):
        features = Features(tmp_path / str(i), llava, processor, few)
        found.append({n: features.of(few.samples[n].load[0]) for n in order})
    assert all(torch.equal(found[0][n], some[n]) for some in found[1:] for n in some)


def test_other_towers_layers_pictures_and_processing_have_files_of_their_own(
    llava, processor, mini, mini_processor, few, tmp_path
):
    def name(model=llava, its=processor, split=few) -> str:
        return Features(tmp_path, model, its, split).path.name

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


def _garble_a_row(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")


def _cut(path):
    os.truncate(path, path.stat().st_size - 100)


def _garble_all(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def _lose_a_checksum(path):  # a kill between a row and its checksum
    with path.open("r+b") as file:
        file.seek(8 * 7)
        file.write(bytes(8))


def _half_a_row(path):  # of a writer that was cut off, with the checksum of what was meant
    with path.open("r+b") as file:
        file.seek(-600, os.SEEK_END)
        file.write(bytes(600))


@pytest.mark.parametrize(
    "fault",
    [_garble_a_row, _cut, _garble_all, _lose_a_checksum, _half_a_row, os.unlink, lambda path: os.truncate(path, 0)],
)
def test_faults_are_mended(llava, processor, few, tmp_path, tower_runs, fault):
    loads = [sample.load[0] for sample in few.samples]
    features = Features(tmp_path, llava, processor, few)
    whole = [features.of(load) for load in loads]
    fault(features.path)
    again = Features(tmp_path, llava, processor, few)
    assert all(torch.equal(again.of(load), row) for load, row in zip(loads, whole, strict=True))
    tower_runs.clear()
    mended = Features(tmp_path, llava, processor, few)
    assert all(torch.equal(mended.of(load), row) for load, row in zip(loads, whole, strict=True))
    assert len(tower_runs) == 1


@pytest.mark.parametrize("fails", ["at once", "half way", "no folder"])
def test_where_nothing_can_be_written_features_are_computed(
    llava, processor, few, tmp_path, monkeypatch, caplog, fails
):
    pwrite = os.pwrite

    def full(file, data, offset):
        if fails == "half way" and len(data) > 8:
            return pwrite(file, data[: len(data) // 2], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    loads = [sample.load[0] for sample in few.samples]
    whole = [Features(tmp_path / "other", llava, processor, few).of(load) for load in loads]
    folder = tmp_path / "here"
    if fails == "no folder":
        folder.write_text("a file")
    monkeypatch.setattr(os, "pwrite", full)
    features = Features(folder, llava, processor, few)
    for _ in range(2):
        assert all(torch.equal(features.of(load), row) for load, row in zip(loads, whole, strict=True))
    if fails != "half way":
        assert len(caplog.messages) == 1
        assert "computed and not kept" in caplog.text
    if fails == "no folder":
        return
    monkeypatch.undo()
    again = Features(folder, llava, processor, few)
    assert all(torch.equal(again.of(load), row) for load, row in zip(loads, whole, strict=True))


def test_images_of_a_file_are_numbered_through(few, tmp_path):
    turns = [("what colour is at row 1 column 2?", "red")]
    rows = []
    for entry, images in enumerate((1, 0, 2, 1)):
        names = [f"{entry}-{i}.png" for i in range(images)]
        for name in names:
            few.samples[0].image.save(tmp_path / name)
        rows.append({"image": names, "conversations": conversation(turns, ["<image>"] * images)})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    split = load_llava_json(str(tmp_path / "rows.json"), str(tmp_path), "train")
    assert [[load.number for load in sample.load] for sample in split.samples] == [[0], [], [1, 2], [3]]
    assert split.images == 4


FILL = """
import sys
from pathlib import Path
import numpy as np
import torch
from experiments.models import scratch as tiny
from experiments.data.scenes import SIDE
from experiments.data.shapes import load_shapes
from experiments.models.feature_cache import Features
folder, turn, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
few = load_shapes("train", 8)
processor = tiny.processor(tiny.tokenizer(few.samples, 384), SIDE, patch=16)
torch.manual_seed(0)
llava = tiny.llava(processor.tokenizer, SIDE, patch=16, width=32, layers=2).eval()
features = Features(folder, llava, processor, few)
for i in np.random.default_rng(turn).permutation(8).tolist():
    features.of(few.samples[i].load[0])
"""


def test_processes_fill_one_file_together(llava, processor, few, tmp_path, tower_runs):
    """Processes of their own: a fork of one whose torch has threads may hang."""
    loads = [sample.load[0] for sample in few.samples]
    expected = [Features(tmp_path / "alone", llava, processor, few).of(load) for load in loads]
    threads = str(torch.get_num_threads())
    started = [subprocess.Popen([sys.executable, "-c", FILL, tmp_path, str(turn), threads]) for turn in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(list(tmp_path.glob("*.features"))) == 1
    tower_runs.clear()
    features = Features(tmp_path, llava, processor, few)
    assert all(torch.equal(features.of(load), row) for load, row in zip(loads, expected, strict=True))
    assert len(tower_runs) == 1


def test_the_tower_is_itself_again_and_goes_into_checkpoints(mini, mini_processor, few, tmp_path):
    start = {name: value.clone() for name, value in mini.state_dict().items()}
    features = Features(tmp_path / "kept", mini, mini_processor, few)
    config = TrainConfig(steps=2, batch_size=4, warmup=0, save_every=1)
    train(mini, mini_processor, few.samples, config, tmp_path / "work", 0, CPU, features=features)
    saved = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "work" / "checkpoint-2").state_dict()
    after = mini.state_dict()
    assert all(torch.equal(saved[name], after[name]) for name in after)
    assert all(
        torch.equal(start[name], after[name]) == ("vision_tower" in name) for name in after if "rotary" not in name
    )
    with pytest.raises(RuntimeError, match="stop"), features.given():
        raise RuntimeError("stop")
    assert "forward" not in vars(mini.model.vision_tower)


def test_training_is_the_same_whatever_is_kept_already(mini, mini_processor, few, tmp_path, tower_runs):
    """Bit for bit; and close to training on pixels."""
    start = {name: value.clone() for name, value in mini.state_dict().items()}
    config = TrainConfig(steps=10, batch_size=4, warmup=0, learning_rate=1e-3)

    def run(name, features):
        mini.load_state_dict(start)
        tower_runs.clear()
        log = train(mini, mini_processor, few.samples, config, tmp_path / name, 0, CPU, features=features)
        return log[0]["loss"], {name: value.clone() for name, value in mini.state_dict().items()}

    def keep(name):
        return Features(tmp_path / name, mini, mini_processor, few)

    loss, fresh = run("fresh", keep("a"))
    assert len(tower_runs) == 8  # one for each picture
    some = keep("b")
    for i in (6, 1, 3):
        some.of(few.samples[i].load[0])
    for name, features in (("half", some), ("all", keep("a"))):
        assert run(name, features)[0] == loss
        assert all(torch.equal(fresh[key], value) for key, value in mini.state_dict().items())
    assert len(tower_runs) == 0
    assert run("pixels", None)[0] == pytest.approx(loss, rel=2e-3)


def test_videos_text_and_several_images(mini, mini_processor, few, tmp_path):
    def film(level: int) -> Video:
        return Video([Image.new("RGB", (48, 48), (level, i, 0)) for i in (50, 200)])

    text = Sample("t", (), conversation([("is there a ring?", "no")], []), ["x"])
    turns = [("what colour is at row 1 column 2?", "red")]
    video = Sample("v", (lambda: film(9),), conversation(turns, ["<video>"]), ["x"])
    two = Sample("w", (few.samples[1].load[0], few.samples[0].load[0]), conversation(turns, ["<image>"] * 2), ["x"])
    both = Sample("b", (few.samples[2].load[0], lambda: film(200)), conversation(turns, ["<image>", "<video>"]), ["x"])
    mini_processor.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}"
        "{{ p['text'] if p['type'] == 'text' else '<' + p['type'] + '>' }}{% endfor %}"
        "{{ eos_token if m['role'] == 'assistant' }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
    )
    features = Features(tmp_path, mini, mini_processor, few)
    samples = [text, video, two, both, few.samples[3]]
    given, pixels = batch(mini_processor, samples, features), batch(mini_processor, samples)
    assert torch.equal(given["visual_layout"], pixels["visual_layout"])
    with torch.no_grad(), features.given():
        found = mini(**given).logits
    rounded(mini)
    with torch.no_grad():
        torch.testing.assert_close(found, mini(**pixels).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("reduces", [ReductionConfig("fastv", [1], keep=0.5), ReductionConfig("vtw", [1])])
def test_methods_within_the_language_model_work_on_features(llava, processor, few, tmp_path, reduces):
    config = Config(data=ShapesData(name="shapes"), reduction=reduces)
    features = Features(tmp_path, llava, processor, few)
    samples = list(few.samples)[:3]
    given, pixels = batch(processor, samples, features), batch(processor, samples)
    with torch.no_grad(), features.given(), in_answering(config)(llava, given):
        found = llava(**given).logits
    rounded(llava)
    with torch.no_grad(), in_answering(config)(llava, pixels):
        torch.testing.assert_close(found, llava(**pixels).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("condition", [list, blank, shuffled])
def test_questions_with_features_are_about_the_same_pictures(mini, mini_processor, few, tmp_path, condition):
    samples = condition(list(few.samples))
    features = Features(tmp_path, mini, mini_processor, few)
    with_features = Questions(samples, mini_processor, 4, CPU, features)
    with_pixels = Questions(samples, mini_processor, 4, CPU)
    for given, pixels in zip(with_features.batches(""), with_pixels.batches(""), strict=True):
        run = mini.model.vision_tower(pixels["pixel_values"], output_hidden_states=True)
        expected = run.hidden_states[mini.config.vision_feature_layer]
        torch.testing.assert_close(given["pixel_values"][:, 0].float(), expected, atol=2e-2, rtol=1e-2)
        assert torch.equal(given["input_ids"], pixels["input_ids"])


def test_what_cannot_be_kept(llava, mini, processor, mini_processor, few, tmp_path):
    config = Config(data=ShapesData(name="shapes"), results=str(tmp_path), keep_features=True)
    assert keep_features(dataclasses.replace(config, keep_features=False), llava, processor, few) is None
    assert keep_features(config, llava, processor, None) is None
    assert keep_features(config, llava, processor, few).path.parent == tmp_path / "shared"
    assert keep_features(config, mini, mini_processor, few) is not None
    mini.model.compressor.needs = ("text", "text_mask")
    assert keep_features(config, mini, mini_processor, few) is not None
    mini.model.compressor.needs = ("saliency",)
    assert keep_features(config, mini, mini_processor, few) is None
    with pytest.raises(ValueError, match=r"train\.train_vision") as error:
        dataclasses.replace(config, train=TrainConfig(train_vision=True))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="only a LLaVA's features are kept, and this model is a CLIPVisionModel"):
        keep_features(config, llava.model.vision_tower, processor, few)
