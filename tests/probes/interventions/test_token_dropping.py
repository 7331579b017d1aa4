"""`RemoveTokens(how="drop")` and renumbered positions, against masked removal and shorter sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, LlavaForConditionalGeneration

from probes.attention.recording import record_attention
from probes.interventions import BlockAttention, RemoveTokens, intervene
from probes.readouts.hidden_states import record_states
from probes.tokens.token_map import TokenMap
from tests.probes import reference_llama

Model = LlavaForConditionalGeneration
Inputs = dict[str, Tensor]
ROWS = [(i % 4, 2 + i, 9 - i) for i in range(8)]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5, equal_nan=True)


@torch.no_grad()
def logits_of_shorter_sequence(model: Model, inputs: Inputs, row: int, start: int, removed: Tensor) -> Tensor:
    """Return the remaining tokens' logits. From layer `start` they are a sequence of their own, numbered from 0."""
    removed = removed[row, reference_llama.unpadded(inputs, row)]
    hidden, decoder = reference_llama.embed_row(model, inputs, row), model.get_decoder()
    for number, layer in enumerate(decoder.layers):
        if number == start:
            hidden = hidden[:, ~removed]
        length = hidden.shape[1]
        hidden = layer(
            hidden,
            attention_mask=torch.full((1, 1, length, length), -torch.inf).triu(1),
            position_embeddings=decoder.rotary_emb(hidden, torch.arange(length)[None]),
        )
    return model.lm_head(decoder.norm(hidden))[0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["mask", "drop"])
@pytest.mark.parametrize("padded", [True, False])
def test_remove_tokens_renumber_equals_shorter_sequence(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], implementation: str, how: Any, padded: bool
) -> None:
    """A prompt and two steps, as if the sequence had no image tokens from layer 1 on."""
    inputs, model = make_inputs("left"), make_llava(implementation)
    if not padded:
        inputs = {name: values[:1] for name, values in inputs.items()}
    rows = len(inputs["input_ids"])
    steps, mask = torch.tensor([[5, 6], [7, 8], [9, 10]])[:rows], inputs["attention_mask"]
    tokens = TokenMap.from_inputs(model, inputs)
    removal = RemoveTokens("vision", range(1, 3), how=how, positions="renumber")
    with torch.no_grad(), intervene(model, tokens, removal):
        out = model(**inputs, use_cache=True)
        logits = [out.logits]
        for step in steps.split(1, dim=1):
            mask = pad(mask, (0, 1), value=1)
            past = out.past_key_values
            out = model(input_ids=step, attention_mask=mask, past_key_values=past, use_cache=True)
            logits.append(out.logits)
    full = inputs | {"input_ids": torch.cat([inputs["input_ids"], steps], dim=1), "attention_mask": mask}
    vision = full["input_ids"] == reference_llama.IMAGE_TOKEN
    differs = False
    for row in range(rows):
        expected = logits_of_shorter_sequence(model, full, row, 1, vision)
        unpadded = reference_llama.unpadded(full, row) & ~vision[row]
        close(torch.cat(logits, dim=1)[row, unpadded], expected)
        plain, _ = reference_llama.run_decoder(
            model,
            reference_llama.embed_row(model, full, row),
            dict.fromkeys([1, 2], vision[row, reference_llama.unpadded(full, row)]),
        )
        differs |= bool((plain[-1] - expected[-1]).abs().max() > 1e-3)
    assert differs, "kept positions give other logits"


def test_remove_tokens_renumber_generation_equals_single_rows_and_text_only(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]
) -> None:
    """Eight left-padded rows, whose position ids `generate` counts without padding, equal eight single rows."""
    inputs, model = make_rows(ROWS, "left"), make_llama()
    del inputs["pixel_values"]
    removal = RemoveTokens("vision", range(3), how="drop", positions="renumber")
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with intervene(model, TokenMap.from_inputs(model, inputs), removal):
        logits = torch.stack(model.generate(**inputs, **options).logits)
    for row in range(8):
        unpadded = reference_llama.unpadded(inputs, row)
        single = {name: values[row, unpadded][None] for name, values in inputs.items()}
        with intervene(model, TokenMap.from_inputs(model, single), removal):
            close(torch.stack(model.generate(**single, **options).logits)[:, 0], logits[:, row])
        text = single["input_ids"][single["input_ids"] != reference_llama.IMAGE_TOKEN][None]
        alone = model.generate(text, attention_mask=torch.ones_like(text), **options)
        close(torch.stack(alone.logits)[:, 0], logits[:, row])


@pytest.mark.parametrize(("when", "keep"), [("prefill", True), ("decode", True), ("both", True), ("prefill", False)])
def test_remove_tokens_drop_equals_mask_and_shortens_cache(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs], when: Any, keep: bool
) -> None:
    """With keep_cache, dropping equals hiding in the same calls; without it, hiding in all calls, with a shorter cache."""
    inputs, model = make_rows(ROWS, "left"), make_llama()
    del inputs["pixel_values"]
    tokens = TokenMap.from_inputs(model, inputs)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    hidden = RemoveTokens("vision", [0, 2], when if keep else "both")
    dropped = RemoveTokens("vision", [0, 2], when, how="drop", keep_cache=keep)
    out = []
    for removal in (hidden, dropped):
        with intervene(model, tokens, removal):
            out.append(model.generate(**inputs, **options))
    close(torch.stack(out[0].logits), torch.stack(out[1].logits))
    prompt, longest_text = 14, 12  # positions of the prompt, and the most that any row has besides its visual tokens
    cached = prompt if keep else longest_text
    assert [layer.keys.shape[2] for layer in out[1].past_key_values.layers] == [cached + 3, prompt + 3, cached + 3]


def test_remove_tokens_drop_second_prompt_starts_fresh(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]
) -> None:
    """The second prompt does not depend on the first."""
    inputs, model = make_rows(ROWS, "left"), make_llama()
    del inputs["pixel_values"]
    tokens = TokenMap.from_inputs(model, inputs)
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with intervene(model, tokens, RemoveTokens("vision", [0, 2], how="drop")) as receipt:
        first, second = (torch.stack(model.generate(**inputs, **options).logits) for _ in range(2))
    assert torch.equal(first, second)
    assert receipt[0].tokens == {0: 88, 2: 88}


def test_remove_tokens_drop_bfloat16_is_close_to_mask(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]
) -> None:
    """The difference is as large as that of bfloat16 between two batches: a few rounding steps."""
    inputs, model = make_rows(ROWS, "left"), make_llama().bfloat16()
    del inputs["pixel_values"]
    tokens, logits = TokenMap.from_inputs(model, inputs), []
    for how in ("mask", "drop"):
        removal = RemoveTokens("vision", [1, 2], how=how)
        knockout = BlockAttention("system", "instruction", [1])
        with torch.no_grad(), intervene(model, tokens, removal, knockout) as receipt:
            logits.append(model(**inputs).logits.float())
        assert receipt[1].mass == {1: 0.0}
    unpadded = inputs["attention_mask"].bool()
    assert (logits[0] - logits[1])[unpadded].abs().max() < 0.05 * logits[0][unpadded].std()


def test_remove_tokens_keep_cache_runs_mlp_on_fewer_tokens(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    inputs, model = make_inputs(), make_llava()
    tokens, sizes = TokenMap.from_inputs(model, inputs), []
    for layer in model.get_decoder().layers:
        layer.mlp.gate_proj.register_forward_pre_hook(lambda gate, args: sizes.append(args[0].shape[:2].numel()))
    with torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", [1], how="drop", keep_cache=True)):
        model(**inputs)
    assert sizes == [39, 31, 39], "three rows of 13 positions, two with an image of 4"


def test_remove_tokens_drop_chunked_prompt_equals_one_pass(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]
) -> None:
    """The image is in two chunks."""
    inputs, model = make_rows([(2, 5, 4), (0, 6, 3)], "left"), make_llama()
    tokens = TokenMap.from_inputs(model, {name: inputs[name] for name in ("input_ids", "attention_mask")})
    removal = RemoveTokens("vision", [0, 1], how="drop")
    with torch.no_grad():
        with intervene(model, tokens, removal):
            whole = model(inputs["input_ids"], inputs["attention_mask"], use_cache=False).logits
        with intervene(model, tokens, removal) as receipt:
            past, logits = DynamicCache(config=model.config), []
            for first, stop in ((0, 4), (4, 11)):
                mask = inputs["attention_mask"][:, :stop]
                ids = inputs["input_ids"][:, first:stop]
                logits.append(model(ids, mask, past_key_values=past).logits)
    unpadded = inputs["attention_mask"].bool()
    close(torch.cat(logits, dim=1)[unpadded], whole[unpadded])
    assert receipt[0].tokens == {0: 11, 1: 11}


@pytest.mark.parametrize("record_first", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_records_under_drop_equal_records_under_mask(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs], record_first: bool, implementation: str
) -> None:
    """Attention and states of a batch of unequal rows, in a prompt and a step, whichever block is the outer one."""
    inputs, model = make_rows(ROWS, "left"), make_llama(implementation)
    del inputs["pixel_values"]
    tokens = TokenMap.from_inputs(model, inputs)

    def run(how: Any) -> tuple[Any, Any, Any]:
        removal = intervene(model, tokens, RemoveTokens("vision", [1, 2], how=how))
        records = (
            record_attention(model, tokens),
            record_states(model, tokens, "instruction", component="attention"),
            record_states(model, tokens, "instruction"),
        )
        with torch.no_grad():
            if not record_first:
                removal.__enter__()
            entered = tuple(record.__enter__() for record in records)
            if record_first:
                removal.__enter__()
            past = model(**inputs, use_cache=True).past_key_values
            mask = pad(inputs["attention_mask"], (0, 1), value=1)
            model(torch.full((8, 1), 7), mask, past_key_values=past)
            for block in (removal, *records):
                block.__exit__(None, None, None)
        return entered

    for masked, dropped in zip(run("mask"), run("drop"), strict=True):
        if hasattr(masked, "mass"):
            for name in ("mass", "entropy", "received", "queries"):
                close(getattr(dropped, name), getattr(masked, name))
            assert dropped.mass[0].isfinite().any()
        else:
            for layer in range(3):
                close(dropped[layer], masked[layer])
                assert dropped[layer].isfinite().all()


def test_record_states_dropped_tokens_are_nan(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    removal = RemoveTokens("vision", [1], how="drop")
    with (
        torch.no_grad(),
        record_states(model, tokens, "vision", component="mlp") as states,
        intervene(model, tokens, removal),
    ):
        model(**inputs)
    assert states[1].isnan().all()
    assert states[0].isfinite().all()


@pytest.mark.parametrize("masked_first", [True, False])
def test_remove_tokens_drop_and_mask_in_one_layer_equal_one_removal(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], masked_first: bool
) -> None:
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    pair = RemoveTokens("system", [1]), RemoveTokens("vision", [1], how="drop")
    both, unpadded = tokens.mask("system") | tokens.mask("vision"), inputs["attention_mask"].bool()
    with torch.no_grad(), intervene(model, tokens, RemoveTokens(both, [1])):
        expected = model(**inputs).logits
    with torch.no_grad(), intervene(model, tokens, *(pair if masked_first else pair[::-1])):
        close(model(**inputs).logits[unpadded], expected[unpadded])


@pytest.mark.parametrize("nested", [True, False])
def test_block_attention_under_drop_equals_under_mask(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs], nested: bool
) -> None:
    """A knock-out inside or around a drop equals the knock-out together with a mask."""
    inputs, model = make_rows(ROWS, "left"), make_llama()
    del inputs["pixel_values"]
    tokens = TokenMap.from_inputs(model, inputs)
    knockout = BlockAttention("system", "instruction", [1, 2])
    other = RemoveTokens("system", [2])
    logits = []
    for how in ("mask", "drop"):
        removal = RemoveTokens("vision", [1, 2], how=how)
        with torch.no_grad():
            if nested:
                with intervene(model, tokens, removal), intervene(model, tokens, other, knockout):
                    logits.append(model(**inputs).logits)
                with intervene(model, tokens, other, knockout), intervene(model, tokens, removal):
                    close(model(**inputs).logits, logits[-1])
            else:
                with intervene(model, tokens, removal, other, knockout) as receipt:
                    logits.append(model(**inputs).logits)
                assert receipt[2].mass == {1: 0.0, 2: 0.0}
    unpadded = inputs["attention_mask"].bool()
    close(logits[0][unpadded], logits[1][unpadded])


def test_remove_tokens_drop_gradients_equal_mask_gradients(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]
) -> None:
    inputs, model = make_rows(ROWS, "left"), make_llama()
    del inputs["pixel_values"]
    tokens, gradients = TokenMap.from_inputs(model, inputs), []
    unpadded = inputs["attention_mask"].bool()
    for how in ("mask", "drop"):
        model.zero_grad()
        with intervene(model, tokens, RemoveTokens("vision", [1, 2], how=how)):
            model(**inputs).logits[unpadded].square().mean().backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    assert gradients[0].isfinite().all()
    close(gradients[1], gradients[0])
