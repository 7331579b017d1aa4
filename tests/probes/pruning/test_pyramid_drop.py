from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from probes.attention.recording import record_attention
from probes.pruning import count_kept_tokens, fastv, pyramid_drop, vtw
from probes.tokens.token_map import TokenMap
from tests.probes import reference_llama

Model = LlavaForConditionalGeneration
Inputs = dict[str, Tensor]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def prune_reference(
    model: Model, inputs: Inputs, row: int, vision: Tensor, counts: dict[int, int], queries: str
) -> tuple[Tensor, dict[int, Tensor]]:
    """Run one row by plain tensor operations, and keep `counts[layer]` visual tokens from each such layer on.

    Returns the logits, and for each of the layers which positions are removed.
    """
    vision = vision[row, reference_llama.unpadded(inputs, row)]
    hidden_edges: dict[int, Tensor] = {}
    removed = torch.zeros_like(vision)
    removed_from: dict[int, Tensor] = {}

    def remove_least_attended(layer: int, weights: Tensor) -> None:
        nonlocal removed
        if layer + 1 in counts:
            mean = weights[0].mean(0)
            scores = mean[-1] if queries == "last" else mean[~removed].sum(0)
            remaining = (vision & ~removed).nonzero()[:, 0].tolist()
            best = sorted(remaining, key=lambda position: -float(scores[position]))
            removed = vision.clone()
            removed[best[: counts[layer + 1]]] = False
            removed_from[layer + 1] = removed
        hidden_edges[layer + 1] = removed[None].expand(len(removed), -1)

    embeddings = reference_llama.embed_row(model, inputs, row)
    logits, _ = reference_llama.run_decoder(model, embeddings, hidden_edges, remove_least_attended)
    return logits, removed_from


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["mask", "drop"])
@pytest.mark.parametrize(
    ("counts", "queries"),
    [({1: 3}, "last"), ({2: 3}, "all"), ({1: 2, 2: 1}, "last"), ({1: 2, 2: 1}, "all"), ({1: 0}, "last")],
)
def test_pruning_keeps_most_attended_tokens(
    make_llava: Callable[..., Model],
    make_inputs: Callable[..., Inputs],
    side: str,
    implementation: str,
    how: Any,
    counts: dict[int, int],
    queries: Any,
) -> None:
    """FastV and PyramidDrop equal the reference; one row has no image."""
    inputs, model = make_inputs(side), make_llava(implementation)
    tokens = TokenMap.from_inputs(model, inputs)
    share = counts[min(counts)] / 4
    if len(counts) == 1:
        pruning = fastv(model, tokens, min(counts), share, queries, how)
    else:
        pruning = pyramid_drop(model, tokens, list(counts), share, queries, how)
    with torch.no_grad(), pruning as receipt:
        logits = model(**inputs).logits
    for row in range(3):
        unpadded = reference_llama.unpadded(inputs, row)
        expected, removed = prune_reference(model, inputs, row, tokens.mask("vision"), counts, queries)
        remaining = ~removed[max(removed)]
        assert_close(logits[row, unpadded][remaining], expected[remaining])
        for effect, layer in zip(receipt, counts, strict=True):
            assert torch.equal(effect.chosen[row, unpadded], removed[layer])
    assert [effect.tokens[layer] for effect, layer in zip(receipt, counts, strict=True)] == [
        2 * (4 - count) for count in counts.values()
    ]


@pytest.mark.parametrize("queries", ["last", "all"])
def test_fastv_without_padding_ranks_as_reference(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], queries: Any
) -> None:
    """Without padding sdpa gets no mask, and weights from earlier queries to later keys must not count."""
    for seed in range(4):
        model = make_llava(seed=seed)
        inputs = {name: values[:1] for name, values in make_inputs().items()}
        tokens = TokenMap.from_inputs(model, inputs)
        with torch.no_grad(), fastv(model, tokens, 1, 0.5, queries) as receipt:
            model(**inputs)
        _, removed = prune_reference(model, inputs, 0, tokens.mask("vision"), {1: 2}, queries)
        assert torch.equal(receipt[0].chosen[0], removed[1])


def test_fastv_with_other_ranking_keeps_other_tokens(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """The comparison with the reference would pass if both always kept the first tokens, so rankings must differ."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    kept_positions = set()
    for layer, queries in ((1, "last"), (2, "last"), (1, "all")):
        with torch.no_grad(), fastv(model, tokens, layer, 0.25, queries) as receipt:
            model(**inputs)
        kept_positions.add(tuple((tokens.mask("vision") & ~receipt[0].chosen).nonzero().flatten().tolist()))
    assert len(kept_positions) > 1


@pytest.mark.parametrize("method", ["fastv", "pyramid_drop", "vtw"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_pruning_in_generation_gives_same_logits_by_mask_and_drop(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs], method: str, options: dict[str, int]
) -> None:
    """Eight left-padded rows have different numbers of visual tokens; the logits of every step are compared."""
    inputs, model = make_rows([(i % 4, 2 + i, 9 - i) for i in range(8)], "left"), make_llama()
    del inputs["pixel_values"]
    tokens = TokenMap.from_inputs(model, inputs)
    logits = {}
    for how in ("mask", "drop"):
        pruning = {
            "fastv": lambda how=how: fastv(model, tokens, 1, 0.5, how=how),
            "pyramid_drop": lambda how=how: pyramid_drop(model, tokens, [1, 2], 0.6, how=how),
            "vtw": lambda how=how: vtw(model, tokens, 1, how=how, positions="renumber"),
        }[method]()
        with pruning as receipt:
            out = model.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
            )
        logits[how] = torch.stack(out.logits)
        assert all(set(effect.calls.values()) == {4} for effect in receipt), "the prompt and three decoding steps"
    assert_close(logits["mask"], logits["drop"])


@pytest.mark.parametrize("count", [1, 9, 36, 100, 576, 2880])
def test_count_kept_tokens_of_whole_number_share_returns_number(count: int) -> None:
    """The rounding error of a share does not matter: 0.53 of 100 is 53."""
    assert [int(count_kept_tokens(torch.tensor(count), kept / count)) for kept in range(count)] == list(range(count))


def test_fastv_with_share_of_hundred_removes_exact_number(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]
) -> None:
    inputs, model = make_rows([(1, 100, 3), (2, 50, 3)], "left"), make_llama()
    del inputs["pixel_values"]
    with torch.no_grad(), fastv(model, TokenMap.from_inputs(model, inputs), 1, 0.53) as receipt:
        model(**inputs)
    assert receipt[0].chosen.sum(dim=1).tolist() == [47, 24]


def test_pyramid_drop_runs_layers_on_fewer_tokens(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """Of 13 positions, 4 are visual tokens, which are halved twice."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    inputs, tokens = {name: values[:1] for name, values in inputs.items()}, TokenMap(tokens.labels[:1])
    sizes = []
    for layer in model.get_decoder().layers:
        layer.mlp.register_forward_pre_hook(lambda mlp, args: sizes.append(args[0].shape[1]))
    with torch.no_grad(), pyramid_drop(model, tokens, [1, 2]):
        past = model(**inputs, use_cache=True).past_key_values
    assert sizes == [13, 11, 10]
    assert [layer.keys.shape[2] for layer in past.layers] == [13, 11, 10]
    assert past.get_seq_length(1) == 13


def test_fastv_beside_recording_is_unchanged(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """Neither the recording nor the ranking changes the other."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        with fastv(model, tokens, 1, 0.5) as alone:
            plain = model(**inputs).logits
        with record_attention(model, tokens) as attention, fastv(model, tokens, 1, 0.5) as receipt:
            assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(alone[0].chosen, receipt[0].chosen)
    received = attention.received[:, :, :, attention.targets.index("instruction")].sum(2)
    vision = tokens.mask("vision")
    assert (received[0][vision] > 0).all()
    assert torch.equal(received[1] > 0, torch.where(vision, ~receipt[0].chosen, received[1] > 0))


@pytest.mark.parametrize(
    ("layers", "keep", "message"),
    [
        ([0, 2], 0.5, r"layers \[0, 2\] cannot drop"),
        ([2, 1], 0.5, r"layers \[2, 1\] cannot drop"),
        ([], 0.5, r"layers \[\] cannot drop"),
        ([3], 0.5, r"layers \[3\] are outside"),
        ([1], 1.0, r"keep=1\.0"),
        ([1], -0.1, r"keep=-0\.1"),
    ],
)
def test_pyramid_drop_with_invalid_arguments_raises_value_error(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], layers: list[int], keep: float, message: str
) -> None:
    model = make_llava()
    with pytest.raises(ValueError, match=message):
        pyramid_drop(model, TokenMap.from_inputs(model, make_inputs()), layers, keep).__enter__()


def test_fastv_with_chunked_prompt_raises_value_error(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    model = make_llava()
    inputs = {name: values[:1] for name, values in make_inputs().items()}
    tokens = TokenMap.from_inputs(model, inputs)
    raises = pytest.raises(ValueError, match=r"whole prompt.*one call")
    with raises, torch.no_grad(), fastv(model, tokens, 1, 0.5):
        model.get_decoder()(input_ids=inputs["input_ids"][:, :9], use_cache=True)
