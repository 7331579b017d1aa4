"""Context manager that records the attention between token groups while a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from probes.attention.group_sums import DEFAULT_STATISTICS, STATISTICS
from probes.attention.record import AttentionRecord
from probes.attention.recorder import AttentionRecorder
from probes.hooks.decoder import MASK_FORMATS, as_indices, decoder_layers, find_decoder, select_attention_layers
from probes.hooks.token_window import TokenWindow
from probes.tokens.token_map import TokenMap
from probes.unwrapping import unwrap_model

if TYPE_CHECKING:  # the page draws with matplotlib, which recording does not need
    from probes.view.words import Words


@contextmanager
def record_attention(
    model: PreTrainedModel,
    tokens: TokenMap,
    layers: Iterable[int] | None = None,
    targets: Iterable[str] | None = None,
    heads: Iterable[int] | None = None,
    backend: str = "native",
    statistics: Iterable[str] = DEFAULT_STATISTICS,
    words: Words | None = None,
) -> Iterator[AttentionRecord]:
    """Record the self-attention of a stack in one forward pass, or in one prompt and its cached decoding.

    The model's own attention implementation still computes the output. So the logits equal those without recording, bit
    for bit, and no attention matrix of all queries is ever in memory. The implementation may be sdpa, eager, flex
    attention, flash attention, or any other that is registered with the masks of one of these. Statistics are computed
    in float32 from the model's queries and keys, before dropout. The prompt may run in chunks that share a cache.

    Only layers of the stack of `tokens` are recorded: the language model's layers, or LLaVA-Mini's pre-fusion layers.
    They are found by identity, so the vision tower and extra layers elsewhere in the model are not recorded. In
    decoding, every position after the prompt counts as a response. This includes positions that `generate` feeds to
    rows that have ended.

    While recording, the attention modules of these layers have a config of their own. It names an implementation that
    calls this record (see `probes.attention.attention_switch`). On leaving, also by an exception, they get their old
    config back. Several models may be recorded at the same time, in one thread or in several, and so may the two stacks
    of one model.

    Args:
        model: A transformers model whose decoder uses the attention interface.
        tokens: Map of the inputs that the model will be called with.
        layers: Layers of the stack to record; by default all that have softmax attention.
        targets: Groups whose queries to record; all but `pad` by default. Fewer groups cost less.
        heads: Query heads to record; all by default. Fewer heads cost less.
        backend: "nnsight" or "transformer_lens" to record the attention that these libraries report. Use it to check
            the native record, or to record inside an experiment with one of them. `model` may then be an `NNsight` or a
            `TransformerBridge`. Attention runs as eager, and the whole matrices of one layer at a time are in memory;
            see `probes.attention.backends.observe_attention`.
        statistics: What to record beside mass, by property of the record: "entropy" and "received" by default;
            "contribution", "sink_rate" and "value_norm" need the native back end. `["mass"]` alone costs least: under
            sdpa on the CPU, the scores of the widest source are not computed a second time.
        words: Words of one prompt, from `probes.view.find_words`. Each is a target of its own, and by default they are
            all targets; the sources stay the groups of `tokens`. `received` then holds the attention of each word to
            every position, and `view` shows it.

    Yields:
        The record. It can be read once the model has run the whole prompt.

    Raises:
        TypeError: Layers or heads are no list of integers.
        ValueError: An unknown layer, head, group or statistic; no layer or head; a target group that holds one of the
            words; a model that cannot be recorded; or a call that does not fit `tokens`, is packed or paged, or has a mask
            that cannot be read.
        RuntimeError: The layers are being recorded already; a second prompt or a second thread runs in the same record;
            decoding goes back to an earlier position; or the record is read before the whole prompt has run.

    Example:
        >>> from probes import record_attention
        >>> with torch.no_grad(), record_attention(model, tokens, layers=[0, 5], heads=[0]) as attention:
        ...     output = model(**inputs)
        >>> text, vision = attention.targets.index("instruction"), attention.sources.index("vision")
        >>> attention.mass[:, 0, 0, text, vision].shape  # layers
        torch.Size([2])
    """
    # These import this file.
    from probes.attention.backends import record_with_backend, underlying_model

    model = unwrap_model(model)
    transformers_model = underlying_model(model, backend)
    decoder = find_decoder(transformers_model, tokens.stack, MASK_FORMATS.values())
    if not transformers_model.get_decoder()._can_set_attn_implementation():
        raise ValueError(f"{type(decoder).__name__} does not use the attention interface: it cannot be recorded")
    target_tokens = tokens if words is None else words.label(tokens)
    if targets is None:
        targets = (group for group in tokens.groups if group != "pad") if words is None else words.groups
    groups = (targets,) if isinstance(targets, str) else tuple(targets)
    if not groups:
        raise ValueError(f"targets are empty: name at least one of {', '.join(target_tokens.groups)}")
    for group in groups:
        target_tokens.index(group)
        if words is not None and group in tokens.groups:
            _check_holds_no_word(group, tokens, words)
    selected_statistics = _select_statistics(statistics, backend)
    selected_heads = _select_heads(decoder.config.num_attention_heads, heads)
    if not (selected_layers := select_attention_layers(decoder, layers)):
        raise ValueError(f"layers are empty: name at least one of {len(decoder_layers(decoder))}, counted from 0")
    record = AttentionRecord(tokens, selected_layers, selected_heads, groups, words, selected_statistics)
    record.facts = {
        "model": transformers_model.config.model_type,
        "device": str(transformers_model.device),
        "dtype": str(transformers_model.dtype).removeprefix("torch."),
    }
    if backend != "native":
        with record_with_backend(backend, model, tokens, record):
            yield record
        return
    window = TokenWindow(decoder, tokens)
    with AttentionRecorder(decoder, tokens, record, window, all_heads=heads is None), window:
        yield record


def _check_holds_no_word(group: str, tokens: TokenMap, words: Words) -> None:
    """Check that a target has no position of a word, which is a target of its own.

    Raises:
        ValueError: It has one.
    """
    mask = tokens.mask(group)[0]
    if held := [word.text for word in words.words if mask[list(word.positions)].any()]:
        raise ValueError(
            f"targets: {group!r} holds the word {held[0]!r}, which is a target of its own: record the group without words"
        )


def _select_heads(count: int, heads: Iterable[int] | None) -> tuple[int, ...]:
    """Return `heads` in ascending order without duplicates, or all heads.

    Raises:
        TypeError: `heads` are no list of integers.
        ValueError: No head, or a head outside the model.
    """
    selected = tuple(sorted(set(range(count) if heads is None else as_indices("heads", heads))))
    outside = [head for head in selected if not 0 <= head < count]
    if outside or not selected:
        problem = f"{outside} are unknown" if outside else "are empty"
        raise ValueError(f"heads {problem}: the model has {count} query heads, 0 to {count - 1}")
    return selected


def _select_statistics(statistics: Iterable[str], backend: str) -> tuple[str, ...]:
    """Return mass and the chosen statistics, in the order of `STATISTICS`.

    Raises:
        ValueError: An unknown statistic, or one that the back end does not report.
    """
    given = {"mass"} | ({statistics} if isinstance(statistics, str) else set(statistics))
    if unknown := sorted(given - set(STATISTICS)):
        raise ValueError(f"statistics: {unknown[0]!r} is unknown; choose from {', '.join(STATISTICS)}")
    if backend != "native" and (native := sorted(given - set(DEFAULT_STATISTICS))):
        raise ValueError(f"statistics: backend={backend!r} has no {native[0]!r}; use backend='native'")
    return tuple(name for name in STATISTICS if name in given)
