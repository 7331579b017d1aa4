"""The four curves of one batch that `probes.fusion_depth` reads: attention, removal, knock-out and text states.

Each function measures one batch and returns an array `[points, samples]`; concatenate batches over the samples. A sample
without an image carries no information here: its attention is NaN, and its scores are equal at every point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.attention.recording import record_attention
from probes.fusion.scored_run import ScoreFunction, require_whole_image, run_and_score
from probes.hooks.decoder import as_indices, decoder_layers, find_decoder, select_attention_layers
from probes.hooks.image_features import reuse_image_features
from probes.hooks.layer_io import input_states
from probes.hooks.partial_call import can_run_subset
from probes.interventions import BlockAttention, RemoveTokens, intervene
from probes.readouts.hidden_states import record_states
from probes.replay import replay
from probes.tokens.answer_positions import answer_positions
from probes.tokens.text_after_image import text_after_image
from probes.tokens.token_map import TokenMap
from probes.unwrapping import require_eval_mode


def answer_logprob(
    tokens: TokenMap | Int[Tensor, "batch positions"] | Bool[Tensor, "batch positions"],
    answers: Int[Tensor, " batch"] | Sequence[int],
) -> ScoreFunction:
    """Return a score function: the log-probability (nats) of each sample's answer token.

    It reads the position that predicts the answer, whichever side the rows are padded on. With a token map this is the
    position before the first `response` position. Rows without a response, and all rows of an attention mask, are
    scored at their last unpadded position.

    Args:
        tokens: Map of the inputs, or their attention mask.
        answers: Token id of each sample's answer, `[batch]`, or a list of them.

    Returns:
        The score function of `removal_curve`, `removal_scores` and `knockout_curve`.

    Raises:
        ValueError: `answers` do not fit the map, the map is not of the decoder, or a row has no position that predicts
            its answer. The score raises it for logits of another shape, or of a vocabulary without an answer.

    Example:
        >>> score = answer_logprob(tokens, torch.tensor([5]))
        >>> logits = model(**inputs).logits
        >>> bool(score(logits)[0] == logits[0, -1].log_softmax(-1)[5])
        True
    """
    if not isinstance(tokens, TokenMap):
        tokens = TokenMap((tokens == 0).long(), groups=("prompt", "pad"), generated="prompt")
    if tokens.stack != "decoder":
        raise ValueError(f"the token map is of stack {tokens.stack!r}: logits need a map of stack 'decoder'")
    shape, at = list(tokens.labels.shape), answer_positions(tokens)
    answers = torch.as_tensor(answers)
    if list(answers.shape) != shape[:1] or answers.is_floating_point() or (answers < 0).any():
        raise ValueError(
            f"answers are {answers.dtype} of shape {list(answers.shape)}: they must be one token id for each of "
            f"{shape[0]} samples"
        )
    if (at < 0).any():
        raise ValueError(f"rows {(at < 0).nonzero()[:, 0].tolist()} have no position before their answer")

    def score(logits: Float[Tensor, "batch positions vocabulary"]) -> Float[Tensor, " batch"]:
        if list(logits.shape[:2]) != shape or int(answers.max()) >= logits.shape[2]:
            raise ValueError(
                f"logits have shape {list(logits.shape)}: the score needs {shape} positions (batch x length) and a "
                f"vocabulary with token {int(answers.max())}"
            )
        rows = torch.arange(shape[0], device=logits.device)
        logprobs = logits[rows, at.to(logits.device)].float().log_softmax(-1)
        return logprobs[rows, answers.to(logits.device)]

    return score


@torch.no_grad()
def attention_curve(
    model: PreTrainedModel, tokens: TokenMap, inputs: Mapping[str, Any], target: str = "instruction"
) -> Float[np.ndarray, "layers samples"]:
    """Return the attention mass from `target` to vision in each layer.

    The mass is a mean over heads and over the queries that can attend to vision (LLaVA-Mini, Figure 2). One forward
    pass. The curve is descriptive: it shows where text attends, not whether the answer needs it.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of `inputs`.
        inputs: Arguments of the model's forward call.
        target: Group of the token map whose queries are measured.

    Returns:
        Mass in 0 to 1, `[layers, samples]`; NaN for a sample whose `target` cannot attend to any visual token.

    Raises:
        ValueError: `target` is not a group of the map, the map does not fit the inputs, or a layer has no softmax
            attention, as in hybrid models.

    Example:
        >>> attention_curve(model, tokens, inputs).shape
        (6, 1)
    """
    model = require_eval_mode(model)
    decoder = find_decoder(model, tokens.stack)
    select_attention_layers(decoder, range(len(decoder_layers(decoder))))
    with record_attention(model, tokens, targets=[target]) as record:
        model(**inputs)
    return record.mass[:, :, :, 0, tokens.index("vision")].mean(2).numpy()


@torch.no_grad()
def removal_curve(
    model: PreTrainedModel,
    tokens: TokenMap,
    inputs: Mapping[str, Any],
    score: ScoreFunction,
    starts: Sequence[int] | None = None,
) -> Float[np.ndarray, "starts samples"]:
    """Score the model with vision removed from layer k onward, for each k of `starts`.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of `inputs`.
        inputs: Arguments of the model's forward call.
        score: Returns one score for each sample from the logits.
        starts: First layers without vision, from 0. The number of layers removes nothing. By default 0, 1, ..., all
            layers.

    Returns:
        Scores `[starts, samples]`.

    Raises:
        ValueError: A start is outside the model, or the score reads padding.

    Example:
        >>> score = answer_logprob(tokens, torch.tensor([5]))  # token 5 is the answer
        >>> removal_curve(model, tokens, inputs, score, starts=[0, 3, 6]).shape
        (3, 1)
    """
    layers, starts = points_of_curve(model, "starts", starts)
    return removal_scores(model, tokens, inputs, score, [range(start, layers) for start in starts])


@torch.no_grad()
def removal_scores(
    model: PreTrainedModel, tokens: TokenMap, inputs: Mapping[str, Any], score: ScoreFunction, spans: Sequence[range]
) -> Float[np.ndarray, "spans samples"]:
    """Score the model with vision removed from the layers of each span.

    Images are encoded once, and layers before a span run once, for all spans. Layers inside a span run on the text alone if
    the model supports it, and once for all spans with the same start.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of `inputs`.
        inputs: Arguments of the model's forward call.
        score: Returns one score for each sample from the logits.
        spans: Ranges of layers, from 0, of step 1. An empty range removes nothing.

    Returns:
        Scores `[spans, samples]`.

    Raises:
        ValueError: A layer is outside the model, a range has another step, or the score reads padding.

    Example:
        >>> score = answer_logprob(tokens, torch.tensor([5]))  # token 5 is the answer
        >>> removal_scores(model, tokens, inputs, score, [range(2, 4), range(0)]).shape
        (2, 1)
    """
    model = require_eval_mode(model)
    decoder = find_decoder(model)
    require_whole_image(model, tokens, inputs)
    if stepped := [span for span in spans if span.step != 1]:
        raise ValueError(f"spans {stepped} skip layers: removal needs ranges of step 1")
    select_attention_layers(decoder, {layer for span in spans for layer in span})
    how: Literal["drop", "mask"] = "drop" if can_run_subset(decoder, tokens.labels.shape[1]) else "mask"
    # Padding has no effect on the scores. If it stayed, one heavily padded row without an image would set the length
    # of all rows after the drop.
    removed = tokens.mask("vision")
    if "pad" in tokens.groups:
        removed = removed | tokens.mask("pad")
    scores: dict[range, Float[Tensor, " samples"]] = {}

    run = partial(run_and_score, model, tokens, inputs, score)
    with reuse_image_features(model), replay(model, [span.start for span in spans]) as resume_from:
        # Latest start first: the first run is then intact before the start of every other span, as `replay` requires.
        for start in sorted({span.start for span in spans}, reverse=True):
            longest, *shorter = sorted({span for span in spans if span.start == start}, key=len, reverse=True)
            with replay(model, [span.stop for span in shorter]) as resume_after:
                with resume_from(start), intervene(model, tokens, RemoveTokens(removed, longest, how=how)):
                    scores[longest] = run()
                # Inside a shorter span, the run of the longest one is the same.
                for span in shorter:
                    with resume_after(span.stop):
                        scores[span] = run()
    return _stack_points([scores[span] for span in spans])


@torch.no_grad()
def knockout_curve(
    model: PreTrainedModel, tokens: TokenMap, inputs: Mapping[str, Any], score: ScoreFunction, width: int = 1
) -> Float[np.ndarray, "layers+width samples"]:
    """Score the intact model, then block attention from text to vision in each window of `width` layers.

    Window i ends at layer i and is clipped to the model. There are layers + width - 1 windows, and every layer lies in
    `width` of them (after Geva et al. 2023, arXiv 2304.14767).

    The blocked queries are those of all groups but `pad` and `vision`: the instruction, the response (supervised or
    generated) and text between images. Visual tokens still attend to each other. Images are encoded once, and layers
    before a window run once, for all windows. If the model supports it, positions that no window changes also run only once; most of them are the
    image's.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of `inputs`.
        inputs: Arguments of the model's forward call.
        score: Returns one score for each sample from the logits.
        width: Layers in a window.

    Returns:
        Scores `[layers + width, samples]`, those of the intact model first.

    Raises:
        ValueError: `width` is not a whole number of at least 1, or the score reads padding.

    Example:
        >>> score = answer_logprob(tokens, torch.tensor([5]))  # token 5 is the answer
        >>> knockout_curve(model, tokens, inputs, score, width=2).shape
        (8, 1)
    """
    if not isinstance(width, int | np.integer) or width < 1:
        raise ValueError(f"width is {width!r}: windows hold a whole number of layers, at least 1")
    model = require_eval_mode(model)
    layers = len(decoder_layers(find_decoder(model)))
    select_attention_layers(find_decoder(model), range(layers))
    require_whole_image(model, tokens, inputs)
    text_map = tokens.merge({"text": [group for group in tokens.groups if group not in ("pad", "vision")]})
    # Blocking changes no other position: visual tokens do not attend to the text after them. `replay` raises if they do.
    rows = text_after_image(tokens) if can_run_subset(find_decoder(model), tokens.labels.shape[1]) else None
    with reuse_image_features(model), replay(model, range(layers), rows) as resume_from:
        scores = [run_and_score(model, tokens, inputs, score)]
        for last in range(layers + width - 1):
            window = range(max(last - width + 1, 0), min(last + 1, layers))
            block = BlockAttention(source="vision", target="text", layers=window)
            with resume_from(window.start), intervene(model, text_map, block):
                scores.append(run_and_score(model, tokens, inputs, score))
    return _stack_points(scores)


@torch.no_grad()
def text_states(
    model: PreTrainedModel, tokens: TokenMap, inputs: Mapping[str, Any], target: str = "instruction"
) -> Float[Tensor, "layers+1 samples width"]:
    """Record each sample's mean text state after 0, 1, ..., all layers, as input for `probes.linear_readout`.

    The state is the residual stream, averaged over the positions of `target` that can attend to vision. The average
    counts content wherever it is in the text. State 0 is the embeddings. One forward pass.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of `inputs`.
        inputs: Arguments of the model's forward call.
        target: Group of the token map whose positions are averaged.

    Returns:
        States `[layers + 1, samples, width]` in float32 on the CPU; NaN for a sample without such a position.

    Raises:
        ValueError: `target` is not a group of the map, or the map does not fit the inputs.

    Example:
        >>> text_states(model, tokens, inputs).shape[:2]
        torch.Size([7, 1])
    """
    after_vision = tokens.mask("vision").cumsum(1) > 0
    positions = tokens.mask(target) & after_vision
    embeddings: list[Tensor] = []

    def record_embeddings(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = input_states(args, kwargs)
        embeddings.append(hidden[positions.to(hidden.device)])

    first_layer = decoder_layers(find_decoder(model))[0]
    handle = first_layer.register_forward_pre_hook(record_embeddings, with_kwargs=True)
    try:
        with record_states(model, tokens, positions) as states:
            require_eval_mode(model)(**inputs)
    finally:
        handle.remove()
    return torch.stack(
        [_mean_per_sample(state, positions) for state in (*embeddings, *(states[i] for i in states.layers))]
    )


def points_of_curve(model: PreTrainedModel, name: str, points: Sequence[int] | None) -> tuple[int, Sequence[int]]:
    """Return the number of layers of a model, and the points of a curve between its layers.

    Args:
        model: A transformers model with a decoder.
        name: What the points are called in an error.
        points: Numbers of layers; None for 0, 1, ..., all layers.

    Raises:
        TypeError: The points are no list of integers.
        ValueError: A point is outside the model.

    Example:
        >>> points_of_curve(model, "starts", None)
        (6, range(0, 7))
    """
    layers = len(decoder_layers(find_decoder(model)))
    points = range(layers + 1) if points is None else as_indices(name, points)
    if outside := [point for point in points if not 0 <= point <= layers]:
        raise ValueError(
            f"{name} {outside} are outside the model: it has {layers} layers, so {name} go from 0 to {layers}"
        )
    return layers, points


def _mean_per_sample(
    states: Float[Tensor, "positions width"], positions: Bool[Tensor, "batch positions"]
) -> Float[Tensor, "batch width"]:
    """Average the states of the marked positions within each sample."""
    sample = positions.nonzero()[:, 0].to(states.device)
    sums = torch.zeros(len(positions), states.shape[1], device=states.device).index_add(0, sample, states.float())
    return (sums / positions.sum(1, keepdim=True).to(states.device)).cpu()


def _stack_points(scores: Sequence[Float[Tensor, " samples"]]) -> Float[np.ndarray, "points samples"]:
    """Stack one score tensor for each point into a float32 array."""
    return torch.stack([score.float() for score in scores]).cpu().numpy()
