"""Training, with a regression test for each fault of the released training code (ictnlp/LLaVA-Mini, commit 47da113).

- Loading a checkpoint reinitialises the projector and the compressor's queries:
  `test_build_model_keeps_all_weights_of_a_checkpoint`.
- Frozen parameters are trained, and trainable ones are not: `test_train_llava_updates_only_trainable_parameters`.
- Pre-fusion cannot be restored from a file, and adapter files lack new modules: tests/llava_mini/test_prefusion.py,
  `test_checkpoint_holds_compressor_and_prefusion`, tests/experiments/training/test_adapters.py.
- Text embeddings are never trained: `test_train_llava_updates_only_trainable_parameters`, and
  tests/llava_mini/test_presets.py.
- Video frames never reach the language model, and a batch of videos alone gives the vision modules no gradient:
  `test_batch_of_videos_gives_every_module_a_gradient`.
- The first stage trains more than the projector, with compression: `test_stage1_trains_the_projector_alone`.
- A broken image is replaced by that of another row: `test_train_llava_with_a_broken_image_raises_with_its_name`.
- A step has 16 rows where the paper states 256: `test_train_llava_step_has_the_configured_rows`.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from transformers import set_seed

from experiments.config import registry as configuration
from experiments.config.data_schema import ShapesData
from experiments.config.schema import CheckpointModel, CompressorConfig, Config, PrefusionConfig, TrainConfig
from experiments.data.encoding import Collator, SampleEncoder
from experiments.data.llava_json import load_llava_json
from experiments.models.build import build_model
from experiments.training.trainer import ConversationDataset, latest_complete_checkpoint, train_llava
from llava_mini import LlavaMiniForConditionalGeneration
from tests.experiments.training.weights import changed_parameters, copy_weights

CPU = torch.device("cpu")
ONE_STEP = TrainConfig(max_steps=1, batch_size=2, warmup_steps=0, lr_scheduler_type="constant", weight_decay=0)
PROJECTOR = {f"model.multi_modal_projector.linear_{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}
BY_STEPS = TrainConfig(max_steps=6, batch_size=4, warmup_steps=1, save_steps=2)
BY_EPOCHS = TrainConfig(
    num_train_epochs=3,
    batch_size=4,
    per_device_train_batch_size=2,
    warmup_steps=0.1,
    save_steps=3,
    group_by_length=True,
    projector_learning_rate=1e-4,
)  # two steps per epoch


@pytest.mark.parametrize(
    ("config", "interrupted_step"),
    [
        (BY_STEPS, 4),
        (BY_EPOCHS, 3),
        (dataclasses.replace(BY_EPOCHS, lora_rank=2), 3),
        (dataclasses.replace(BY_EPOCHS, lora_rank=2), 6),
    ],
    ids=["max_steps", "within an epoch", "adapters", "adapters, at the end"],
)
def test_train_llava_interrupted_and_resumed_gives_the_same_weights(
    mini, mini_processor, shapes_split, tmp_path, config, interrupted_step
):
    start = copy_weights(mini)

    def run(folder) -> dict[str, torch.Tensor]:
        mini.load_state_dict(start)
        set_seed(0)
        train_llava(mini, mini_processor, shapes_split.samples, config, folder, 0, CPU)
        return copy_weights(mini)

    uninterrupted = run(tmp_path / "uninterrupted")
    shutil.copytree(
        tmp_path / "uninterrupted" / f"checkpoint-{interrupted_step}",
        tmp_path / "interrupted" / f"checkpoint-{interrupted_step}",
    )
    incomplete = (
        tmp_path / "interrupted" / f"checkpoint-{interrupted_step + 1}"
    )  # as a kill in the middle of writing leaves it
    incomplete.mkdir()
    (incomplete / "trainer_state.json").write_text('{"global_step"')
    resumed = run(tmp_path / "interrupted")
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
    assert any(not torch.equal(uninterrupted[name], start[name]) for name in uninterrupted)


def test_latest_complete_checkpoint_skips_incomplete_ones(tmp_path):
    assert latest_complete_checkpoint(tmp_path / "none") is None
    for step, state in ((2, 2), (10, 10), (30, 29)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": state}))
    assert latest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize(
    ("settings", "is_trained"),
    [
        ({}, lambda name: "vision_tower" not in name),
        ({"train_vision": True}, lambda name: "post_layernorm" not in name),  # patches do not pass through it
        ({"trainable": "projector"}, lambda name: name in PROJECTOR),
    ],
    ids=["all", "with the vision tower", "projector"],
)
def test_train_llava_updates_only_trainable_parameters(
    mini, mini_processor, mixed_samples, tmp_path, settings, is_trained
):
    before = copy_weights(mini)
    config = dataclasses.replace(ONE_STEP, batch_size=8, **settings)
    train_llava(mini, mini_processor, mixed_samples, config, tmp_path, 0, CPU)
    assert changed_parameters(mini, before) == {name for name, _ in mini.named_parameters() if is_trained(name)}


def test_train_llava_of_a_llava_updates_all_but_the_vision_tower(llava, processor, shapes_split, tmp_path):
    before = copy_weights(llava)
    train_llava(llava, processor, shapes_split.samples, ONE_STEP, tmp_path, 0, CPU)
    assert changed_parameters(llava, before) == {
        name for name, _ in llava.named_parameters() if "vision_tower" not in name
    }


@pytest.fixture(scope="module")
def compose_config():
    configuration.register_configs()
    with initialize_config_module("conf", version_base="1.3"):
        yield lambda *overrides: OmegaConf.to_object(compose("config", list(overrides)))


def test_stage1_trains_the_projector_alone(compose_config, llava, processor, shapes_split, tmp_path):
    """It has no compression and no pre-fusion, and the numbers of the paper's Table 9."""
    config = compose_config("experiment=stage1")
    assert (config.compressor.name, config.prefusion.layers) == ("none", 0)
    stage = config.train
    assert (stage.num_train_epochs, stage.max_steps, stage.batch_size, stage.learning_rate) == (1, 0, 256, 1e-3)
    assert (stage.lr_scheduler_type, stage.warmup_steps, stage.optim) == ("cosine", 0.03, "adamw")
    before = copy_weights(llava)
    small_stage = dataclasses.replace(stage, bf16=False, batch_size=4, per_device_train_batch_size=2)
    history = train_llava(llava, processor, shapes_split.samples, small_stage, tmp_path, 0, CPU)
    assert history[-1]["step"] == 2
    assert changed_parameters(llava, before) == PROJECTOR


def test_stage2_has_the_settings_of_the_paper(compose_config):
    config = compose_config("experiment=stage2")
    assert (config.compressor.name, config.compressor.size, config.prefusion.layers) == ("query", 1, 4)
    stage = config.train
    assert (stage.num_train_epochs, stage.max_steps, stage.batch_size, stage.trainable) == (2, 0, 256, "all")
    assert (stage.learning_rate, stage.projector_learning_rate) == (1e-4, 1e-5)
    assert (stage.lr_scheduler_type, stage.warmup_steps, stage.optim, stage.train_vision) == (
        "cosine",
        0.03,
        "adamw",
        False,
    )


def test_train_llava_with_part_learning_rates_steps_by_them(mini, mini_processor, shapes_split, tmp_path):
    """AdamW's first step changes every weight by the learning rate, whatever the gradient."""
    before = copy_weights(mini)
    part_rates = {"projector_learning_rate": 1e-5, "prefusion_learning_rate": 1e-4}
    config = dataclasses.replace(ONE_STEP, learning_rate=1e-3, **part_rates)
    train_llava(mini, mini_processor, shapes_split.samples, config, tmp_path, 0, CPU)
    for name, value in mini.named_parameters():
        if "vision_tower" not in name:
            largest_change = (value - before[name]).abs().max().item()
            rate = 1e-5 if name in PROJECTOR else 1e-4 if ".prefusion." in name else 1e-3
            assert largest_change == pytest.approx(rate, rel=0.02), name


@pytest.mark.parametrize(
    ("settings", "layers"), [({"trainable": "projector"}, 1), ({}, 0)], ids=["frozen layers", "no layers"]
)
def test_train_llava_with_a_rate_of_prefusion_layers_that_are_not_trained_raises(
    llava, processor, shapes_split, tmp_path, settings, layers
):
    mini = LlavaMiniForConditionalGeneration.from_llava(
        llava, compressor_size=2, prefusion_layers=layers, keep_patches=not layers
    )
    config = dataclasses.replace(ONE_STEP, prefusion_learning_rate=1e-4, **settings)
    with pytest.raises(ValueError, match=r"train\.prefusion_learning_rate: 0\.0001 acts on nothing"):
        train_llava(mini, processor, shapes_split.samples, config, tmp_path, 0, CPU)


def test_train_llava_step_has_the_configured_rows(mini, mini_processor, mixed_samples, tmp_path):
    """Steps and gradients are the same however few rows a forward pass has, and of whatever kind."""
    config = TrainConfig(num_train_epochs=2, batch_size=8, warmup_steps=0, learning_rate=1e-4)
    start, runs = copy_weights(mini), []
    for settings in (
        {},
        {"per_device_train_batch_size": 2},
        {"per_device_train_batch_size": 1, "group_by_length": True},
    ):
        mini.load_state_dict(start)
        log = train_llava(
            mini,
            mini_processor,
            mixed_samples,
            dataclasses.replace(config, **settings),
            tmp_path / str(len(runs)),
            0,
            CPU,
        )
        assert log[-1]["step"] == 2
        runs.append((log[0]["loss"], copy_weights(mini)))
    (loss, weights), *others = runs
    for other_loss, other_weights in others:
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, atol=1e-5, rtol=0, msg=name)


def test_train_llava_by_length_sorts_within_steps_and_reshuffles_each_epoch(llava, processor, shapes_split, tmp_path):
    class RecordingList(list):
        def __getitem__(self, index):
            accessed.append(index)
            return super().__getitem__(index)

    accessed: list[int] = []
    samples = RecordingList(shapes_split.samples)
    config = TrainConfig(num_train_epochs=2, batch_size=4, group_by_length=True)
    train_llava(llava, processor, samples, config, tmp_path, 5, CPU)
    steps = [
        sorted(step.tolist(), key=lambda i: -sum(len(turn["value"]) for turn in shapes_split.samples[i].conversations))
        for epoch in (0, 1)
        for step in torch.randperm(8, generator=torch.Generator().manual_seed(5 + epoch)).split(4)
    ]
    assert accessed == [row for step in steps for row in step]
    assert sorted(steps[0]) != sorted(steps[2])


def test_sizes_are_numbers_of_videos_visual_inputs_and_characters(mixed_samples):
    sizes = ConversationDataset(mixed_samples, None).sizes()
    assert [size[:2] for size in sizes] == [(0, 1)] * 4 + [(0, 0)] + [(1, 1)] * 3
    assert sizes[4][2] == len("is there a ring?no")
    assert not any("pictures" in vars(sample) for sample in mixed_samples[4:])  # none has been loaded


def test_build_model_keeps_all_weights_of_a_checkpoint(mini, mini_processor, llava, processor, tmp_path):
    """Training starts from the weights of the checkpoint, of a LLaVA or a LLaVA-Mini."""
    for name, model, model_processor in (("llava", llava, processor), ("mini", mini, mini_processor)):
        model.save_pretrained(tmp_path / name)
        model_processor.save_pretrained(tmp_path / name)
        config = Config(model=CheckpointModel(name=name, path=str(tmp_path / name)), data=ShapesData(name="shapes"))
        if name == "llava":
            config.compressor, config.prefusion = CompressorConfig("query", 2), PrefusionConfig(1)
        built, _ = build_model(config, None)
        assert isinstance(built, LlavaMiniForConditionalGeneration)
        weights = built.state_dict()
        assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert weights.keys() >= PROJECTOR


def test_checkpoint_holds_compressor_and_prefusion(mini, mini_processor, shapes_split, tmp_path):
    train_llava(
        mini, mini_processor, shapes_split.samples, dataclasses.replace(ONE_STEP, save_steps=1), tmp_path, 0, CPU
    )
    saved = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-1")
    trained = mini.state_dict()
    assert any("compressor" in name for name in trained)
    assert any("prefusion" in name for name in trained)
    assert all(torch.equal(trained[name], value) for name, value in saved.state_dict().items())


def test_batch_of_videos_gives_every_module_a_gradient(mini, mini_processor, mixed_samples):
    encoder = SampleEncoder(mini_processor)
    clips = [encoder(sample) for sample in mixed_samples[-3:]]
    assert [clip["input_ids"].count(mini.config.image_token_id) for clip in clips] == [2 * 4] * 3  # frames x tokens
    mini.model.vision_tower.requires_grad_(False)
    mini(**Collator(mini_processor)(clips)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in mini.parameters() if p.requires_grad)


def test_train_llava_with_a_broken_image_raises_with_its_name(mini, mini_processor, shapes_split, tmp_path):
    rows = []
    for i in range(2):
        shapes_split.samples[i].image.save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "conversations": shapes_split.samples[i].conversations})
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:80])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    samples = load_llava_json(str(tmp_path / "rows.json"), str(tmp_path), "train").samples
    with pytest.raises(ValueError, match=r"1\.png"):
        train_llava(mini, mini_processor, samples, ONE_STEP, tmp_path / "work", 0, CPU)
