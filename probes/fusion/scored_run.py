"""One forward pass for a point of a curve, and its score after checks of what the score reads and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.tokens.answer_positions import answer_positions
from probes.tokens.token_map import TokenMap

# Returns one score for each sample, such as right or wrong, or a log-probability, from the logits of a forward pass.
ScoreFunction = Callable[[Float[Tensor, "batch positions vocabulary"]], Float[Tensor, " batch"]]


def run_and_score(
    model: PreTrainedModel, tokens: TokenMap, inputs: Mapping[str, Any], score: ScoreFunction
) -> Float[Tensor, " batch"]:
    """Run the model without a cache, and return its scores.

    Nothing is generated, so no cache is needed; and a cache for sliding windows fails when tokens are missing.

    Args:
        model: A transformers model with a decoder, in eval mode and without wrappers.
        tokens: Map of `inputs`.
        inputs: Arguments of the model's forward call.
        score: Returns one score for each sample from the logits.

    Raises:
        TypeError: The score is no tensor.
        ValueError: The score does not have one number for each row. Or it changes when other logits, or the row's logits
            before its answer, are put at padding.

    Example:
        >>> from probes.fusion.curves import answer_logprob
        >>> run_and_score(model, tokens, inputs, answer_logprob(tokens, [5])).shape
        torch.Size([1])
    """
    logits = model(**{**inputs, "use_cache": False, "return_dict": True}).logits
    scores = score(logits)
    if not isinstance(scores, Tensor):
        raise TypeError(f"score: it returned a {type(scores).__name__}; return a tensor with one number for each row")
    if list(scores.shape) != [len(logits)]:
        raise ValueError(
            f"score: it returned shape {list(scores.shape)}; return one number for each of {len(logits)} rows"
        )
    return _check_padding(score, scores.clone(), logits, tokens)


def require_whole_image(model: PreTrainedModel, tokens: TokenMap, inputs: Mapping[str, Any]) -> None:
    """Check that the group `vision` has every visual token of the inputs.

    A curve hides that group alone. Visual tokens in a group of their own would be left in.

    Args:
        model: The model.
        tokens: Map of `inputs`.
        inputs: Arguments of the model's forward call.

    Raises:
        ValueError: Other groups have visual tokens.
    """
    if inputs.get("input_ids") is None:  # embeddings do not tell which positions are visual
        return
    built = TokenMap.from_inputs(model, {name: inputs.get(name) for name in ("input_ids", "attention_mask")})
    outside = built.mask("vision") & ~tokens.mask("vision").to(built.labels.device)
    if outside.any():
        groups = sorted({tokens.groups[label] for label in tokens.labels[outside.to(tokens.labels.device)].tolist()})
        raise ValueError(
            f"tokens: {int(outside.sum())} visual tokens are in {', '.join(groups)}, and a curve hides 'vision' alone; "
            "pass the map of all the inputs"
        )


def _check_padding(
    score: ScoreFunction,
    scores: Float[Tensor, " batch"],
    logits: Float[Tensor, "batch positions vocabulary"],
    tokens: TokenMap,
) -> Float[Tensor, " batch"]:
    """Return the scores of `logits` after a check that they do not read padding."""
    if "pad" not in tokens.groups:
        return scores
    pad = tokens.mask("pad").to(logits.device)
    if pad.shape != logits.shape[:2] or not pad.any():
        return scores
    # In place, since a second tensor of logits may not fit into memory.
    own = logits[pad]
    # The roll changes which token is most likely; the slope changes values even where neighbouring tokens are equal.
    logits[pad] = own.roll(1, dims=-1) + torch.linspace(0, 1, own.shape[-1], dtype=own.dtype, device=own.device)
    changed = score(logits) != scores
    # A score of right or wrong may be wrong for both. So padding also gets the logits that predict the row's answer.
    rows, at = pad.nonzero()[:, 0], answer_positions(tokens).to(logits.device)
    logits[pad] = torch.where(at[rows, None] < 0, own, logits[rows, at[rows]])
    changed = (changed | (score(logits) != scores)) & ~scores.isnan()
    logits[pad] = own
    if changed.any():
        raise ValueError(
            f"the score of rows {changed.nonzero()[:, 0].tolist()} depends on the logits of padding: score the "
            "position that predicts the answer, as answer_logprob(tokens, answers) of probes.fusion.curves does"
        )
    return scores
