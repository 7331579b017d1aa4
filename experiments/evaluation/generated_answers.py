"""Generated answers to the test questions, scored as a public benchmark does, with their blind controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from experiments.config.data_schema import LlavaJsonData
from experiments.config.schema import Config
from experiments.data.length_limit import LengthLimit
from experiments.data.prompts import prompt_inputs
from experiments.data.samples import Sample
from experiments.devices import inference_mode
from experiments.evaluation.vqa_score import gqa_match, vqa_accuracy
from experiments.models.token_reduction import TokenDropper, keep_all_tokens, token_dropper_for_inference

_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {"vqa": vqa_accuracy, "gqa": gqa_match}


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    batch_size: int,
    max_new_tokens: int,
    progress_label: str,
    drop_tokens: TokenDropper = keep_all_tokens,
) -> list[str]:
    """Return the model's answer to each question, by greedy decoding with its own `generate`.

    Args:
        model: The model, on its device.
        processor: Its processor.
        samples: Samples of one question each. Their right answers are not part of the prompt.
        batch_size: Questions of a batch.
        max_new_tokens: Tokens of an answer, at most.
        progress_label: Label of the progress bar.
        drop_tokens: Drops visual tokens in each forward call.

    Raises:
        ValueError: If the processor refuses a sample, or a prompt exceeds the model's positions.

    Example:
        >>> from experiments.data.samples import llava_conversation
        >>> turns = llava_conversation([("is there a square?", "yes")])
        >>> sample = Sample("scene", (lambda: image,), turns, ["existence"])
        >>> generate_answers(model, processor, [sample], 1, max_new_tokens=5, progress_label="answers")
        ['yes']
    """
    positions = LengthLimit.for_model(model.config).positions
    answers: list[str] = []
    for start in tqdm(range(0, len(samples), batch_size), desc=progress_label, leave=False):
        # New samples for each batch, since a sample keeps its decoded images.
        batch = [replace(s, conversations=s.conversations[:-1]) for s in samples[start : start + batch_size]]
        inputs = _to_device(prompt_inputs(processor, batch), model.device)
        width = inputs["input_ids"].shape[1]
        if positions is not None and width > positions:
            longest = int(inputs["attention_mask"].sum(1).argmax())
            raise ValueError(
                f"sample {batch[longest].id}: its {width} tokens exceed the {positions} positions of the model; shorten it, "
                "since questions of generated answers are not truncated"
            )
        with inference_mode(model), drop_tokens(model, inputs):
            generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        answers += processor.tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def generated_part(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    config: Config,
    controls: Mapping[str, Callable[[Sequence[Sample]], list[Sample]]],
) -> dict[str, Any] | None:
    """Return the `generated` part of a cell's record, None where `data.score` asks for no generated answers.

    Args:
        model: The model.
        processor: Its processor.
        samples: The test samples, of one question each.
        config: The cell's configuration.
        controls: Blind controls by name.
    """
    if not isinstance(config.data, LlavaJsonData) or config.data.score == "exact":
        return None
    return measure_generated_answers(
        model,
        processor,
        samples,
        config.data.score,
        config.data.max_new_tokens,
        config.batch_size,
        token_dropper_for_inference(config),
        controls,
    )


def measure_generated_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    score: str,
    max_new_tokens: int,
    batch_size: int,
    drop_tokens: TokenDropper = keep_all_tokens,
    controls: Mapping[str, Callable[[Sequence[Sample]], list[Sample]]] | None = None,
) -> dict[str, Any]:
    """Measure the `generated` part of a record.

    Args:
        model: The model.
        processor: Its processor.
        samples: Samples of one question each, with annotators' answers in all or in none.
        score: `data.score`: vqa or gqa.
        max_new_tokens: Tokens of an answer, at most.
        batch_size: Questions of a batch.
        drop_tokens: Drops visual tokens in each forward call.
        controls: Blind controls by name; each replaces the images of the samples.

    Returns:
        The metric, the number of references of a question, and answers and scores by input.
    """
    references = [sample.annotators[0] if sample.annotators else sample.answers for sample in samples]
    part: dict[str, Any] = {"metric": score, "references": len(references[0]), "max_new_tokens": max_new_tokens}
    for name, replace_images in {"image": list, **(controls or {})}.items():
        label = "generated answers" if name == "image" else f"generated answers, {name} images"
        answers = generate_answers(
            model, processor, replace_images(samples), batch_size, max_new_tokens, label, drop_tokens
        )
        scores = [_METRICS[score](answer, right) for answer, right in zip(answers, references, strict=True)]
        part[name] = {"answers": answers, "scores": scores}
    return part


def _to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch; a stream of pixels is moved as the model reads it."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
