"""The attention page of a cell: what each word of some test questions attends to in the image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from experiments.data.samples import Sample
from experiments.errors import one_line
from probes.ask import ask
from probes.view import AttentionView
from probes.view.run_data import ViewRun

VIEWS = "views"  # folder beside the records
log = logging.getLogger(__name__)


def attention_page_path(results: str, identity: str) -> Path:
    """Return the file of a cell's attention page.

    Args:
        results: The results folder.
        identity: Identity of the cell.
    """
    return Path(results) / VIEWS / f"{identity}.html"


def write_attention_page(
    model: PreTrainedModel, processor: ProcessorMixin, samples: Sequence[Sample], path: Path, title: str
) -> None:
    """Let the model answer some questions about images, and write one page of its attention.

    A model or a sample that the page cannot show is named in the log: the cell's record does not depend on the page.

    Args:
        model: The model.
        processor: Its processor.
        samples: Samples with one question each.
        path: The page.
        title: Its title.
    """
    runs: list[ViewRun] = []
    for sample in samples:
        question, right_answer = sample.questions[0], sample.answers[0]
        images = [image for image in sample.visual_inputs if isinstance(image, Image.Image)]
        try:
            if len(images) < len(sample.loaders):
                raise ValueError("videos are not shown")
            answer = ask(model, processor, question, images)
        except (ValueError, RuntimeError) as error:
            log.warning("attention page: sample %s is left out: %s", sample.id, one_line(error))
            continue
        runs += answer.view(f"{question} Answer: {answer.text}. Right: {right_answer}.").runs
    if runs:
        path.parent.mkdir(parents=True, exist_ok=True)
        log.info("attention page %s", AttentionView(runs, title).save(path))
