from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from probes.pruning import dart
from probes.pruning.dart import removed_duplicates
from probes.tokens.token_map import TokenMap
from tests.probes import reference_llama
from tests.probes.pruning.rows import TEXTS, assert_rows_independent, embed, removed_in, unpadded_row

Inputs = dict[str, Tensor]


def dart_by_loops(
    states: np.ndarray, keys: np.ndarray, vision: list[int], question: list[int], keep: float
) -> list[int]:
    """Return the kept visual tokens of one row."""
    norm = [math.sqrt(sum(float(x) ** 2 for x in key)) for key in keys]
    asked = math.floor(keep * len(vision) + 1e-6)
    visual_pivots = sorted(vision, key=lambda i: -norm[i])[: min(4, asked)]
    pivots = visual_pivots + sorted(question, key=lambda i: -norm[i])[:4]
    kept, rest = list(visual_pivots), asked - len(visual_pivots)
    for number, pivot in enumerate(pivots):
        quota = rest // len(pivots) + (number < rest % len(pivots))
        left = [i for i in vision if i not in kept]
        cosine = {
            i: states[pivot] @ states[i] / np.linalg.norm(states[pivot]) / np.linalg.norm(states[i]) for i in left
        }
        kept += sorted(left, key=lambda i: cosine[i])[:quota]
    return sorted(kept)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["mask", "drop"])
@pytest.mark.parametrize(("layer", "keep"), [(1, 0.5), (2, 0.75), (2, 0.2), (1, 0.0), (1, 0.95)])
def test_dart_equals_loops_and_reference_decoder(
    make_llama: Callable[..., Any],
    rows: Callable[[str], Inputs],
    side: str,
    implementation: str,
    how: Any,
    layer: int,
    keep: float,
) -> None:
    inputs, model = rows(side), make_llama(implementation)
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), dart(model, tokens, layer, keep, how=how) as receipt:
        logits = model(**embed(model, inputs)).logits
    vision = tokens.mask("vision")
    asked = [math.floor(keep * visual) for _, visual, _ in TEXTS]
    assert (vision & ~receipt[0].chosen).sum(dim=1).tolist() == asked
    for row, (before, visual, after) in enumerate(TEXTS):
        alone = unpadded_row(inputs, row)
        with torch.no_grad():
            states = model.get_decoder()(**embed(model, alone), output_hidden_states=True).hidden_states
            block = model.get_decoder().layers[layer - 1]
            keys = block.self_attn.k_proj(block.input_layernorm(states[layer - 1]))[0].double().numpy()
        kept = dart_by_loops(
            states[layer][0].double().numpy(),
            keys,
            list(range(before, before + visual)),
            list(range(before + visual, before + visual + after)) if visual else [],
            keep,
        )
        real = inputs["attention_mask"][row].bool()
        assert (vision & ~receipt[0].chosen)[row, real].nonzero()[:, 0].tolist() == kept
        removed = receipt[0].chosen[row, real]
        hidden = embed(model, alone)["inputs_embeds"]
        edges = {number: removed[None].expand(len(removed), -1) for number in range(layer, 3)}
        expected, _ = reference_llama.run_decoder(model, hidden, edges)
        torch.testing.assert_close(logits[row, real][~removed], expected[~removed], atol=2e-5, rtol=1e-5)


def test_dart_row_in_batch_equals_row_alone(make_llama: Callable[..., Any], rows: Callable[[str], Inputs]) -> None:
    assert_rows_independent(make_llama(), rows("left"), lambda model, tokens: dart(model, tokens, 1, 0.5))


def test_dart_of_equal_tokens_keeps_exact_number() -> None:
    """Ties in norm and cosine: the first tokens stay. A row without text has visual pivots alone."""
    states, norm = torch.ones(2, 12, 4), torch.ones(2, 12)
    vision = torch.arange(12).expand(2, -1) < 10
    question = ~vision & torch.tensor([[True], [False]])
    removed = removed_duplicates(states, norm, vision, question, 0.6)
    assert (vision & ~removed).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4, 5] * 2


def test_dart_keeps_the_token_unlike_all_others() -> None:
    """Nine of ten visual tokens are alike; the other one is kept however small its key is."""
    states = torch.ones(1, 11, 4)
    states[0, 7] = torch.tensor([1.0, -1, 1, -1])
    norm = torch.arange(11.0).flip(0)[None]
    norm[0, 7] = 0
    vision = torch.arange(11)[None] < 10
    removed = removed_duplicates(states, norm, vision, ~vision, 0.5)
    assert (vision & ~removed)[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 7]


def test_dart_in_generation_with_beams_gives_same_logits_by_mask_and_drop(
    make_llama: Callable[..., Any], rows: Callable[[str], Inputs]
) -> None:
    inputs, model = rows("left"), make_llama()
    tokens = TokenMap.from_inputs(model, inputs)
    logits = []
    for how in ("mask", "drop"):
        with dart(model, tokens, 1, 0.5, how=how) as receipt:  # type: ignore[arg-type]
            out = model.generate(
                **inputs,
                max_new_tokens=3,
                do_sample=False,
                num_beams=2,
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert set(receipt[0].calls.values()) == {3}, "the prompt and two decoding steps"
        logits.append(torch.stack(out.logits))
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("layer", "keep", "message"), [(0, 0.5, r"\[0\]"), (3, 0.5, "3"), (1, 1.0, r"keep=1\.0")])
def test_dart_with_invalid_arguments_raises(
    make_llama: Callable[..., Any], rows: Callable[[str], Inputs], layer: int, keep: float, message: str
) -> None:
    model, inputs = make_llama(), rows("left")
    with pytest.raises(ValueError, match=message):
        removed_in(model, inputs, lambda model, tokens: dart(model, tokens, layer, keep))
