"""Analyses by layer of the documents that a model answered: the prompts as the task gives them, with a right answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from transformers import set_seed

from experiments.config.schema import Config, ProbeConfig
from experiments.data.length_limit import LengthLimit
from experiments.data.samples import Sample
from experiments.evaluation.analyses import run_probes
from experiments.evaluation.questions import EncodedQuestions
from experiments.lmms_eval_model.target_answers import analysed_answer

DOCUMENT_PROBES = ("attention", "removal", "onset", "knockout")
"""The analyses that can run on the documents of a benchmark."""
_PARTS_OF_ATTENTION = ("contribution", "sinks", "leave_out_sinks", "random_control")


class BenchmarkQuestions(EncodedQuestions):
    """Documents of benchmarks with an answer each.

    Each pass reads and encodes them again, because the images of a whole benchmark may not fit into memory.

    Args:
        built: The `BuiltModel` that answered the requests.
        requests: One request of each document.
        answers: The answer of each document.

    Raises:
        ValueError: If the processor refuses a document, or one is too long for the model, when it is reached.
    """

    def __init__(self, built: Any, requests: Sequence[Any], answers: Sequence[str]) -> None:
        self._requests = requests
        limit = LengthLimit.for_model(built.model.config, None)
        documents = _DocumentSamples(built, requests, answers)
        super().__init__(documents, built.processor, built.batch_size, built.device, limit=limit, keep=False)

    @property
    def question_types(self) -> list[str]:
        """The task of each document."""
        return [request.args[4] for request in self._requests]


class _DocumentSamples(Sequence[Sample]):
    """Samples of documents, which read their images each time that they are asked for."""

    def __init__(self, built: Any, requests: Sequence[Any], answers: Sequence[str]) -> None:
        self._built, self._requests, self._answers = built, requests, answers

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        request = self._requests[index]
        return replace(self._built.sample(request, self._answers[index]), question_types=[request.args[4]])


def check_document_probes(config: ProbeConfig) -> None:
    """Check that the configured analyses can run on the documents of benchmarks.

    Raises:
        ValueError: If one cannot.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        configured = value is True or (field.name == "view_questions" and value)
        if configured and field.name not in (*DOCUMENT_PROBES, *_PARTS_OF_ATTENTION):
            raise ValueError(
                f"probe.{field.name}: data=lmms has no such analysis, found {value}; leave it out, or use "
                f"probe.{', probe.'.join(DOCUMENT_PROBES)}"
            )


def measure_benchmark_probes(
    built: Any, logged: Iterable[tuple[str, Mapping[str, Any]]], config: Config
) -> dict[str, Any] | None:
    """Run the configured analyses on the documents of a task or group.

    The prompt is that of a document's first request: for multiple choice all requests share it. Documents of text alone have no
    image to hide, and are only listed.

    Args:
        built: The `BuiltModel` that answered them; its `requests` are theirs.
        logged: Task and lmms-eval's log entry of each document.
        config: The cell's configuration.

    Returns:
        The part `probes` of a task's record (`BenchmarkProbes`), None if no analysis is configured.

    Raises:
        ValueError: If a document has no right answer that is a text, or fewer than two documents have an image.
    """
    if not any(getattr(config.probe, name) for name in DOCUMENT_PROBES):
        return None
    requests: dict[tuple[str, int], list[Any]] = {}
    for request in built.requests:
        requests.setdefault((request.args[4], request.args[3]), []).append(request)
    documents: list[dict[str, Any]] = []
    text_alone: list[dict[str, Any]] = []
    first_requests = []
    for task, entry in logged:
        asked = sorted(requests[task, entry["doc_id"]], key=lambda request: request.idx)
        options = [request.args[1] for request in asked] if isinstance(asked[0].args[1], str) else ()
        answer = analysed_answer(task, entry, options)
        document = {"task": task, "doc_id": entry["doc_id"], "answer": answer}
        if built.sample(asked[0]).loaders:
            documents.append(document)
            first_requests.append(asked[0])
        else:
            text_alone.append(document)
    if len(documents) < 2:
        task = (documents + text_alone)[0]["task"]
        raise ValueError(
            f"data.tasks: probe.* of task {task} need at least 2 documents with an image, found {len(documents)}; leave out "
            "the probes, or answer more documents (data.test_samples)"
        )
    answers = [document["answer"] for document in documents]
    shown = config.probe.attention_questions
    set_seed(config.seed)  # of the random weights of the control, so that a resumed cell has the same
    parts = run_probes(
        built.model,
        BenchmarkQuestions(built, first_requests, answers),
        BenchmarkQuestions(built, first_requests[:shown], answers[:shown]),
        config.probe,
    )
    names = ("attention", "contribution", "sinks", "removal", "onset", "knockout", "fusion")
    return {"documents": documents, "without_image": text_alone, **{name: parts[name] for name in names}}
