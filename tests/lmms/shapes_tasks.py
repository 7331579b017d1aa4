"""Questions about shapes as tasks of lmms-eval: one image, two images, text alone, a clip and a folder of frames, mixed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from PIL import Image

from experiments.data.samples import Sample, single_questions
from experiments.data.shapes import load_shapes
from experiments.data.shapes_video import load_shapes_video
from tests.lmms.clips import write_clip

TASK = """
task: {name}
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: {output_type}
doc_to_visual: !function tests.lmms.shapes_tasks.visuals
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function tests.lmms.shapes_tasks.{process_results}
{options}
metric_list:
  - {{metric: correct, aggregation: mean, higher_is_better: true}}
"""
CHOICE_TASK = """
task: shapes_choice
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function tests.lmms.shapes_tasks.visuals
doc_to_text: "{{{{question}}}}"
doc_to_target: !function tests.lmms.shapes_tasks.answer
doc_to_choice: !function tests.lmms.shapes_tasks.choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@dataclass(frozen=True)
class Question:
    """A question, the images of its sample, and the frames of its videos."""

    question: str
    answer: str
    images: list[Image.Image]
    frames: list[Image.Image]

    def sample(self, frames_as_images: bool) -> Sample:
        """Return the question as a sample of the project."""
        from llava_mini.video import Video

        images, videos = list(self.images), [Video(self.frames)] if self.frames else []
        if frames_as_images:
            images, videos = images + self.frames, []
        loaders = tuple((lambda visual=visual: visual) for visual in [*images, *videos])
        placeholders = "<image>\n" * len(images) + "<video>\n" * len(videos)
        turns = [{"from": "human", "value": placeholders + self.question}, {"from": "gpt", "value": self.answer}]
        return Sample(self.question, loaders, turns, ["any"])


def questions() -> list[Question]:
    """Return 16 questions of the five kinds, in an order that mixes them."""
    singles = list(single_questions(load_shapes("test", 4).samples))[:8]
    clips = list(single_questions(load_shapes_video("test", 4).samples))[::4]
    one_image = [Question(s.questions[0], s.answers[0], s.visual_inputs, []) for s in singles]
    two_images = [Question(q.question, q.answer, q.images + one_image[-1].images, []) for q in one_image[:2]]
    text = [Question(q.question, q.answer, [], []) for q in one_image[2:4]]
    videos = [Question(s.questions[0], s.answers[0], [], list(s.visual_inputs[0])) for s in clips]
    mixed = [*one_image, *two_images, *text, *videos]
    return [mixed[i] for i in np.random.default_rng(0).permutation(len(mixed))]


def write_tasks(folder: Path) -> list[Question]:
    """Write the questions, their clips and the task files to a folder, and return the questions.

    Every second clip is a folder of its frames.
    """
    documents: list[dict[str, Any]] = []
    items = questions()
    for i, item in enumerate(items):
        video = ""
        if item.frames and i % 2:
            path = folder / "frames" / f"{i}"
            path.mkdir(parents=True)
            for j, frame in enumerate(item.frames):
                frame.save(path / f"{j}.png")
            video = str(path)
        elif item.frames:
            video = str(write_clip(folder / "clips" / f"{i}.mov", [np.asarray(frame) for frame in item.frames]))
        documents.append({"question": item.question, "answer": item.answer, "images": item.images, "video": video})
    data = folder / "data"
    DatasetDict({"test": Dataset.from_list(documents)}).save_to_disk(data)
    tasks = folder / "tasks"
    tasks.mkdir()
    generation = "generation_kwargs: {max_new_tokens: 3, temperature: 0}"
    for name, output_type, options in (("write", "generate_until", generation), ("score", "loglikelihood", "")):
        text = TASK.format(
            name=f"shapes_{name}",
            data=data,
            output_type=output_type,
            options=options,
            process_results=f"{name}_results",
        )
        (tasks / f"{name}.yaml").write_text(text)
    (tasks / "choice.yaml").write_text(CHOICE_TASK.format(data=data))
    return items


def visuals(document: dict[str, Any]) -> list[Any]:
    """Return the images of a document, and the path of its clip or its folder of frames."""
    return [*document["images"], *([document["video"]] if document["video"] else [])]


def choices(document: dict[str, Any]) -> list[str]:
    """Return the right answer, and four wrong ones."""
    wrong = [word for word in ("yes", "no", "red", "ring", "2") if word != document["answer"]]
    return [wrong[0], wrong[1], document["answer"], wrong[2], wrong[3]]


def answer(document: dict[str, Any]) -> str:
    """Return the right answer. A template that writes a digit would mean the number of a choice."""
    return document["answer"]


def write_results(document: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Return whether a written answer is the right one."""
    return {"correct": float(results[0] == document["answer"])}


def score_results(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Return whether greedy decoding writes the right answer, and the loss of the right answer."""
    loss, is_greedy = results[0]
    return {"correct": float(is_greedy), "loss": loss}
