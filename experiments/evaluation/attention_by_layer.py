"""TODO"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from experiments.data.encoding import on_answers
from experiments.devices import inference
from experiments.evaluation.questions import Questions, token_map
from probes import fusion_depth, record_attention

PAIRS = (("instruction", "vision"), ("instruction", "instruction"), ("response", "vision"), ("response", "instruction"))


FUSION_PAIR = PAIRS.index(("instruction", "vision"))


_DIGITS = 5  # kept of each number per sample


def _pairs(
    values: Float[Tensor, "layers batch targets sources"], groups: tuple[str, ...], targets: tuple[str, ...]
) -> Tensor:
    return torch.stack([values[:, :, targets.index(t), groups.index(s)] for t, s in PAIRS])


def attention_by_layer(
    model: PreTrainedModel, questions: Questions, say: str
) -> dict[str, Float[np.ndarray, "pairs layers samples"]]:
    """Mass and entropy (nats) between the token groups of PAIRS, mean over heads, for each question."""
    parts: dict[str, list[Tensor]] = {"mass": [], "entropy": []}
    with inference(model):
        for inputs in questions.batches(say):
            with record_attention(model, token_map(model, inputs), targets=("instruction", "response")) as record:
                model(**on_answers(inputs)[0])
            for name, part in parts.items():
                part.append(_pairs(getattr(record, name).mean(2), record.sources, record.targets))
    return {name: torch.cat(part, -1).numpy() for name, part in parts.items()}


def uniform_attention(model: PreTrainedModel, questions: Questions) -> dict[str, list[float]]:
    """What attention spread evenly over all visible positions would give: the mass of each pair, and the entropy.

    The entropy, ln of the number of visible source tokens, is the most that any attention can reach.
    """
    mass, entropy = [], []
    for inputs in questions.batches("uniform attention"):
        tokens = token_map(model, inputs)
        seen = {group: tokens.mask(group).cumsum(1).float() for group in ("instruction", "response", "vision")}
        everything = sum(seen.values())
        for_pair = []
        for target, source in PAIRS:
            queries = tokens.mask(target) & (seen[source] > 0)
            count = queries.sum(1)
            share = torch.where(queries, seen[source] / everything, 0).sum(1) / count
            most = torch.where(queries, seen[source].clamp(min=1).log(), 0).sum(1) / count
            for_pair.append(torch.stack([share, most]))
        mass_and_entropy = torch.stack(for_pair, 1)  # [2, pairs, batch]
        mass.append(mass_and_entropy[0])
        entropy.append(mass_and_entropy[1])
    return {
        "uniform_mass": torch.cat(mass, 1).nanmean(1).tolist(),
        "uniform_entropy": torch.cat(entropy, 1).nanmean(1).tolist(),
    }


def attention(model: PreTrainedModel, questions: Questions, control: bool) -> dict[str, Any]:
    """The `attention` part of a record; `control` adds the same model with random weights."""
    found = attention_by_layer(model, questions, "attention")
    part: dict[str, Any] = {
        "pairs": PAIRS,
        "samples": len(questions),
        "queries_note": "a response query is an answer token that is read, not the position that predicts it",
        **{name: _nullable(values) for name, values in found.items()},
        **uniform_attention(model, questions),
        "control": None,
    }
    if control:
        random = type(model)._from_config(model.config, dtype=model.dtype).to(model.device)
        means = {k: np.nanmean(v, -1) for k, v in attention_by_layer(random, questions, "random weights").items()}
        part["control"] = {"name": "same model, random weights", **{k: _nullable(v) for k, v in means.items()}}
    part["fusion"] = asdict(fusion_depth(found["mass"][FUSION_PAIR], "attention"))
    return part


def _nullable(values: np.ndarray) -> list[Any]:
    """Nested lists rounded for storage, None where undefined: JSON has no NaN."""
    rounded = np.round(values.astype(np.float64), _DIGITS)
    return np.where(np.isnan(rounded), None, rounded).tolist()  # type: ignore[call-overload]
