from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, LlavaForConditionalGeneration, MistralConfig, MistralForCausalLM, StaticCache

from probes.attention.recording import record_attention
from probes.interventions import BlockAttention, RemoveTokens, intervene
from probes.readouts.hidden_states import record_states
from probes.tokens.token_map import TokenMap
from tests.probes import by_hand

Model = LlavaForConditionalGeneration
Inputs = dict[str, Tensor]
ROWS = [(i % 4, 2 + i, 9 - i) for i in range(8)]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5, equal_nan=True)


@torch.no_grad()
def withdraw_by_hand(model: Model, inputs: Inputs, row: int, start: int, gone: Tensor) -> Tensor:
    """Logits of the tokens that stay: from layer `start` on they are a sequence of their own, numbered from 0."""
    gone = gone[row, by_hand.live(inputs, row)]
    hidden, decoder = by_hand.embed(model, inputs, row), model.get_decoder()
    for number, layer in enumerate(decoder.layers):
        if number == start:
            hidden = hidden[:, ~gone]
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
def test_renumbered_positions(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], implementation: str, how: Any, padded: bool
) -> None:
    """A prompt and two steps, as if the sequence had been shorter by the picture from layer 1 on."""
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
    vision = full["input_ids"] == by_hand.IMAGE_TOKEN
    differs = False
    for row in range(rows):
        expected = withdraw_by_hand(model, full, row, 1, vision)
        live = by_hand.live(full, row) & ~vision[row]
        close(torch.cat(logits, dim=1)[row, live], expected)
        plain, _ = by_hand.run(
            model, by_hand.embed(model, full, row), dict.fromkeys([1, 2], vision[row, by_hand.live(full, row)])
        )
        differs |= bool((plain[-1] - expected[-1]).abs().max() > 1e-3)
    assert differs, "with positions kept the answer is another"


def test_positions_in_generation(make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]) -> None:
    """Eight left-padded rows, whose position ids `generate` counts without padding, equal eight singles."""
    inputs, model = make_rows(ROWS, "left"), make_llama()
    del inputs["pixel_values"]
    removal = RemoveTokens("vision", range(3), how="drop", positions="renumber")
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with intervene(model, TokenMap.from_inputs(model, inputs), removal):
        logits = torch.stack(model.generate(**inputs, **options).logits)
    for row in range(8):
        live = by_hand.live(inputs, row)
        single = {name: values[row, live][None] for name, values in inputs.items()}
        with intervene(model, TokenMap.from_inputs(model, single), removal):
            close(torch.stack(model.generate(**single, **options).logits)[:, 0], logits[:, row])
        text = single["input_ids"][single["input_ids"] != by_hand.IMAGE_TOKEN][None]
        alone = model.generate(text, attention_mask=torch.ones_like(text), **options)
        close(torch.stack(alone.logits)[:, 0], logits[:, row])


@pytest.mark.parametrize(("when", "keep"), [("prefill", True), ("decode", True), ("both", True), ("prefill", False)])
def test_when_and_the_cache(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs], when: Any, keep: bool
) -> None:
    """With the cache kept, as if hidden in the same calls; without, as if hidden from then on, and the cache shorter."""
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
    prompt, most = 14, 12  # positions, and the most that any row has besides its visual tokens
    shorter = prompt if keep else most
    assert [layer.keys.shape[2] for layer in out[1].past_key_values.layers] == [shorter + 3, prompt + 3, shorter + 3]


def test_two_prompts_in_one_block(make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]) -> None:
    """Each starts anew."""
    inputs, model = make_rows(ROWS, "left"), make_llama()
    del inputs["pixel_values"]
    tokens = TokenMap.from_inputs(model, inputs)
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with intervene(model, tokens, RemoveTokens("vision", [0, 2], how="drop")) as receipt:
        first, second = (torch.stack(model.generate(**inputs, **options).logits) for _ in range(2))
    assert torch.equal(first, second)
    assert receipt[0].tokens == {0: 88, 2: 88}


def test_bfloat16(make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]) -> None:
    """As far from hidden tokens as bfloat16 is from itself in another batch: a few of its steps."""
    inputs, model = make_rows(ROWS, "left"), make_llama().bfloat16()
    del inputs["pixel_values"]
    tokens, logits = TokenMap.from_inputs(model, inputs), []
    for how in ("mask", "drop"):
        removal = RemoveTokens("vision", [1, 2], how=how)
        knockout = BlockAttention("system", "instruction", [1])
        with torch.no_grad(), intervene(model, tokens, removal, knockout) as receipt:
            logits.append(model(**inputs).logits.float())
        assert receipt[1].mass == {1: 0.0}
    live = inputs["attention_mask"].bool()
    assert (logits[0] - logits[1])[live].abs().max() < 0.05 * logits[0][live].std()


def test_kept_cache_saves_the_mlp(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    inputs, model = make_inputs(), make_llava()
    tokens, sizes = TokenMap.from_inputs(model, inputs), []
    for layer in model.get_decoder().layers:
        layer.mlp.gate_proj.register_forward_pre_hook(lambda gate, args: sizes.append(args[0].shape[:2].numel()))
    with torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", [1], how="drop", keep_cache=True)):
        model(**inputs)
    assert sizes == [39, 31, 39], "three rows of 13 positions, two with a picture of 4"


def test_chunks_of_a_prompt(make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]) -> None:
    """The picture lies across two chunks."""
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
    live = inputs["attention_mask"].bool()
    close(torch.cat(logits, dim=1)[live], whole[live])
    assert receipt[0].tokens == {0: 11, 1: 11}


@pytest.mark.parametrize("record_first", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_records_are_those_of_hidden_tokens(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs], record_first: bool, implementation: str
) -> None:
    """Attention and states of a ragged batch, in a prompt and a step, whichever block is outside."""
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


def test_dropped_tokens_have_no_attention(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
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


@pytest.mark.parametrize("nested", [True, False])
def test_with_edges_blocked_in_the_same_layers(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs], nested: bool
) -> None:
    """A knock-out inside or around a drop is the knock-out beside a mask."""
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
    live = inputs["attention_mask"].bool()
    close(logits[0][live], logits[1][live])


def test_gradients_pass(make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]) -> None:
    inputs, model = make_rows(ROWS, "left"), make_llama()
    del inputs["pixel_values"]
    tokens, gradients = TokenMap.from_inputs(model, inputs), []
    live = inputs["attention_mask"].bool()
    for how in ("mask", "drop"):
        model.zero_grad()
        with intervene(model, tokens, RemoveTokens("vision", [1, 2], how=how)):
            model(**inputs).logits[live].square().mean().backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    assert gradients[0].isfinite().all()
    close(gradients[1], gradients[0])


class TestErrors:
    @pytest.fixture
    def model(self, make_llava: Callable[..., Model]) -> Model:
        return make_llava()

    @pytest.fixture
    def inputs(self, make_inputs: Callable[..., Inputs]) -> Inputs:
        return make_inputs()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"how": "cut"}, "unknown how='cut': it is 'mask' or 'drop'"),
            ({"positions": "shift"}, "unknown positions='shift': it is 'keep' or 'renumber'"),
            ({"when": "later"}, "unknown when='later': it is 'prefill', 'decode' or 'both'"),
            ({"keep_cache": True}, "keep_cache=True is for how='drop'"),
            ({"how": "drop", "when": "decode"}, "how='drop' with when='decode' cannot be"),
            ({"positions": "renumber", "when": "prefill"}, "positions='renumber' needs tokens that are gone in every"),
            ({"how": "drop", "keep_cache": True, "positions": "renumber"}, "positions='renumber' needs tokens that"),
        ],
    )
    def test_options(self, model: Model, inputs: Inputs, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            intervene(model, TokenMap.from_inputs(model, inputs), RemoveTokens("vision", [1], **options)).__enter__()

    def test_static_cache(self, model: Model, inputs: Inputs) -> None:
        past = StaticCache(config=model.config.text_config, max_cache_len=20)
        told = pytest.raises(ValueError, match="needs a dynamic cache of all tokens, layer 1 has a StaticLayer")
        tokens = TokenMap.from_inputs(model, inputs)
        with told, torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", [1], how="drop")):
            model(**inputs, past_key_values=past)
        self.clean(model)

    def test_sliding_cache(self) -> None:
        """Without a cache a sliding layer can drop."""
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=3, initializer_range=0.2, **sizes)
        config.image_token_id = by_hand.IMAGE_TOKEN
        model: Any = MistralForCausalLM(config).eval()
        ids = torch.tensor([[5, 6, *[by_hand.IMAGE_TOKEN] * 3, 7, 8, 9, 4]])
        tokens = TokenMap.from_inputs(model, {"input_ids": ids})
        logits = []
        for how in ("mask", "drop"):
            removal = RemoveTokens("vision", [0, 1], how=how)
            with torch.no_grad(), intervene(model, tokens, removal):
                logits.append(model(ids, use_cache=False).logits)
        close(*logits)
        told = pytest.raises(ValueError, match="layer 0 has a DynamicSlidingWindowLayer: use how='mask'")
        with told, torch.no_grad(), intervene(model, tokens, removal):
            model(ids, use_cache=True)

    def test_a_prompt_cached_before(self, model: Model, inputs: Inputs) -> None:
        tokens = TokenMap.from_inputs(model, inputs)
        told = pytest.raises(ValueError, match="layer 1 cannot drop tokens that were cached before the block")
        with torch.no_grad():
            past = model(**inputs, use_cache=True).past_key_values
            mask = pad(inputs["attention_mask"], (0, 1), value=1)
            with told, intervene(model, tokens, RemoveTokens("vision", [1], how="drop")):
                model(input_ids=torch.full((3, 1), 7), attention_mask=mask, past_key_values=past)

    def test_twice_in_a_layer(self, model: Model, inputs: Inputs) -> None:
        tokens = TokenMap.from_inputs(model, inputs)
        pair = RemoveTokens("vision", [1, 2], how="drop"), RemoveTokens("system", [2], how="drop")
        with pytest.raises(ValueError, match="layer 2 drops tokens already: name them all in one RemoveTokens"):
            intervene(model, tokens, *pair).__enter__()
        self.clean(model)

    def test_an_exception_inside_a_layer(self, model: Model, inputs: Inputs) -> None:
        tokens = TokenMap.from_inputs(model, inputs)

        def fail(*args: Any) -> None:
            raise KeyError("mine")

        handle = model.get_decoder().layers[1].mlp.register_forward_pre_hook(fail)
        with torch.no_grad():
            plain = record_attention(model, tokens)
            failing = intervene(model, tokens, RemoveTokens("vision", [1], how="drop"))
            with pytest.raises(KeyError, match="mine"), failing:
                model(**inputs)
            handle.remove()
            self.clean(model)
            with plain as attention:
                model(**inputs)
        assert (attention.mass[1][:2, :, :, tokens.index("vision")] > 0).any()

    def test_positions_on_three_axes(self, model: Model, inputs: Inputs) -> None:
        """As Qwen2-VL's, which have no next number."""
        tokens = TokenMap.from_inputs(model, inputs)
        layer = model.get_decoder().layers[1]

        def three(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, kwargs | {"position_ids": kwargs["position_ids"].expand(3, -1, -1)}

        layer.register_forward_pre_hook(three, with_kwargs=True)
        told = pytest.raises(ValueError, match="LlamaModel does not turn its tokens by one position id each")
        removal = RemoveTokens("vision", [1], how="drop", positions="renumber")
        with told, torch.no_grad(), intervene(model, tokens, removal):
            model(**inputs)

    @staticmethod
    def clean(model: Model) -> None:
        for module in model.get_decoder().modules():
            assert not module._forward_pre_hooks
            assert not module._forward_hooks
            assert not [name for name in module.__dict__ if "probes" in name]
