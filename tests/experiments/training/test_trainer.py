"""Training, and the faults of the released training code (ictnlp/LLaVA-Mini, commit 47da113): for each a test that would
have caught it.

- its projector and the compressor's queries start anew from a checkpoint: `test_nothing_learned_is_lost_at_the_start`;
- what is frozen trains after all, and the reverse: `test_what_learns`;
- pre-fusion cannot be restored from a file, and adapter files lack new modules: `test_layers_from_a_file` of
  tests/llava_mini/test_prefusion.py, `test_checkpoints_hold_the_new_modules`, `test_lora`;
- text embeddings never learn: `test_what_learns`, and `test_text_embeddings_may_be_detached` of
  tests/llava_mini/test_presets.py;
- frames of videos never reach the language model: `test_a_batch_of_videos_teaches_every_module`;
- a batch of videos alone teaches the vision side nothing: the same;
- the first stage trains more than the projector, with compression: `test_the_first_stage`;
- a broken picture is replaced by another row's: `test_a_broken_picture_ends_training_with_its_name`;
- a step has 16 rows where the paper says 256: `test_a_step_has_as_many_rows_as_configured`.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from transformers import set_seed

from experiments.config import registry as configuration
from experiments.config.schema import (
    CheckpointModel,
    CompressorConfig,
    Config,
    PrefusionConfig,
    ShapesData,
    TrainConfig,
)
from experiments.data.encoding import Collator, Encoder
from experiments.data.llava_json import load_llava_json
from experiments.data.samples import Sample, conversation
from experiments.models import lora
from experiments.models.build import build_model
from experiments.models.from_parts import image_chat_template
from experiments.training.trainer import Conversations, last_checkpoint, share, train
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor
from llava_mini.video import Video

CPU = torch.device("cpu")
ONE_STEP = TrainConfig(steps=1, batch_size=2, warmup=0, schedule="constant", weight_decay=0)
PROJECTOR = {f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


@pytest.fixture
def mini(llava):
    """A LLaVA-Mini on the tiny LLaVA: four visual tokens, one pre-fusion layer."""
    torch.manual_seed(1)
    return LlavaMiniForConditionalGeneration.from_llava(llava, compressor_size=2, prefusion_layers=1)


@pytest.fixture
def mini_processor(processor, mini):
    """Its template, unlike the tiny LLaVA's, knows videos."""
    processor = LlavaMiniProcessor.from_llava(processor, mini.config)
    processor.chat_template = image_chat_template(
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
    )
    return processor


@pytest.fixture
def mixed(few):
    """Four pictures, text alone, and three videos of two frames."""

    def film(level: int) -> Video:
        return Video([Image.new("RGB", (48, 48), (level, i, 0)) for i in (50, 200)])

    text = Sample("t", (), conversation([("is there a ring?", "no")], []), ["x"])
    turns = conversation([("what colour is at row 1 column 2?", "red")], ["<video>"])
    films = [Sample(f"v{level}", (lambda level=level: film(level),), turns, ["x"]) for level in (0, 100, 250)]
    return [*(few.samples[i] for i in range(4)), text, *films]


def values(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}


FULL = TrainConfig(steps=6, batch_size=4, warmup=1, save_every=2)
STAGED = TrainConfig(
    epochs=3, batch_size=4, micro_batch=2, warmup=0.1, save_every=3, group_by_length=True, projector_learning_rate=1e-4
)  # two steps an epoch


@pytest.mark.parametrize(
    ("config", "cut"),
    [(FULL, 4), (STAGED, 3), (dataclasses.replace(STAGED, lora=2), 3), (dataclasses.replace(STAGED, lora=2), 6)],
    ids=["steps", "within an epoch", "adapters", "adapters, at the end"],
)
def test_a_cut_run_ends_with_the_same_weights(mini, mini_processor, few, tmp_path, config, cut):
    start = values(mini)

    def run(folder) -> dict[str, torch.Tensor]:
        mini.load_state_dict(start)
        set_seed(0)
        train(mini, mini_processor, few.samples, config, folder, 0, CPU)
        return values(mini)

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{cut}", tmp_path / "cut" / f"checkpoint-{cut}")
    half = tmp_path / "cut" / f"checkpoint-{cut + 1}"  # what a kill in the middle of writing leaves
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step"')
    resumed = run(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], start[name]) for name in whole)


def test_last_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None
    for step, state in ((2, 2), (10, 10), (30, 29)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": state}))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize(
    ("fields", "learns"),
    [
        ({}, lambda name: "vision_tower" not in name),
        ({"train_vision": True}, lambda name: "post_layernorm" not in name),  # which no patch goes through
        ({"trainable": "projector"}, lambda name: name in PROJECTOR),
    ],
    ids=["all", "with the tower", "projector"],
)
def test_what_learns(mini, mini_processor, mixed, tmp_path, fields, learns):
    before = values(mini)
    config = dataclasses.replace(ONE_STEP, batch_size=8, **fields)
    train(mini, mini_processor, mixed, config, tmp_path, 0, CPU)
    assert changed(mini, before) == {name for name, _ in mini.named_parameters() if learns(name)}


def test_a_plain_llava_learns_too(llava, processor, few, tmp_path):
    before = values(llava)
    train(llava, processor, few.samples, ONE_STEP, tmp_path, 0, CPU)
    assert changed(llava, before) == {name for name, _ in llava.named_parameters() if "vision_tower" not in name}


@pytest.fixture(scope="module")
def composed():
    configuration.register()
    with initialize_config_module("conf", version_base="1.3"):
        yield lambda *overrides: OmegaConf.to_object(compose("config", list(overrides)))


def test_the_first_stage(composed, llava, processor, few, tmp_path):
    """No compression, no pre-fusion, the projector alone, and the numbers of the paper's Table 9."""
    config = composed("experiment=stage1")
    assert (config.compressor.name, config.prefusion.layers) == ("none", 0)
    stage = config.train
    assert (stage.epochs, stage.steps, stage.batch_size, stage.learning_rate) == (1, 0, 256, 1e-3)
    assert (stage.schedule, stage.warmup, stage.optimizer) == ("cosine", 0.03, "adamw")
    before = values(llava)
    small = dataclasses.replace(stage, bf16=False, batch_size=4, micro_batch=2)
    history = train(llava, processor, few.samples, small, tmp_path, 0, CPU)
    assert history[-1]["step"] == 2
    assert changed(llava, before) == PROJECTOR


def test_the_second_stage(composed):
    config = composed("experiment=stage2")
    assert (config.compressor.name, config.compressor.size, config.prefusion.layers) == ("query", 1, 4)
    stage = config.train
    assert (stage.epochs, stage.steps, stage.batch_size, stage.trainable) == (2, 0, 256, "all")
    assert (stage.learning_rate, stage.projector_learning_rate) == (1e-4, 1e-5)
    assert (stage.schedule, stage.warmup, stage.optimizer, stage.train_vision) == ("cosine", 0.03, "adamw", False)


def test_parts_may_have_rates_of_their_own(mini, mini_processor, few, tmp_path):
    """AdamW's first step moves every weight by the rate, whatever the gradient."""
    before = values(mini)
    own = {"projector_learning_rate": 1e-5, "prefusion_learning_rate": 1e-4}
    config = dataclasses.replace(ONE_STEP, learning_rate=1e-3, **own)
    train(mini, mini_processor, few.samples, config, tmp_path, 0, CPU)
    for name, value in mini.named_parameters():
        if "vision_tower" not in name:
            most = (value - before[name]).abs().max().item()
            rate = 1e-5 if name in PROJECTOR else 1e-4 if ".prefusion." in name else 1e-3
            assert most == pytest.approx(rate, rel=0.02), name


def test_a_step_has_as_many_rows_as_configured(mini, mini_processor, mixed, tmp_path):
    """However few a process takes at once, of whatever kind: the same steps with the same gradient."""
    whole = TrainConfig(epochs=2, batch_size=8, warmup=0, learning_rate=1e-4)
    start, runs = values(mini), []
    for fields in ({}, {"micro_batch": 2}, {"micro_batch": 1, "group_by_length": True}):
        mini.load_state_dict(start)
        log = train(
            mini, mini_processor, mixed, dataclasses.replace(whole, **fields), tmp_path / str(len(runs)), 0, CPU
        )
        assert log[-1]["step"] == 2
        runs.append((log[0]["loss"], values(mini)))
    (loss, weights), *others = runs
    for other_loss, other_weights in others:
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "processes", "shared"),
    [(256, 0, 1, (256, 1)), (256, 16, 1, (16, 16)), (256, 16, 8, (16, 2)), (256, 64, 8, (32, 1)), (2, 0, 2, (1, 1))],
)
def test_how_a_step_is_shared(batch_size, micro_batch, processes, shared):
    assert share(TrainConfig(batch_size=batch_size, micro_batch=micro_batch), processes) == shared


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "processes", "said"),
    [
        (10, 0, 4, "train.batch_size 10 cannot be shared evenly by 4 processes"),
        (1, 0, 2, "cannot be shared evenly"),
        (12, 4, 2, "train.micro_batch 4 does not divide the 6 rows that each process takes"),
    ],
)
def test_what_cannot_be_shared(batch_size, micro_batch, processes, said):
    with pytest.raises(ValueError, match=said):
        share(TrainConfig(batch_size=batch_size, micro_batch=micro_batch), processes)


def test_rows_are_sorted_within_a_step_and_drawn_anew_for_each_epoch(llava, processor, few, tmp_path):
    class Watched(list):
        def __getitem__(self, index):
            taken.append(index)
            return super().__getitem__(index)

    taken: list[int] = []
    samples = Watched(few.samples)
    config = TrainConfig(epochs=2, batch_size=4, group_by_length=True)
    train(llava, processor, samples, config, tmp_path, 5, CPU)
    steps = [
        sorted(step.tolist(), key=lambda i: -sum(len(turn["value"]) for turn in few.samples[i].conversations))
        for epoch in (0, 1)
        for step in torch.randperm(8, generator=torch.Generator().manual_seed(5 + epoch)).split(4)
    ]
    assert taken == [row for step in steps for row in step]
    assert sorted(steps[0]) != sorted(steps[2])


def test_sizes_tell_kinds_and_lengths_apart(mixed):
    sizes = Conversations(mixed, None).sizes()
    assert [size[:2] for size in sizes] == [(0, 1)] * 4 + [(0, 0)] + [(1, 1)] * 3
    assert sizes[4][2] == len("is there a ring?no")
    assert not any("pictures" in vars(sample) for sample in mixed[4:])  # none has been looked at


def test_nothing_learned_is_lost_at_the_start(mini, mini_processor, llava, processor, tmp_path):
    """What a checkpoint holds is what training starts from, be it a LLaVA's or a LLaVA-Mini's."""
    for name, model, its_processor in (("llava", llava, processor), ("mini", mini, mini_processor)):
        model.save_pretrained(tmp_path / name)
        its_processor.save_pretrained(tmp_path / name)
        config = Config(model=CheckpointModel(name=name, path=str(tmp_path / name)), data=ShapesData(name="shapes"))
        if name == "llava":
            config.compressor, config.prefusion = CompressorConfig("query", 2), PrefusionConfig(1)
        built, _ = build_model(config, None)
        assert isinstance(built, LlavaMiniForConditionalGeneration)
        found = built.state_dict()
        assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    assert found.keys() >= PROJECTOR


def test_checkpoints_hold_the_new_modules(mini, mini_processor, few, tmp_path):
    train(mini, mini_processor, few.samples, dataclasses.replace(ONE_STEP, save_every=1), tmp_path, 0, CPU)
    saved = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-1")
    trained = mini.state_dict()
    assert any("compressor" in name for name in trained)
    assert any("prefusion" in name for name in trained)
    assert all(torch.equal(trained[name], value) for name, value in saved.state_dict().items())


def test_a_batch_of_videos_teaches_every_module(mini, mini_processor, mixed):
    encoder = Encoder(mini_processor)
    films = [encoder(sample) for sample in mixed[-3:]]
    assert [film["input_ids"].count(mini.config.image_token_id) for film in films] == [2 * 4] * 3  # frames x tokens
    mini.model.vision_tower.requires_grad_(False)
    mini(**Collator(mini_processor)(films)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in mini.parameters() if p.requires_grad)


def test_a_broken_picture_ends_training_with_its_name(mini, mini_processor, few, tmp_path):
    rows = []
    for i in range(2):
        few.samples[i].image.save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "conversations": few.samples[i].conversations})
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:80])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    samples = load_llava_json(str(tmp_path / "rows.json"), str(tmp_path), "train").samples
    with pytest.raises(ValueError, match=r"1\.png"):
        train(mini, mini_processor, samples, ONE_STEP, tmp_path / "work", 0, CPU)


def test_lora(mini, mini_processor, few, tmp_path):
    """Linear maps of the language model's layers learn a change of the given rank; what is new learns in full; the
    adapter alone makes the same of the model that training started from."""
    from peft import PeftModel

    before = values(mini)
    config = dataclasses.replace(ONE_STEP, steps=3, lora=2, learning_rate=1e-2)
    train(mini, mini_processor, few.samples, config, tmp_path, 0, CPU)
    new = ("multi_modal_projector", "compressor", "prefusion")
    maps = {n for n, p in mini.named_parameters() if "language_model.layers" in n and n.endswith("_proj.weight")}
    assert len(maps) == 2 * 7
    assert changed(mini, before) == maps | {n for n, _ in mini.named_parameters() if any(part in n for part in new)}
    for name in maps:
        assert torch.linalg.matrix_rank(mini.get_parameter(name) - before[name], rtol=1e-3) == 2
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert sum(file.get_tensor(key).numel() for key in file.keys()) < sum(p.numel() for p in mini.parameters()) / 2  # noqa: SIM118

    after = values(mini)
    mini.load_state_dict(before)
    again = PeftModel.from_pretrained(mini, tmp_path / "adapter").merge_and_unload()
    assert all(torch.equal(after[name], value) for name, value in again.state_dict().items())


def test_lora_without_peft(llava, processor, few, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match=r"train.lora needs peft: pip install peft"):
        train(llava, processor, few.samples, dataclasses.replace(ONE_STEP, lora=2), tmp_path, 0, CPU)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        *(({name: -1}, f"train.{name}: must be at least 0") for name in ("steps", "epochs", "lora", "micro_batch")),
        *(({name: -0.1}, f"train.{name}: must be at least 0") for name in ("warmup", "weight_decay", "max_grad_norm")),
        ({"batch_size": 0}, "train.batch_size: must be at least 1, found 0"),
        ({"save_every": 0}, "train.save_every: must be at least 1"),
        ({"learning_rate": 0.0}, "train.learning_rate: must be more than 0"),
        ({"projector_learning_rate": float("nan")}, "train.projector_learning_rate: must be more than 0"),
        ({"prefusion_learning_rate": -1e-4}, "train.prefusion_learning_rate: must be more than 0"),
        ({"adam_beta2": 1.0}, "train.adam_beta2: must be below 1"),
        ({"optimizer": "sgd"}, "train.optimizer: no 'sgd'; use adamw or muon"),
        ({"trainable": "tower"}, "train.trainable: no 'tower'; use all or projector"),
        ({"schedule": "cosin"}, "train.schedule: no 'cosin'; use cosine or"),
        ({"trainable": "projector", "lora": 8}, "the projector alone"),
        ({"trainable": "projector", "train_vision": True}, "the projector alone"),
        ({"train_vision": True, "lora": 8}, "leave out train_vision"),
        ({"optimizer": "muon", "projector_learning_rate": 1e-5}, "train.projector_learning_rate: only adamw"),
        ({"optimizer": "muon", "prefusion_learning_rate": 1e-5}, "train.prefusion_learning_rate: only adamw"),
    ],
)
def test_wrong_fields_are_one_line(fields, said):
    with pytest.raises(ValueError, match=said) as error:
        TrainConfig(**fields)
    assert "\n" not in str(error.value)
