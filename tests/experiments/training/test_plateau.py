"""Training until validation loss stops falling."""

import dataclasses
import multiprocessing
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import set_seed

from experiments.config.data_schema import ShapesData
from experiments.config.schema import Config, ScratchModel, TrainConfig
from experiments.data.samples import single_questions
from experiments.data.shapes import load_shapes
from experiments.evaluation.accuracy import validation_scores
from experiments.evaluation.questions import EncodedQuestions
from experiments.models.feature_cache import VisionFeatureCache
from experiments.sweeps.plan import identify_cell
from experiments.training.plateau import (
    LAST_PLATEAU,
    RATE_FACTOR,
    count_plateaus,
    learning_curve,
    learning_rate_factor,
    training_part,
)
from experiments.training.trainer import latest_complete_checkpoint, train_llava

CPU = torch.device("cpu")
PLATEAU = TrainConfig(
    until="plateau",
    lr_scheduler_type="reduce_lr_on_plateau",
    max_steps=30,
    eval_steps=2,
    patience=1,
    min_improvement=0.9,  # only the first measurement is an improvement
    batch_size=4,
    warmup_steps=2,
    save_steps=3,
)


@pytest.mark.parametrize("patience", [1, 2, 3, 5])
@pytest.mark.parametrize("min_improvement", [0.0, 0.02, 0.3])
def test_count_plateaus_equals_reductions_of_torch(patience, min_improvement):
    rng = np.random.default_rng(patience)
    losses = np.round(np.linspace(2.0, 1.5, 60) + rng.normal(0, 0.1, 60), 2).tolist()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torch_rule = ReduceLROnPlateau(optimizer, factor=0.5, patience=patience - 1, threshold=min_improvement, eps=0)
    for number, loss in enumerate(losses, 1):
        torch_rule.step(loss)
        plateaus = count_plateaus(losses[:number], patience, min_improvement)
        assert optimizer.param_groups[0]["lr"] == 0.5**plateaus
    assert plateaus > 0


def test_learning_rate_factor_warms_up_and_falls_at_each_plateau():
    log = [{"loss": 3.0, "step": 1}, *({"validation_loss": a, "step": 2} for a in (0.4, 0.5, 0.5))]
    config = dataclasses.replace(PLATEAU, min_improvement=0.0)
    assert [learning_rate_factor(config, step, log[:2], 4) for step in (0, 1, 2, 4, 9)] == [0, 0.25, 0.5, 1, 1]
    assert learning_rate_factor(config, 0, log[:2], 0) == 1
    assert learning_rate_factor(config, 9, log[:3], 4) == pytest.approx(RATE_FACTOR)
    assert learning_rate_factor(config, 9, log, 0) == pytest.approx(RATE_FACTOR**2)


def test_plateau_recipe_composes_with_a_validation_split(compose_config):
    overrides = ["train=plateau", "data.validation_samples=5", "data.train_samples=8", "data.test_samples=6"]
    train_config = identify_cell(compose_config(*overrides), overrides).config.train
    assert (train_config.until, train_config.lr_scheduler_type) == ("plateau", "reduce_lr_on_plateau")
    # the warm-up is over at the first measurement, and there is time for more than the two last plateaus
    assert train_config.warmup_steps <= train_config.eval_steps
    assert train_config.max_steps > (LAST_PLATEAU * train_config.patience + 1) * train_config.eval_steps


def test_plateau_recipe_without_validation_split_raises(compose_config):
    overrides = ["train=plateau", "data.train_samples=8", "data.test_samples=6"]
    with pytest.raises(ValueError, match=r"data\.validation_samples: .*40"):
        identify_cell(compose_config(*overrides), overrides)


@pytest.fixture
def validation_samples():
    """Validation scenes with one question each."""
    return list(single_questions(load_shapes("validation", 3).samples))


def train(model, processor, samples, validation_samples, config, folder, features=(None, None)):
    """Train a model, and return the log."""
    questions = EncodedQuestions(validation_samples, processor, 5, CPU, features[1])
    set_seed(0)
    return train_llava(
        model,
        processor,
        samples,
        config,
        folder,
        0,
        CPU,
        features=features[0],
        validate=lambda: validation_scores(model, questions),
    )


def test_validation_scores_equal_those_of_one_question_at_a_time(llava, processor, shapes_split, validation_samples):
    """The loss is the model's own, weighted by the number of answer tokens; the accuracy that of greedy decoding."""
    answers = [processor.tokenizer(s.answers[0] + processor.tokenizer.eos_token).input_ids for s in validation_samples]
    questions = EncodedQuestions(validation_samples, processor, 5, CPU)
    scores = validation_scores(llava, questions)
    losses, tokens = [], []
    with torch.no_grad():
        for inputs in EncodedQuestions(validation_samples, processor, 1, CPU).batches("one"):
            losses.append(llava(**inputs).loss.item())
            tokens.append(int((inputs["labels"] != -100).sum()))
    assert len(answers) == len(losses) == len(questions)
    assert scores["loss"] == pytest.approx(np.average(losses, weights=tokens), rel=1e-5)
    assert scores["accuracy"] == 0.0  # of random weights
    assert llava.training is False


def test_train_llava_until_plateau_stops_at_the_last_plateau(
    llava, processor, shapes_split, validation_samples, tmp_path
):
    log = train(llava, processor, shapes_split.samples, validation_samples, PLATEAU, tmp_path)
    part = training_part(log, PLATEAU)
    last = 2 * (1 + LAST_PLATEAU)
    assert (part["stopped"], part["steps"]) == ("plateau", last)
    assert [point["step"] for point in part["validation"]] == list(range(2, last + 1, 2))
    rates = [1.0, 1.0, RATE_FACTOR]
    assert [point["learning_rate"] for point in part["validation"]] == pytest.approx([1e-3 * r for r in rates])
    assert not any("validation_accuracy" in entry for entry in part["log"])
    questions = EncodedQuestions(validation_samples, processor, 5, CPU)
    after = validation_scores(llava, questions)
    assert part["validation"][-1] == {"step": last, **after, "learning_rate": part["validation"][-1]["learning_rate"]}


def test_train_llava_until_plateau_stops_at_max_steps_while_improving(
    llava, processor, shapes_split, validation_samples, tmp_path
):
    config = dataclasses.replace(PLATEAU, max_steps=5, patience=9)
    part = training_part(train(llava, processor, shapes_split.samples, validation_samples, config, tmp_path), config)
    assert (part["stopped"], part["steps"]) == ("max_steps", 5)
    assert [point["step"] for point in part["validation"]] == [2, 4, 5]


def test_train_llava_by_steps_measures_without_changing_the_weights(
    llava, processor, shapes_split, validation_samples, tmp_path
):
    start = {name: value.clone() for name, value in llava.state_dict().items()}
    config, weights = TrainConfig(max_steps=5, batch_size=4, warmup_steps=1), []
    for eval_steps in (0, 2):
        llava.load_state_dict(start)
        measuring = dataclasses.replace(config, eval_steps=eval_steps)
        log = train(llava, processor, shapes_split.samples, validation_samples, measuring, tmp_path / str(eval_steps))
        weights.append({name: value.clone() for name, value in llava.state_dict().items()})
        assert [point["step"] for point in learning_curve(log)] == ([2, 4, 5] if eval_steps else [])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in start)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize(("save_steps", "interrupted_step"), [(5, 5), (4, 4), (5, 6)])
def test_train_llava_until_plateau_interrupted_and_resumed_gives_the_same_curve_and_weights(
    llava, processor, shapes_split, validation_samples, tmp_path, save_steps, interrupted_step, optim
):
    """Step 5 has no measurement, 4 has one, and at 6 training is over."""
    config = dataclasses.replace(PLATEAU, save_steps=save_steps, optim=optim)
    start = {name: value.clone() for name, value in llava.state_dict().items()}

    def run(folder):
        llava.load_state_dict(start)
        log = train(llava, processor, shapes_split.samples, validation_samples, config, folder)
        return log, {name: value.clone() for name, value in llava.state_dict().items()}

    log, weights = run(tmp_path / "uninterrupted")
    checkpoint = f"checkpoint-{interrupted_step}"
    shutil.copytree(tmp_path / "uninterrupted" / checkpoint, tmp_path / "interrupted" / checkpoint)
    resumed_log, resumed_weights = run(tmp_path / "interrupted")
    assert log[-1]["step"] == 6
    assert resumed_log == log
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_train_llava_with_cached_features_of_both_splits_measures_and_trains_on_them(
    llava, processor, shapes_split, tmp_path
):
    """Each split has a cache of its own, and the measurement leaves that of training in place."""
    config = TrainConfig(max_steps=4, eval_steps=1, batch_size=4, warmup_steps=1)
    validation = load_shapes("validation", 3)
    samples = list(single_questions(validation.samples))
    start, runs = {name: value.clone() for name, value in llava.state_dict().items()}, []
    for cached in (False, True):
        llava.load_state_dict(start)
        features = (None, None)
        if cached:
            features = tuple(
                VisionFeatureCache(tmp_path / "features", llava, processor, split)
                for split in (shapes_split, validation)
            )
        runs.append(train(llava, processor, shapes_split.samples, samples, config, tmp_path / str(cached), features))
    from_pixels, from_features = map(learning_curve, runs)
    assert [point["loss"] for point in from_features] == pytest.approx([p["loss"] for p in from_pixels], rel=1e-2)
    assert runs[1][-1]["step"] == 4
    assert "forward" not in vars(llava.model.vision_tower)


def test_train_llava_with_eval_steps_needs_a_measurement(llava, processor, shapes_split, tmp_path):
    with pytest.raises(ValueError, match=r"train\.eval_steps: 2"):
        train_llava(llava, processor, shapes_split.samples, PLATEAU, tmp_path, 0, CPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"until": "done"}, r"train\.until: .*'done'.*steps or plateau"),
        ({"until": "plateau"}, r"train\.eval_steps: .*found 0"),
        ({"until": "plateau", "eval_steps": 5}, r"train\.lr_scheduler_type: .*reduce_lr_on_plateau.*cosine"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, r"train\.lr_scheduler_type: .*until=steps"),
        (
            {"until": "plateau", "eval_steps": 5, "lr_scheduler_type": "reduce_lr_on_plateau"},
            r"train\.max_steps: until=plateau .* 0 steps",
        ),
        ({"patience": 0}, r"train\.patience: .*at least 1, found 0"),
        ({"min_improvement": -0.1}, r"train\.min_improvement: .*found -0\.1"),
        ({"min_improvement": 1.0}, r"train\.min_improvement: .*below 1, found 1\.0"),
        ({"eval_steps": -1}, r"train\.eval_steps: .*found -1"),
    ],
)
def test_train_config_with_wrong_plateau_settings_raises_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        TrainConfig(**settings)
    assert "\n" not in str(error.value)


def test_config_without_validation_samples_refuses_eval_steps():
    with pytest.raises(ValueError, match=r"data\.validation_samples: train\.eval_steps=5 .*0 samples"):
        Config(data=ShapesData("shapes"), train=TrainConfig(eval_steps=5))


def test_scratch_model_refuses_measurements_of_its_pretraining():
    with pytest.raises(ValueError, match=r"model\.vision_pretraining\.eval_steps: .*found 5"):
        ScratchModel(name="x", vision_pretraining=TrainConfig(eval_steps=5))


@pytest.mark.parametrize("moment", ["training", "measurement"])
def test_train_llava_until_plateau_killed_resumes_to_the_same_curve_and_weights(
    llava, processor, shapes_split, validation_samples, tmp_path, moment
):
    """SIGKILL comes in step 4, after the checkpoint of step 3, or in the measurement after step 4."""
    config = dataclasses.replace(PLATEAU, save_steps=3)
    questions = EncodedQuestions(validation_samples, processor, 5, CPU)
    start = {name: value.clone() for name, value in llava.state_dict().items()}
    reached = tmp_path / "reached"

    def wait_for_the_kill():
        reached.touch()
        time.sleep(600)

    class StoppingSamples(list):
        def __getitem__(self, index):
            if moment == "training" and (tmp_path / "interrupted" / "checkpoint-3" / "trainer_state.json").exists():
                wait_for_the_kill()
            return super().__getitem__(index)

    def stopping_scores():
        scores = validation_scores(llava, questions)
        if moment == "measurement" and (tmp_path / "interrupted" / "checkpoint-3").exists():
            wait_for_the_kill()
        return scores

    def run(folder, samples, validate):
        llava.load_state_dict(start)
        set_seed(0)
        return train_llava(llava, processor, samples, config, tmp_path / folder, 0, CPU, validate=validate)

    def weights():
        return {name: value.clone() for name, value in llava.state_dict().items()}

    samples = list(shapes_split.samples)
    expected = run("uninterrupted", samples, lambda: validation_scores(llava, questions)), weights()
    child = multiprocessing.get_context("fork").Process(
        target=run, args=("interrupted", StoppingSamples(samples), stopping_scores)
    )
    child.start()
    while not reached.exists():
        assert child.is_alive()
        time.sleep(0.01)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    checkpoint = latest_complete_checkpoint(tmp_path / "interrupted")
    assert checkpoint == tmp_path / "interrupted" / "checkpoint-3"
    log = run("interrupted", samples, lambda: validation_scores(llava, questions))
    assert log == expected[0]
    assert log[-1]["step"] == 6
    assert all(torch.equal(value, expected[1][name]) for name, value in weights().items())
