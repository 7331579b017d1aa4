"""The paper's three analyses on test questions: attention mass, attention entropy, removal of visual tokens."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from experiments.config import ProbeConfig
from experiments.evaluation import Inputs, Questions, as_digits, correct
from experiments.models import inference
from probes import FusionDepth, RemoveTokens, TokenMap, fusion_depth, intervene, record_attention

PAIRS = (("instruction", "vision"), ("instruction", "instruction"), ("response", "vision"), ("response", "instruction"))
FUSION_PAIR = PAIRS.index(("instruction", "vision"))
_DIGITS = 5  # kept of each number per sample


def token_map(model: PreTrainedModel, inputs: Inputs) -> TokenMap:
    """The paper's token types: the instruction is the system prompt and the user's text together (section 3)."""
    return TokenMap.from_inputs(model, inputs).merge({"instruction": ["system", "instruction"]})


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
                model(**inputs)
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


def check(model: PreTrainedModel, config: ProbeConfig) -> None:
    """Before anything is measured: can it be?

    Raises:
        ValueError: if a block of layers to remove visual tokens from is larger than the model, or empty.
    """
    layers = model.config.get_text_config().num_hidden_layers
    if not 1 <= config.block <= layers:
        raise ValueError(f"probe.block: a block of {config.block} layers in a model of {layers}; use 1 to {layers}")


def removal(model: PreTrainedModel, questions: Questions, block: int) -> dict[str, Any]:
    """The `removal` part of a record: answers without visual tokens inside each block of layers, and from it onward.

    The paper's Figure 5 drops "all vision tokens in layers a to b" and leaves open which of the two is meant.
    """
    layers = model.config.get_text_config().num_hidden_layers
    starts = range(0, layers, block)
    inside = [_without(model, questions, range(a, min(a + block, layers))) for a in starts]
    onward = [_without(model, questions, range(a, layers)) for a in (*starts, layers)]
    outcomes = np.array([[int(c) for c in condition["correct"]] for condition in onward])
    depth = fusion_depth(outcomes, "removal")
    return {"block": block, "inside": inside, "onward": onward, "fusion": asdict(_in_layers(depth, block, layers))}


def _in_layers(depth: FusionDepth, block: int, layers: int) -> FusionDepth:
    """A depth counted in blocks, counted in layers, to the end of the block; the last one may be shorter."""

    def count(blocks: int) -> int:
        return min(blocks * block, layers)

    return replace(
        depth,
        depth=depth.depth and count(depth.depth),
        low=depth.low and count(depth.low),
        high=depth.high and count(depth.high),
        reads=tuple(map(count, depth.reads)),
        layers=layers,
    )


def _without(model: PreTrainedModel, questions: Questions, layers: range) -> dict[str, Any]:
    def around(inputs: Inputs) -> contextlib.AbstractContextManager[Any]:
        return intervene(model, token_map(model, inputs), RemoveTokens("vision", layers))

    say = f"no vision in layers {layers.start + 1} to {layers.stop}" if layers else "nothing removed"
    return {"layers": list(layers), "correct": as_digits(correct(model, questions, say, around))}


def analyse(
    model: PreTrainedModel, questions: Questions, some: Questions, config: ProbeConfig
) -> dict[str, dict[str, Any] | None]:
    """All that `config` asks for; attention is recorded on `some` questions, removal is scored on all."""
    found: dict[str, dict[str, Any] | None] = {"attention": None, "removal": None, "fusion": None}
    if config.attention:
        found["attention"] = attention(model, some, config.random_control)
    if config.removal:
        found["removal"] = removal(model, questions, config.block)
    depths = {name: part.pop("fusion") for name, part in found.items() if part}
    return found | {"fusion": depths or None}
