"""Record attention between token groups while a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from probes.attention.record import AttentionRecord
from probes.attention.recorder import _Recorder
from probes.hooks.decoder import FAMILIES, find_decoder, select_layers
from probes.hooks.token_window import TokenWindow
from probes.tokens.token_map import TokenMap


@contextmanager
def record_attention(
    model: PreTrainedModel,
    tokens: TokenMap,
    layers: Iterable[int] | None = None,
    targets: Iterable[str] | None = None,
    heads: Iterable[int] | None = None,
    backend: str = "native",
) -> Iterator[AttentionRecord]:
    """Records what a stack's self-attention does in one forward pass, or one prompt and its cached decoding.

    The model's own implementation still computes the output, so the logits are those without recording, to the bit; no
    attention matrix of all queries is ever held. It may be sdpa, eager, flex attention, flash attention, or any other
    that is registered with the masks of one of these. Statistics are in float32, from the queries and keys as they are,
    before dropout. The prompt may be run in chunks that share a cache.

    Only layers of the stack that `tokens` are of are recorded, found by identity: the language model's, or LLaVA-Mini's
    pre-fusion layers, but not the vision tower, nor extra layers elsewhere in the model. In decoding, every position
    after the prompt counts as a response, also those that `generate` feeds to rows that have ended.

    While recording, the attention modules of these layers have a config of their own, which names an implementation
    registered for this record alone; on leaving, also by an exception, they have their old one back, and the name is
    removed from transformers' registry. Several models may be recorded at the same time, in one thread or in several,
    and so may the two stacks of one model.

    Args:
        model: A transformers model whose decoder uses the attention interface.
        tokens: Map of the inputs that the model will be called with.
        layers: Layers of the stack to record; all by default.
        targets: Groups whose queries to record; all but `pad` by default. Fewer cost less.
        heads: Query heads to record; all by default. Fewer cost less.
        backend: "nnsight" or "transformer_lens" to record what these libraries show, to check this one or beside
            experiments of theirs. `model` may be an `NNsight` or a `TransformerBridge` then. Attention is eager, and
            whole matrices are held, one layer's at a time; see `probes.attention.backends.observe`.

    Raises:
        ValueError: An unknown layer, head or group, a model that cannot be recorded, or a call that `tokens` do not
            fit, is packed, paged, or has a mask that cannot be read.
        RuntimeError: The layers are being recorded already, a second prompt or a second thread runs in the same record,
            decoding goes back, or the record is read before a whole prompt has run.
    """
    # These import this file.
    from probes.attention.backends import record_through, underlying_model

    held = underlying_model(model, backend)
    decoder = find_decoder(held, tokens.stack, FAMILIES.values())
    if not held.get_decoder()._can_set_attn_implementation():
        raise ValueError(f"{type(decoder).__name__} does not use the attention interface: it cannot be recorded")
    groups = tuple(group for group in tokens.groups if group != "pad") if targets is None else tuple(targets)
    if not groups:
        raise ValueError(f"targets are empty: name at least one of {', '.join(tokens.groups)}")
    for group in groups:
        tokens.index(group)
    chosen = _select_heads(decoder.config.num_attention_heads, heads)
    record = AttentionRecord(tokens, select_layers(decoder, layers), chosen, groups)
    if backend != "native":
        with record_through(backend, model, tokens, record):
            yield record
        return
    window = TokenWindow(decoder, tokens)
    with _Recorder(decoder, tokens, record, window, all_heads=heads is None), window:
        yield record


def _select_heads(count: int, heads: Iterable[int] | None) -> tuple[int, ...]:
    """`heads` in ascending order without doubles, or all. Raises ValueError for none or one outside the model."""
    selected = tuple(sorted(set(range(count) if heads is None else heads)))
    outside = [head for head in selected if not 0 <= head < count]
    if outside or not selected:
        wrong = f"{outside} are unknown" if outside else "are empty"
        raise ValueError(f"heads {wrong}: the model has {count} query heads, 0 to {count - 1}")
    return selected
