"""The run of one cell: build the model, train it, evaluate it, and return the record."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from experiments.cell import Cell
from experiments.config.data_schema import LmmsData
from experiments.config.schema import Config, ScratchModel
from experiments.data.bad_entries import write_bad_entries
from experiments.data.encoding import SampleEncoder
from experiments.data.length_limit import LengthLimit
from experiments.data.load import TEXT_BASELINE_SAMPLES, DataSplits
from experiments.data.media_files import check_decodable
from experiments.data.minimal_pairs import check_minimal_pairs, draw_minimal_pairs
from experiments.data.samples import Sample, single_questions
from experiments.data.shapes import require_shape_samples
from experiments.devices import select_device, warn_if_bfloat16_is_slow
from experiments.evaluation.accuracy import (
    accuracy_by_question_type,
    answer_questions,
    blank_images,
    correct_answers,
    outcome_digits,
    shuffled_images,
    validation_scores,
)
from experiments.evaluation.analyses import check_probe_layers, check_questions_have_images, run_probes
from experiments.evaluation.attention_page import attention_page_path, write_attention_page
from experiments.evaluation.flops import forward_cost
from experiments.evaluation.generated_answers import generated_part
from experiments.evaluation.patch_words import (
    SCORED_IMAGES,
    description_corpus,
    measure_patch_words,
    shape_samples,
)
from experiments.evaluation.photo_readout import measure_photo_readout
from experiments.evaluation.questions import EncodedQuestions
from experiments.evaluation.swaps import measure_swaps
from experiments.lmms_eval_model.cell_benchmarks import check_benchmarks, run_benchmarks, score_lines
from experiments.models.build import build_model
from experiments.models.feature_cache import open_feature_cache
from experiments.models.saved_models import check_save_folder, save_model
from experiments.models.token_reduction import (
    check_token_reduction,
    token_dropper_for_inference,
    token_dropper_for_training,
)
from experiments.provenance import provenance
from experiments.training.curriculum import pretrain_from_scratch
from experiments.training.plateau import training_part
from experiments.training.trainer import ADAPTER_FOLDER, train_llava
from llava_mini import LlavaMiniConfig

GUESS_NOTE = f"most frequent answer to the same question text in {TEXT_BASELINE_SAMPLES} training conversations"
CHECKED_SAMPLES = 1000  # of the training split, before training starts; later ones are checked when they are read
BLIND_CONTROLS = {"blank": blank_images, "shuffled": shuffled_images}  # by their names in records
log = logging.getLogger(__name__)


def run_cell(cell: Cell, work: Path, write_record: Callable[[dict[str, Any]], object]) -> dict[str, Any] | None:
    """Run a cell: build its model, train it, evaluate it, write its attention page and its record, and save the model.

    Args:
        cell: The configuration and the data.
        work: Folder of the checkpoints, from which interrupted training resumes.
        write_record: Called with the record, before the model is saved: a failed save loses no result.

    Returns:
        The record. None in all processes but the main one of a distributed training.

    Raises:
        FileNotFoundError: If a file that the configuration names is missing.
        ValueError: If the configuration does not fit the model or the data.
        SaveError: If the model cannot be saved; before anything is computed, where that can be known.
    """
    config, data = cell.config, cell.data
    if config.save:
        check_save_folder(Path(config.save), cell.id)
    if isinstance(config.data, LmmsData):
        check_benchmarks(config)
    torch.set_num_threads(config.threads)
    device = select_device(config.device)
    if config.model.dtype == "bfloat16" or (config.train.trains and config.train.bf16):
        warn_if_bfloat16_is_slow(device)
    model, processor = _build(config, data, device)
    training_log, train_seconds = _train(model, processor, config, data, work, device)
    if config.train.trains and not PartialState().is_main_process:
        return None
    set_seed(config.seed)  # evaluation draws the same numbers whether or not training was interrupted
    if isinstance(config.data, LmmsData):
        results = _benchmark_parts(model, processor, cell)
    else:
        results = _evaluate(model, processor, config, data, device)
    record = {
        "schema": 1,
        "id": cell.id,
        "experiment": config.name,
        "name": cell.label,
        "status": "finished",
        "error": None,
        "config": cell.resolved,
        **results,
        "train": training_part(training_log, config.train) if config.train.trains else None,
        "model": _model_part(model, config, results["cost"]) | {"files": cell.model_files or None},
        "provenance": {"train_seconds": train_seconds, **provenance(device)},
    }
    if part := record.get("benchmarks"):
        log.info("scores:\n%s", "\n".join(score_lines(part)))
    else:
        log.info("accuracy in percent, %s split:\n%s", data.test.name, accuracy_by_question_type(record))
    if config.probe.view_questions:  # ahead of the record: a cell that has one never runs again to write its page
        page = attention_page_path(config.results, cell.id)
        samples = list(islice(single_questions(data.test.samples), config.probe.view_questions))
        write_attention_page(model, processor, samples, page, cell.label)
    write_record(record)
    if config.save:
        save_model(model, processor, work / ADAPTER_FOLDER, Path(config.save), cell.id)
    return record


def _build(config: Config, data: DataSplits, device: torch.device) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build the model, and check that the cell's probes and token reduction fit it before anything is computed."""
    transformers.logging.set_verbosity_error()  # it warns of new weights; load_checkpoint refuses missing ones
    model, processor = build_model(config, data.train)
    check_probe_layers(model, config.probe)
    check_questions_have_images(data.test.samples, config.probe)
    if config.probe.swaps:
        check_minimal_pairs(config.data)
    check_token_reduction(model, config)
    model.to(device)
    return model, processor


def _train(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    config: Config,
    data: DataSplits,
    work: Path,
    device: torch.device,
) -> tuple[list[dict[str, float]], float]:
    """Train the model in place, and return the training log and the seconds. A cell without training returns none.

    The pretraining of a model from scratch belongs to the model: it comes before, also without training.
    """
    if not config.train.trains:
        return [], _pretrain(model, processor, config, data, work, device)
    if data.train is None:
        setting = "max_steps" if config.train.max_steps else "num_train_epochs"
        raise ValueError(
            f"train.{setting}={getattr(config.train, setting)}: data '{config.data.name}' has no training split; set "
            + (
                "data.path and data.images"
                if isinstance(config.data, LmmsData)
                else "data.test_path, and data.path becomes the training split"
            )
        )
    limit = LengthLimit.for_model(model.config, config.data.max_length)
    encoder = SampleEncoder(processor, limit)
    encoder.check(islice(data.train.samples, CHECKED_SAMPLES))
    encoder.check(single_questions(data.test.samples))
    check_decodable(data.test)  # all of it is read after training: a damaged file must not end a run of hours there
    started = time.monotonic()
    _pretrain(model, processor, config, data, work, device)  # ahead of the feature cache: the vision tower names it
    validate = _validation(model, processor, config, data, device, limit)
    training_log = train_llava(
        model,
        processor,
        data.train.samples,
        config.train,
        work,
        config.seed,
        device,
        drop_tokens=token_dropper_for_training(config),
        features=open_feature_cache(config, model, processor, data.train),
        limit=limit,
        validate=validate,
    )
    model.eval()
    return training_log, round(time.monotonic() - started, 1)


def _pretrain(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    config: Config,
    data: DataSplits,
    work: Path,
    device: torch.device,
) -> float:
    """Pretrain a model from scratch in place, and return the seconds. No other model is changed."""
    if not isinstance(config.model, ScratchModel):
        return 0.0
    started = time.monotonic()
    pretrain_from_scratch(model, processor, require_shape_samples(data.train), config.model, work, config.seed, device)
    model.eval()
    return round(time.monotonic() - started, 1)


def _validation(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    config: Config,
    data: DataSplits,
    device: torch.device,
    limit: LengthLimit,
) -> Callable[[], dict[str, float]] | None:
    """Return a function that measures the model on the validation split, None if training measures none."""
    if not config.train.eval_steps or data.validation is None:
        return None
    features = open_feature_cache(config, model, processor, data.validation)
    samples = list(single_questions(data.validation.samples))
    questions = EncodedQuestions(samples, processor, config.batch_size, device, features, limit)
    return partial(validation_scores, model, questions, token_dropper_for_inference(config))


def _evaluate(
    model: PreTrainedModel, processor: ProcessorMixin, config: Config, data: DataSplits, device: torch.device
) -> dict[str, Any]:
    """Return the parts of the record that are measured: cost, data, accuracy and one for each analysis."""
    samples = list(single_questions(data.test.samples))
    features = open_feature_cache(config, model, processor, data.test)
    limit = LengthLimit.for_model(model.config, config.data.max_length)
    questions = EncodedQuestions(samples, processor, config.batch_size, device, features, limit)
    # With pixels: the vision tower is part of the measured cost, and has random weights in the attention control.
    pixel_questions = config.probe.attention_questions if config.probe.attention else 1
    questions_with_pixels = EncodedQuestions(
        samples[:pixel_questions], processor, config.batch_size, device, limit=limit
    )
    cost_question = EncodedQuestions([_question_of_one_image(samples)], processor, 1, device, limit=limit)
    return {
        "cost": forward_cost(model, cost_question, token_dropper_for_inference(config)),
        "data": _data_part(config, data, samples),
        **_answer_parts(model, processor, config, questions, device),
        "generated": generated_part(model, processor, samples, config, BLIND_CONTROLS if config.probe.controls else {}),
        **(probes := run_probes(model, questions, questions_with_pixels, config.probe)),
        "photo_readout": measure_photo_readout(model, questions, data.test.samples) if config.probe.readout else None,
        "patch_words": _patch_words_part(model, processor, config, data, device) if probes["lens"] else None,
        "swaps": _swaps_part(model, processor, config, device, limit) if config.probe.swaps else None,
    }


def _question_of_one_image(samples: Sequence[Sample]) -> Sample:
    """Return the first question about one image, else the first about several, else the first: its cost is measured."""
    return min(samples, key=lambda sample: (not sample.placeholders, len(sample.placeholders) != 1))


def _benchmark_parts(model: PreTrainedModel, processor: ProcessorMixin, cell: Cell) -> dict[str, Any]:
    """Return the parts of a record with benchmarks. The cost is that of the first task's first prompt."""
    part = run_benchmarks(model, processor, cell)
    first, task = next(iter(part["tasks"].items()))
    return {
        "cost": task["cost"]
        | {
            "convention": f"multiply and add are 2; the first prompt of {first} with a one-word answer, counted by torch"
        },
        "data": {
            "name": cell.config.data.name,
            "fingerprint": cell.data.fingerprint,
            "examples": sum(task["documents"] for task in part["tasks"].values()),
        },
        "benchmarks": part,
    }


def _patch_words_part(
    model: PreTrainedModel, processor: ProcessorMixin, config: Config, data: DataSplits, device: torch.device
) -> dict[str, Any] | None:
    """Return the `patch_words` part of scenes whose objects are known, None for other data."""
    test, train = shape_samples(data.test.samples), data.train and shape_samples(data.train.samples)
    if test is None or not train:
        return None
    scenes = test.scenes[:SCORED_IMAGES]
    samples = list(islice(data.test.samples, len(scenes)))
    limit = LengthLimit.for_model(model.config, config.data.max_length)
    questions = EncodedQuestions(samples, processor, config.batch_size, device, limit=limit)
    return measure_patch_words(model, processor, questions, scenes, description_corpus(train))


def _swaps_part(
    model: PreTrainedModel, processor: ProcessorMixin, config: Config, device: torch.device, limit: LengthLimit
) -> dict[str, Any]:
    pairs = draw_minimal_pairs(config.data, config.probe.swap_pairs)
    return measure_swaps(model, processor, pairs, config.batch_size, device, limit)


def _data_part(config: Config, data: DataSplits, samples: list[Sample]) -> dict[str, Any]:
    """Return the `data` part: question types, outcomes of the text-only baseline, and numbers of entries left out.

    The entries left out are listed in a file of the results folder.
    """
    part: dict[str, Any] = {
        "name": config.data.name,
        "split": data.test.name,
        "fingerprint": data.fingerprint,
        "examples": len(samples),
        "kinds": [sample.question_types[0] for sample in samples],
    }
    if data.train is not None:
        baseline = data.text_only_baseline
        correct = [baseline(s.questions[0], s.question_types[0]) == s.answers[0] for s in samples]
        part |= {"guess": outcome_digits(torch.tensor(correct)), "guess_note": GUESS_NOTE}
    if (skipped := data.skipped) is not None:
        entries = [(split, entry) for split, left_out in skipped.items() for entry in left_out]
        part["skipped"] = {split: len(left_out) for split, left_out in skipped.items()}
        part["skipped_file"] = write_bad_entries(entries, Path(config.results), data.fingerprint)
    return part


def _answer_parts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    config: Config,
    questions: EncodedQuestions,
    device: torch.device,
) -> dict[str, Any]:
    """Return the parts `accuracy` and `answers`.

    `accuracy` has one digit per question with its image, and under each blind control. `answers` has the texts that the
    model writes with the image.
    """
    drop_tokens = token_dropper_for_inference(config)
    outcomes, tokens = answer_questions(model, questions, "accuracy", drop_tokens)
    part = {"image": outcome_digits(outcomes)}
    if config.probe.controls:
        for name, replace_images in BLIND_CONTROLS.items():
            control = EncodedQuestions(
                replace_images(questions.samples),
                processor,
                config.batch_size,
                device,
                questions.features,
                LengthLimit.for_model(model.config, config.data.max_length),
            )
            part[name] = outcome_digits(correct_answers(model, control, f"accuracy, {name} images", drop_tokens))
    tokenizer = getattr(processor, "tokenizer", processor)
    return {"accuracy": part, "answers": tokenizer.batch_decode(tokens, skip_special_tokens=True)}


def _model_part(model: PreTrainedModel, config: Config, cost: dict[str, Any]) -> dict[str, Any]:
    """Return the `model` part, by which tables name a row.

    `visual_tokens` enter the language model. `visual_tokens_mean` is the mean over its layers, which is lower if tokens
    are dropped inside it.
    """
    is_mini = isinstance(model.config, LlavaMiniConfig)
    inside = config.prefusion.location == "inside"
    compressor = model.config.compressor if is_mini else "none"
    methods = [name for name in (compressor, config.reduction.name) if name != "none"]
    return {
        "label": "LLaVA-Mini" if is_mini else "LLaVA" if model.config.model_type == "llava" else type(model).__name__,
        "layers": model.config.get_text_config().num_hidden_layers,
        "visual_tokens": cost["visual_tokens"],
        "visual_tokens_mean": cost["visual_tokens_mean"],
        "patches": getattr(model.config, "image_seq_length", cost["visual_tokens"]),
        "prefusion_layers": config.prefusion.layers if inside else model.config.prefusion_layers if is_mini else 0,
        "prefusion_place": config.prefusion.location,
        "compressor": "+".join(methods) or "none",
        "parameters": model.num_parameters(),
    }
