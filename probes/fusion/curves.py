"""Four views on where text takes in the picture, measured on a batch: what `probes.fusion.depth.fusion_depth` reads.

Each function takes one batch and gives an array `[points, samples]`; concatenate batches over the samples. A sample
without a picture tells nothing here: its attention is NaN, its scores are the same at every point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.attention.recording import record_attention
from probes.hooks.decoder import decoder_layers, find_decoder
from probes.hooks.layer_io import hidden_states
from probes.hooks.partial_call import can_cut
from probes.interventions import BlockAttention, RemoveTokens, intervene
from probes.readouts.hidden_states import record_states
from probes.replay import replay
from probes.tokens.token_map import TokenMap

# Scores each sample of the batch by the logits of a forward pass: right or wrong, or a log-probability.
Score = Callable[[Float[Tensor, "batch positions vocabulary"]], Float[Tensor, " batch"]]


@torch.no_grad()
def attention_curve(
    model: PreTrainedModel, tokens: TokenMap, inputs: Mapping[str, Any], target: str = "instruction"
) -> Float[np.ndarray, "layers samples"]:
    """Attention mass from `target` to vision in each layer, mean over heads and over the queries that see vision.

    One forward pass. Descriptive: says where text looks, not whether the answer needs it.
    """
    with record_attention(model, tokens, targets=[target]) as record:
        model(**inputs)
    return record.mass[:, :, :, 0, tokens.index("vision")].mean(2).numpy()


@torch.no_grad()
def removal_curve(
    model: PreTrainedModel,
    tokens: TokenMap,
    inputs: Mapping[str, Any],
    score: Score,
    starts: Sequence[int] | None = None,
) -> Float[np.ndarray, "starts samples"]:
    """Score with vision removed from layer k onward, for each k of `starts`: by default 0, 1, ..., all layers.

    The last k, all layers, removes nothing.

    Raises ValueError for a start outside the model.
    """
    layers = len(decoder_layers(find_decoder(model)))
    starts = range(layers + 1) if starts is None else starts
    outside = [start for start in starts if not 0 <= start <= layers]
    if outside:
        raise ValueError(f"starts {outside} are outside the model: it has {layers} layers, so 0 to {layers}")
    return removal_scores(model, tokens, inputs, score, [range(start, layers) for start in starts])


@torch.no_grad()
def removal_scores(
    model: PreTrainedModel, tokens: TokenMap, inputs: Mapping[str, Any], score: Score, spans: Sequence[range]
) -> Float[np.ndarray, "spans samples"]:
    """Score with vision removed from the layers of each span; an empty one removes nothing.

    Layers ahead of a span run once for all, and those inside it on the text alone, where the model lets them.

    Raises ValueError for layers outside the model.
    """
    decoder = find_decoder(model)
    how: Literal["drop", "mask"] = "drop" if can_cut(decoder) else "mask"
    # Padding counts for nothing, but a row of much of it, without a picture, would have all rows filled up to its length.
    gone = tokens.mask("vision") | tokens.mask("pad")
    found: dict[range, Float[Tensor, " samples"]] = {}
    with replay(model, [span.start for span in spans]) as since:
        # The first run is intact ahead of all others.
        for span in sorted(set(spans), key=lambda span: span.start, reverse=True):
            with since(span.start), intervene(model, tokens, RemoveTokens(gone, span, how=how)):
                found[span] = score(_logits(model, inputs))
    return _points([found[span] for span in spans])


@torch.no_grad()
def knockout_curve(
    model: PreTrainedModel, tokens: TokenMap, inputs: Mapping[str, Any], score: Score, width: int = 1
) -> Float[np.ndarray, "layers+width samples"]:
    """Score of the intact model, then with text cut off from vision in each window of `width` layers.

    Window i ends at layer i and is clipped to the model, so every layer lies in `width` of the layers + width - 1
    windows. Blocked are the queries of all groups but `pad` and `vision`: the instruction, the response (supervised or
    generated) and text between pictures. Visual tokens go on seeing each other. Layers ahead of a window run once for
    all, and where the model lets them, so do all layers at positions that no window changes: most of all the picture's.

    Raises ValueError for a width below 1.
    """
    if width < 1:
        raise ValueError(f"width is {width}: windows hold at least 1 layer")
    layers = len(decoder_layers(find_decoder(model)))
    text = tokens.merge({"text": [group for group in tokens.groups if group not in ("pad", "vision")]})
    # Nothing else changes: a picture does not see the text behind it, or is found to.
    behind = text.mask("text") & (text.mask("vision").cumsum(1) > 0)
    with replay(model, range(layers), behind if can_cut(find_decoder(model)) else None) as since:
        scores = [score(_logits(model, inputs))]
        for last in range(layers + width - 1):
            window = range(max(last - width + 1, 0), min(last + 1, layers))
            cut = BlockAttention(source="vision", target="text", layers=window)
            with since(window.start), intervene(model, text, cut):
                scores.append(score(_logits(model, inputs)))
    return _points(scores)


@torch.no_grad()
def text_states(
    model: PreTrainedModel, tokens: TokenMap, inputs: Mapping[str, Any], target: str = "instruction"
) -> Float[Tensor, "layers+1 samples width"]:
    """Residual stream of each sample's text after 0, 1, ..., all layers: what `probes.readouts.linear_probe.linear_readout` reads.

    Mean over the positions of `target` that can see vision, so content counts wherever in the text it is; NaN for a
    sample that has none. After 0 layers: the embeddings. Float32 on the CPU. One forward pass.
    """
    seen = tokens.mask("vision").cumsum(1) > 0
    positions = tokens.mask(target) & seen
    embedded: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_states(args, kwargs)
        embedded.append(hidden[positions.to(hidden.device)])

    first = decoder_layers(find_decoder(model))[0]
    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with record_states(model, tokens, positions) as states:
            model(**inputs)
    finally:
        handle.remove()
    return torch.stack([_sample_means(kept, positions) for kept in (*embedded, *(states[i] for i in states.layers))])


def _logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Float[Tensor, "batch positions vocabulary"]:
    """Without a cache: nothing is generated, and one of sliding windows cannot lack tokens."""
    return model(**{**inputs, "use_cache": False}).logits  # type: ignore[no-any-return]


def _sample_means(
    kept: Float[Tensor, "kept width"], positions: Bool[Tensor, "batch positions"]
) -> Float[Tensor, "batch width"]:
    sample = positions.nonzero()[:, 0].to(kept.device)
    sums = torch.zeros(len(positions), kept.shape[1], device=kept.device).index_add(0, sample, kept.float())
    return (sums / positions.sum(1, keepdim=True).to(kept.device)).cpu()


def _points(scores: Sequence[Float[Tensor, " samples"]]) -> Float[np.ndarray, "points samples"]:
    return torch.stack([score.float() for score in scores]).cpu().numpy()
