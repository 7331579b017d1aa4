"""Two local tasks with four documents each, as a cell answers them: `colours` and `counts`, and `both`, the group of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from PIL import Image

TASK = """
task: {name}
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
generation_kwargs: {{max_new_tokens: 2}}
doc_to_visual: !function tests.lmms.local_tasks.image
doc_to_text: !function tests.lmms.local_tasks.{doc_to_text}
doc_to_target: answer
process_results: !function tests.lmms.local_tasks.{process_results}
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.5}}
"""
DOCUMENTS = {
    "colours": [("red", "red"), ("blue", "blue"), ("red", "red"), ("green", "green")],
    "counts": [("red", "1"), ("blue", "1"), ("red", "2"), ("green", "3")],
}
"""Colour of the image and right answer of each document, by task."""
KILL_VARIABLE = "KILL_AT_COUNTS"
"""If this variable is set, the process is killed when it makes the prompt of the second task."""


def write_local_tasks(folder: Path) -> Path:
    """Write the data sets and the task files, and return the folder of the task files."""
    for name, documents in DOCUMENTS.items():
        rows = [
            {"image": Image.new("RGB", (48, 48), colour), "question": f"{name} {number}?", "answer": answer}
            for number, (colour, answer) in enumerate(documents)
        ]
        DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk(folder / name)
        write_task(folder, name)
    (folder / "tasks" / "both.yaml").write_text("group: both\ntask: [colours, counts]\n")
    return folder / "tasks"


def write_task(folder: Path, name: str, data: str | None = None, process_results: str = "score") -> None:
    """Write one task file. `data` names the data set if it is not the task."""
    (folder / "tasks").mkdir(exist_ok=True)
    text = TASK.format(
        name=name,
        data=folder / (data or name),
        doc_to_text="dangerous_question" if name == "counts" else "question",
        process_results=process_results,
    )
    (folder / "tasks" / f"{name}.yaml").write_text(text)


def image(document: dict[str, Any]) -> list[Image.Image]:
    """Return the image of a document."""
    return [document["image"]]


def question(document: dict[str, Any]) -> str:
    """Return the question of a document."""
    return document["question"]


def dangerous_question(document: dict[str, Any]) -> str:
    """Return the question of a document, unless the process is to be killed here."""
    if os.environ.get(KILL_VARIABLE):
        os.kill(os.getpid(), signal.SIGKILL)
    return document["question"]


def score(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the answer is right."""
    return {"right": float(results[0] == document["answer"])}


def no_score(document: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Return nothing that is aggregated."""
    return {"submission": results[0]}
