"""Attention mass and entropy between token groups, by layer (Figures 2 and 3 of the paper)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from experiments.data.encoding import restrict_to_answers
from experiments.devices import inference_mode
from experiments.evaluation.questions import EncodedQuestions, ModelInputs, instruction_token_map
from probes import fusion_depth, record_attention

TOKEN_GROUP_PAIRS = (  # (target, source)
    ("instruction", "vision"),
    ("instruction", "instruction"),
    ("response", "vision"),
    ("response", "instruction"),
)
FUSION_PAIR_INDEX = TOKEN_GROUP_PAIRS.index(("instruction", "vision"))
_DIGITS = 5  # decimal places that records store


def measure_attention(model: PreTrainedModel, questions: EncodedQuestions, control: bool) -> dict[str, Any]:
    """Measure the `attention` part of a record.

    Args:
        model: The model.
        questions: The questions, with pixels.
        control: Add the attention of the same model with random weights.
    """
    measured = attention_mass_and_entropy(model, questions, "attention")
    part: dict[str, Any] = {
        "pairs": TOKEN_GROUP_PAIRS,
        "samples": len(questions),
        "queries_note": "a response query is an answer token that is read, not the position that predicts it",
        **{name: _nested_lists(values) for name, values in measured.items()},
        **uniform_attention(model, questions),
        "control": None,
    }
    if control:
        random = type(model)._from_config(model.config, dtype=model.dtype).to(model.device)
        random_attention = attention_mass_and_entropy(random, questions, "random weights")
        means = {name: _nested_lists(np.nanmean(values, -1)) for name, values in random_attention.items()}
        part["control"] = {"name": "same model, random weights", **means}
    part["fusion"] = asdict(fusion_depth(measured["mass"][FUSION_PAIR_INDEX], "attention"))
    return part


def attention_mass_and_entropy(
    model: PreTrainedModel, questions: EncodedQuestions, progress_label: str
) -> dict[str, Float[np.ndarray, "pairs layers samples"]]:
    """Record `mass` and `entropy` (nats) of `TOKEN_GROUP_PAIRS` for each question, as means over heads.

    Args:
        model: The model.
        questions: The questions.
        progress_label: Label of the progress bar.
    """
    batches: dict[str, list[Tensor]] = {"mass": [], "entropy": []}
    with inference_mode(model):
        for inputs in questions.batches(progress_label):
            tokens = instruction_token_map(model, inputs)
            with record_attention(model, tokens, targets=("instruction", "response")) as record:
                model(**restrict_to_answers(inputs)[0])
            for name, parts in batches.items():
                parts.append(_select_pairs(getattr(record, name).mean(2), record.sources, record.targets))
    return {name: torch.cat(parts, -1).numpy() for name, parts in batches.items()}


def _select_pairs(
    values: Float[Tensor, "layers batch targets sources"], sources: tuple[str, ...], targets: tuple[str, ...]
) -> Float[Tensor, "pairs layers batch"]:
    return torch.stack(
        [values[:, :, targets.index(target), sources.index(source)] for target, source in TOKEN_GROUP_PAIRS]
    )


def uniform_attention(model: PreTrainedModel, questions: EncodedQuestions) -> dict[str, list[float] | None]:
    """Return mass and entropy of each pair for attention spread evenly over all visible positions.

    This entropy is the logarithm of the number of visible source tokens. It is the upper bound for any attention.

    Returns:
        `uniform_mass` and `uniform_entropy` (nats), one mean over questions for each pair. None for a model that is not
        causal, or whose windows are shorter than the questions: its layers differ in what is visible.
    """
    masses, entropies = [], []
    for inputs in questions.batches("uniform attention"):
        if not _sees_all_earlier(model, inputs):
            return {"uniform_mass": None, "uniform_entropy": None}
        tokens = instruction_token_map(model, inputs)
        visible = {group: tokens.mask(group).cumsum(1).float() for group in ("instruction", "response", "vision")}
        all_visible = sum(visible.values())
        by_pair = []
        for target, source in TOKEN_GROUP_PAIRS:
            queries = tokens.mask(target) & (visible[source] > 0)
            query_count = queries.sum(1)
            mass = torch.where(queries, visible[source] / all_visible, 0).sum(1) / query_count
            entropy = torch.where(queries, visible[source].clamp(min=1).log(), 0).sum(1) / query_count
            by_pair.append(torch.stack([mass, entropy]))
        mass_and_entropy = torch.stack(by_pair, 1)  # [2, pairs, batch]
        masses.append(mass_and_entropy[0])
        entropies.append(mass_and_entropy[1])
    return {
        "uniform_mass": torch.cat(masses, 1).nanmean(1).tolist(),
        "uniform_entropy": torch.cat(entropies, 1).nanmean(1).tolist(),
    }


def _sees_all_earlier(model: PreTrainedModel, inputs: ModelInputs) -> bool:
    """Return whether every position attends to itself and to all earlier positions, and to no other."""
    config, length = model.config.get_text_config(), inputs["input_ids"].shape[1]
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    # Processors give token types to models that attend both ways inside an image (Gemma 3) or a prefix (PaliGemma).
    return "token_type_ids" not in inputs and all(window is None or window >= length for window in windows)


def _nested_lists(values: np.ndarray) -> list[Any]:
    """Return rounded nested lists with None for undefined values: JSON has no NaN."""
    rounded = np.round(values.astype(np.float64), _DIGITS)
    return np.where(np.isnan(rounded), None, rounded).tolist()  # type: ignore[call-overload]
