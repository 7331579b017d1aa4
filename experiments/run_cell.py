"""One cell: a config in, a record out."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from experiments.cell import Cell
from experiments.config.schema import Config, ScratchModel
from experiments.data import shapes
from experiments.data.load import GUESS_IMAGES, Data
from experiments.data.samples import Sample, single_questions
from experiments.devices import choose_device
from experiments.evaluation import analyses
from experiments.evaluation.accuracy import blank, by_kind, correct, digits, shuffled
from experiments.evaluation.flops import forward_cost
from experiments.evaluation.questions import Questions
from experiments.models import token_reduction
from experiments.models.build import build_model
from experiments.models.feature_cache import keep_features
from experiments.provenance import provenance
from experiments.training import curriculum, trainer
from llava_mini import LlavaMiniConfig

log = logging.getLogger(__name__)
GUESS_NOTE = f"most frequent answer to the same question text in {GUESS_IMAGES} training conversations"


def run_cell(cell: Cell, work: Path) -> dict[str, Any] | None:
    """Run a cell and return its record, None in a helping process.

    Args:
        work: Where it keeps its checkpoints, from which it goes on where it was cut.
    """
    config, data = cell.config, cell.data
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    transformers.logging.set_verbosity_error()  # it tells of weights that are new on purpose; load() refuses missing ones
    model, processor = build_model(config, data.train)
    analyses.check(model, config.probe)
    token_reduction.check(model, config)
    model.to(device)
    log_history, train_seconds = _train(model, processor, config, data, work, device)
    if config.train.trains and not PartialState().is_main_process:
        return None  # of several processes that train together, one measures and writes
    set_seed(config.seed)  # what measuring draws is the same after a training that was cut and resumed

    samples = list(single_questions(data.test.samples))
    features = keep_features(config, model, processor, data.test)
    questions = Questions(samples, processor, config.batch_size, device, features)
    # With their pixels: the tower is part of the cost of the first, and has random weights in attention's control.
    looked_at = config.probe.attention_questions if config.probe.attention else 1
    some = Questions(samples[:looked_at], processor, config.batch_size, device)
    record: dict[str, Any] = {
        "schema": 1,
        "id": cell.id,
        "experiment": config.name,
        "name": cell.label,
        "status": "finished",
        "error": None,
        "config": cell.resolved,
        "cost": forward_cost(model, some, token_reduction.in_answering(config)),
        "data": _data_part(config, data, samples),
        "accuracy": _accuracy(model, processor, config, questions, device),
        **analyses.analyse(model, questions, some, config.probe),
        "train": {"log": log_history} if config.train.trains else None,
    }
    record["model"] = _model_part(model, config, record["cost"])
    record["provenance"] = {"train_seconds": train_seconds, **provenance(device)}
    log.info("percent right, %s:\n%s", record["data"]["split"], by_kind(record))
    if config.save:
        _save(model, processor, work / trainer.ADAPTER, Path(config.save))
    return record


def _train(
    model: PreTrainedModel, processor: ProcessorMixin, config: Config, data: Data, work: Path, device: torch.device
) -> tuple[list[dict[str, float]], float]:
    if not config.train.trains:
        return [], 0.0
    if data.train is None:
        amount = f"train.steps={config.train.steps}" if config.train.steps else f"train.epochs={config.train.epochs}"
        raise ValueError(f"data '{config.data.name}' has no training split to take {amount} from: give data.test_path")
    started = time.monotonic()
    if isinstance(config.model, ScratchModel) and trainer.last_checkpoint(work) is None:
        curriculum.school(model, processor, shapes.scenes_of(data.train), config.model, work, config.seed, device)
    around = token_reduction.in_training(config)
    features = keep_features(config, model, processor, data.train)
    history = trainer.train(
        model, processor, data.train.samples, config.train, work, config.seed, device, around, features
    )
    model.eval()
    return history, round(time.monotonic() - started, 1)


def _accuracy(
    model: PreTrainedModel, processor: ProcessorMixin, config: Config, questions: Questions, device: torch.device
) -> dict[str, str]:
    around = token_reduction.in_answering(config)
    found = {"image": digits(correct(model, questions, "accuracy", around))}
    if config.probe.controls:
        for condition in (blank, shuffled):
            changed = Questions(condition(questions.samples), processor, config.batch_size, device, questions.features)
            found[condition.__name__] = digits(correct(model, changed, f"{condition.__name__} pictures", around))
    return found


def _data_part(config: Config, data: Data, samples: list[Sample]) -> dict[str, Any]:
    part: dict[str, Any] = {
        "name": config.data.name,
        "split": data.test.name,
        "fingerprint": data.fingerprint,
        "examples": len(samples),
        "kinds": [sample.kinds[0] for sample in samples],
    }
    if data.train is not None:
        right = [data.guess(s.questions[0], s.kinds[0]) == s.answers[0] for s in samples]
        part |= {"guess": digits(torch.tensor(right)), "guess_note": GUESS_NOTE}
    return part


def _model_part(model: PreTrainedModel, config: Config, cost: dict[str, Any]) -> dict[str, Any]:
    """What tables name a row by. `visual_tokens` enter the language model; `visual_tokens_mean` is the mean over its
    layers, which is less where some leave on the way."""
    mini = isinstance(model.config, LlavaMiniConfig)
    inside = config.prefusion.place == "inside"
    compressor = model.config.compressor if mini else "none"
    methods = [name for name in (compressor, config.reduction.name) if name != "none"]
    return {
        "label": "LLaVA-Mini" if mini else "LLaVA" if model.config.model_type == "llava" else type(model).__name__,
        "layers": model.config.get_text_config().num_hidden_layers,
        "visual_tokens": cost["visual_tokens"],
        "visual_tokens_mean": cost["visual_tokens_mean"],
        "patches": getattr(model.config, "image_seq_length", cost["visual_tokens"]),
        "prefusion_layers": config.prefusion.layers if inside else model.config.prefusion_layers if mini else 0,
        "prefusion_place": config.prefusion.place,
        "compressor": "+".join(methods) or "none",
        "parameters": model.num_parameters(),
    }


def _save(model: PreTrainedModel, processor: ProcessorMixin, adapter: Path, folder: Path) -> None:
    """Save aside, then rename: a folder that is there is whole. An adapter that was trained is saved too, by itself."""
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    processor.save_pretrained(aside)
    if adapter.is_dir():
        shutil.copytree(adapter, aside / trainer.ADAPTER)
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
