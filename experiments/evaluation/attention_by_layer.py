"""Attention mass, entropy and contribution between token groups, by layer (Figures 2 and 3 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from experiments.config.schema import ProbeConfig
from experiments.data.encoding import restrict_to_answers
from experiments.devices import inference_mode
from experiments.evaluation.questions import EncodedQuestions, ModelInputs, instruction_token_map
from experiments.evaluation.visual_sinks import find_question_sinks, sinks_part
from probes import TokenMap, fusion_depth, record_attention

TEXT_TARGETS = ("instruction", "response")
TOKEN_GROUP_PAIRS = (  # (target, source)
    ("instruction", "vision"),
    ("instruction", "instruction"),
    ("response", "vision"),
    ("response", "instruction"),
)
FUSION_PAIR_INDEX = TOKEN_GROUP_PAIRS.index(("instruction", "vision"))
_DIGITS = 5  # decimal places that records store

Curves = dict[str, Float[np.ndarray, "pairs layers samples_or_heads"]]


def measure_attention(model: PreTrainedModel, questions: EncodedQuestions, config: ProbeConfig) -> dict[str, Any]:
    """Measure the parts `attention`, `contribution` and `sinks` of a record.

    Args:
        model: The model.
        questions: The questions, with pixels.
        config: Which statistics to record, and whether to leave out visual sinks and to add the control.

    Returns:
        The parts. A part that is not configured is None.
    """
    maps = [instruction_token_map(model, inputs) for inputs in questions.batches("token maps")]
    sinks: dict[str, Any] | None = None
    if config.sinks or config.leave_out_sinks:
        found = find_question_sinks(model, questions, maps, TEXT_TARGETS)
        sinks = sinks_part(found, maps, TEXT_TARGETS) | {"left_out": config.leave_out_sinks}
        if config.leave_out_sinks:
            maps = [batch.sinks.leave_out(tokens) for batch, tokens in zip(found, maps, strict=True)]
    measured = attention_statistics(model, questions, maps, config.contribution, "attention")
    head = {"pairs": TOKEN_GROUP_PAIRS, "samples": len(questions)}
    part: dict[str, Any] = {
        **head,
        "queries_note": "a response query is an answer token that is read, not the position that predicts it",
        **{name: nested_lists(measured[name]) for name in ("mass", "entropy")},
        **uniform_attention(model, questions, maps),
        "control": None,
    }
    added = None
    if config.contribution:
        names = {"share": "contribution_share", "by_head": "contribution_by_head"}
        added = {**head, **{key: nested_lists(measured[name]) for key, name in names.items()}, "control": None}
    if config.random_control:
        random = type(model)._from_config(model.config, dtype=model.dtype).to(model.device)
        random_attention = attention_statistics(random, questions, maps, config.contribution, "random weights")
        means = {name: nested_lists(np.nanmean(values, -1)) for name, values in random_attention.items()}
        name = {"name": "same model, random weights"}
        part["control"] = {**name, "mass": means["mass"], "entropy": means["entropy"]}
        if added is not None:
            added["control"] = {**name, "share": means["contribution_share"]}
    part["fusion"] = asdict(fusion_depth(measured["mass"][FUSION_PAIR_INDEX], "attention"))
    return {"attention": part, "contribution": added, "sinks": sinks}


def attention_statistics(
    model: PreTrainedModel,
    questions: EncodedQuestions,
    maps: Sequence[TokenMap],
    contribution: bool,
    progress_label: str,
) -> Curves:
    """Record statistics of `TOKEN_GROUP_PAIRS`.

    The norms of `contribution` depend on a layer's weights and have no common scale. So the share of a source is its
    norm over the sum of the norms of all sources, both as means over heads. It is 0 where no source adds anything.

    Args:
        model: The model.
        questions: The questions.
        maps: Token map of each batch of questions.
        contribution: Record contributions too.
        progress_label: Label of the progress bar.

    Returns:
        `mass`, `entropy` (nats) and `contribution_share` are means over heads, [pairs, layers, samples].
        `contribution_by_head` is the norm as a mean over samples, [pairs, layers, heads].
    """
    statistics = ("entropy", "contribution") if contribution else ("entropy",)
    batches: dict[str, list[Tensor]] = {"mass": [], "entropy": []}
    by_head: list[Tensor] = []
    with inference_mode(model):
        for tokens, inputs in zip(maps, questions.batches(progress_label), strict=True):
            with record_attention(model, tokens, targets=TEXT_TARGETS, statistics=statistics) as record:
                model(**restrict_to_answers(inputs)[0])
            groups = record.sources, record.targets
            for name in ("mass", "entropy"):
                batches[name].append(_select_pairs(getattr(record, name).mean(2), *groups))
            if contribution:
                norms = record.contribution
                batches.setdefault("contribution_share", []).append(_select_pairs(share_of_norms(norms), *groups))
                by_head.append(_select_pairs(norms.movedim(2, -1), *groups))
    curves = {name: torch.cat(parts, 2).numpy() for name, parts in batches.items()}
    if contribution:
        curves["contribution_by_head"] = torch.cat(by_head, 2).nanmean(2).numpy()
    return curves


def share_of_norms(
    norms: Float[Tensor, "layers batch heads targets sources"],
) -> Float[Tensor, "layers batch targets sources"]:
    """Return the norm of each source over the sum over all sources, both as means over heads.

    NaN stays NaN: the target cannot attend to the source. It is 0 where no source adds anything.

    Args:
        norms: `contribution` of an attention record.

    Example:
        >>> share_of_norms(torch.tensor([1.0, 3.0, torch.nan]).view(1, 1, 1, 1, 3)).flatten().tolist()
        [0.25, 0.75, nan]
    """
    means = norms.mean(2)
    total = means.nansum(-1, keepdim=True)
    return torch.where(total > 0, means / total, torch.where(means.isnan(), means, 0))


def _select_pairs(
    values: Float[Tensor, "layers batch targets sources ..."], sources: tuple[str, ...], targets: tuple[str, ...]
) -> Float[Tensor, "pairs layers batch ..."]:
    return torch.stack(
        [values[:, :, targets.index(target), sources.index(source)] for target, source in TOKEN_GROUP_PAIRS]
    )


def uniform_attention(
    model: PreTrainedModel, questions: EncodedQuestions, maps: Sequence[TokenMap]
) -> dict[str, list[float] | None]:
    """Return mass and entropy of each pair for attention spread evenly over all visible positions.

    This entropy is the logarithm of the number of visible source tokens. It is the upper bound for any attention.

    Args:
        model: The model.
        questions: The questions.
        maps: Token map of each batch of questions.

    Returns:
        `uniform_mass` and `uniform_entropy` (nats), one mean over questions for each pair. None for a model that is not
        causal, or whose windows are shorter than the questions: its layers differ in what is visible.
    """
    masses, entropies = [], []
    for tokens, inputs in zip(maps, questions.batches("uniform attention"), strict=True):
        if not _sees_all_earlier(model, inputs):
            return {"uniform_mass": None, "uniform_entropy": None}
        visible = {group: tokens.mask(group).cumsum(1).float() for group in tokens.groups if group != "pad"}
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


def nested_lists(values: np.ndarray) -> list[Any]:
    """Return rounded nested lists with None for undefined values: JSON has no NaN."""
    rounded = np.round(values.astype(np.float64), _DIGITS)
    return np.where(np.isnan(rounded), None, rounded).tolist()  # type: ignore[call-overload]
