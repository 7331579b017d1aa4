from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from probes.attention.recording import record_attention
from probes.pruning import fastv, kept_tokens, pyramid_drop, vtw
from probes.tokens.token_map import TokenMap
from tests.probes import by_hand

Model = LlavaForConditionalGeneration
Inputs = dict[str, Tensor]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def prune_by_hand(
    model: Model, inputs: Inputs, row: int, vision: Tensor, counts: dict[int, int], queries: str
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits of a row whose layers from each key of `counts` on have that many visual tokens left; and what is gone."""
    vision = vision[row, by_hand.live(inputs, row)]
    cut: dict[int, Tensor] = {}
    gone = torch.zeros_like(vision)
    gone_from: dict[int, Tensor] = {}

    def look(layer: int, weights: Tensor) -> None:
        nonlocal gone
        if layer + 1 in counts:
            mean = weights[0].mean(0)
            scores = mean[-1] if queries == "last" else mean[~gone].sum(0)
            best = sorted((vision & ~gone).nonzero()[:, 0].tolist(), key=lambda place: -float(scores[place]))
            gone = vision.clone()
            gone[best[: counts[layer + 1]]] = False
            gone_from[layer + 1] = gone
        cut[layer + 1] = gone[None].expand(len(gone), -1)

    logits, _ = by_hand.run(model, by_hand.embed(model, inputs, row), cut, look)
    return logits, gone_from


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["mask", "drop"])
@pytest.mark.parametrize(
    ("counts", "queries"),
    [({1: 3}, "last"), ({2: 3}, "all"), ({1: 2, 2: 1}, "last"), ({1: 2, 2: 1}, "all"), ({1: 0}, "last")],
)
def test_the_most_attended_stay(
    make_llava: Callable[..., Model],
    make_inputs: Callable[..., Inputs],
    side: str,
    implementation: str,
    how: Any,
    counts: dict[int, int],
    queries: Any,
) -> None:
    """FastV and PyramidDrop, with a row that has no picture."""
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
        live = by_hand.live(inputs, row)
        expected, gone = prune_by_hand(model, inputs, row, tokens.mask("vision"), counts, queries)
        stays = ~gone[max(gone)]
        close(logits[row, live][stays], expected[stays])
        for effect, layer in zip(receipt, counts, strict=True):
            assert torch.equal(effect.chosen[row, live], gone[layer])
    assert [effect.tokens[layer] for effect, layer in zip(receipt, counts, strict=True)] == [
        2 * (4 - count) for count in counts.values()
    ]


@pytest.mark.parametrize("queries", ["last", "all"])
def test_without_padding_sdpa_gets_no_mask(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], queries: Any
) -> None:
    """What later keys would have got from earlier queries must not count."""
    for seed in range(4):
        model = make_llava(seed=seed)
        inputs = {name: values[:1] for name, values in make_inputs().items()}
        tokens = TokenMap.from_inputs(model, inputs)
        with torch.no_grad(), fastv(model, tokens, 1, 0.5, queries) as receipt:
            model(**inputs)
        _, gone = prune_by_hand(model, inputs, 0, tokens.mask("vision"), {1: 2}, queries)
        assert torch.equal(receipt[0].chosen[0], gone[1])


def test_selection_depends_on_the_attention(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """The comparison by hand could not see that both always keep the first: here they keep different ones."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    kept = set()
    for layer, queries in ((1, "last"), (2, "last"), (1, "all")):
        with torch.no_grad(), fastv(model, tokens, layer, 0.25, queries) as receipt:
            model(**inputs)
        kept.add(tuple((tokens.mask("vision") & ~receipt[0].chosen).nonzero().flatten().tolist()))
    assert len(kept) > 1


@pytest.mark.parametrize("method", ["fastv", "pyramid_drop", "vtw"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_dropping_is_hiding_in_generation(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs], method: str, options: dict[str, int]
) -> None:
    """Eight left-padded rows with different numbers of visual tokens; the logits of every step."""
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
        assert all(set(effect.calls.values()) == {4} for effect in receipt), "the prompt and three steps"
    close(logits["mask"], logits["drop"])


@pytest.mark.parametrize("count", [1, 9, 36, 100, 576, 2880])
def test_as_many_stay_as_the_share_says(count: int) -> None:
    """Every share that is a whole number of tokens, whatever its rounding error: 0.53 of 100 are 53."""
    assert [int(kept_tokens(torch.tensor(count), kept / count)) for kept in range(count)] == list(range(count))


def test_the_share_of_a_hundred(make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]) -> None:
    inputs, model = make_rows([(1, 100, 3), (2, 50, 3)], "left"), make_llama()
    del inputs["pixel_values"]
    with torch.no_grad(), fastv(model, TokenMap.from_inputs(model, inputs), 1, 0.53) as receipt:
        model(**inputs)
    assert receipt[0].chosen.sum(dim=1).tolist() == [47, 24]


def test_layers_do_less_work(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    """13 positions, in rows of 4, 4 and 0 visual tokens that are halved twice."""
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


def test_recording_beside_a_pruning(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    """One's own record does not get in the way of the ranking, nor the other way round."""
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
        ([0, 2], 0.5, r"layers \[0, 2\] cannot drop by the attention before them"),
        ([2, 1], 0.5, r"layers \[2, 1\] cannot drop"),
        ([], 0.5, r"layers \[\] cannot drop"),
        ([3], 0.5, r"layers \[3\] are outside the model"),
        ([1], 1.0, r"keep=1.0 is no share that drops anything"),
        ([1], -0.1, r"keep=-0.1 is no share"),
    ],
)
def test_bad_input(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], layers: list[int], keep: float, message: str
) -> None:
    model = make_llava()
    with pytest.raises(ValueError, match=message):
        pyramid_drop(model, TokenMap.from_inputs(model, make_inputs()), layers, keep).__enter__()


def test_a_chunked_prompt_cannot_choose(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    model = make_llava()
    inputs = {name: values[:1] for name, values in make_inputs().items()}
    tokens = TokenMap.from_inputs(model, inputs)
    told = pytest.raises(ValueError, match="only if the whole prompt runs in one call")
    with told, torch.no_grad(), fastv(model, tokens, 1, 0.5):
        model.get_decoder()(input_ids=inputs["input_ids"][:, :9], use_cache=True)
