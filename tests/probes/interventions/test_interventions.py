"""`RemoveTokens` and `intervene` against a decoder that runs on shorter sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, StaticCache

from probes import BlockAttention, PatchActivations, RemoveTokens, TokenMap, intervene, record_attention
from tests.probes import reference_llama

Model = LlavaForConditionalGeneration
Inputs = dict[str, Tensor]
IMAGE_TOKEN = 63


@torch.no_grad()
def logits_without_tokens(model: Model, inputs: Inputs, row: int, layers: Iterable[int], group: Tensor) -> Tensor:
    """Return the logits `[tokens, vocabulary]` of one unpadded row, where `layers` run without the tokens of `group`.

    The decoder's layers run one by one, on sequences of the remaining tokens with their own position embeddings.
    """
    unpadded = inputs["attention_mask"][row].bool()
    input_ids, group = inputs["input_ids"][row, unpadded][None], group[row, unpadded]
    hidden = model.get_input_embeddings()(input_ids)
    images = (inputs["input_ids"] == IMAGE_TOKEN).any(dim=1)
    if images[row]:
        image = inputs["pixel_values"][images[:row].sum()][None]
        features = model.model.get_image_features(image).pooler_output[0]
        hidden[input_ids == IMAGE_TOKEN] = features
    decoder = model.get_decoder()
    cos, sin = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for number, layer in enumerate(decoder.layers):
        keep = ~group if number in layers else torch.ones_like(group)
        length = int(keep.sum())
        if not length:
            continue
        mask = torch.full((1, 1, length, length), -torch.inf).triu(1)
        embeddings = cos[:, keep], sin[:, keep]
        hidden[:, keep] = layer(hidden[:, keep], attention_mask=mask, position_embeddings=embeddings)
    return model.lm_head(decoder.norm(hidden))[0]


# Options of removal whose results must not differ.
OPTIONS = {"mask": {}, "drop": {"how": "drop"}, "drop, cache kept": {"how": "drop", "keep_cache": True}}
CACHES = ("dynamic", "static")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [range(1, 2), range(2), range(1, 3), range(3)])
@pytest.mark.parametrize(
    ("variant", "group"), [*((variant, "vision") for variant in OPTIONS), ("mask", "system"), ("drop", "system")]
)
def test_remove_tokens_equals_run_without_tokens(
    make_llava: Callable[..., Model],
    make_inputs: Callable[..., Inputs],
    side: str,
    implementation: str,
    layers: range,
    variant: str,
    group: str,
) -> None:
    """All unpadded positions of every row, including removed ones, in a batch with unequal numbers of them."""
    inputs, model = make_inputs(side), make_llava(implementation)
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), intervene(model, tokens, RemoveTokens(group, layers, **OPTIONS[variant])) as receipt:
        logits = model(**inputs).logits
    for row in range(3):
        expected = logits_without_tokens(model, inputs, row, layers, tokens.mask(group))
        close(logits[row, inputs["attention_mask"][row].bool()], expected)
    removed = int(tokens.mask(group).sum())
    assert receipt[0].calls == dict.fromkeys(layers, 1)
    assert receipt[0].tokens == dict.fromkeys(layers, removed)


def test_remove_tokens_changes_only_rows_with_tokens(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """The comparisons with a reference run would also pass if nothing were removed, so check that logits change."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        plain = model(**inputs).logits
        with intervene(model, tokens, RemoveTokens("vision", range(1, 2))):
            changed = model(**inputs).logits
    assert ((plain - changed)[:2, -1].abs().amax(dim=-1) > 0.01).all(), "the last token attends to the image"
    unpadded = inputs["attention_mask"][2].bool()
    close(changed[2, unpadded], plain[2, unpadded])  # the row without an image


@pytest.mark.parametrize("variant", OPTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_remove_tokens_batch_equals_single_rows(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs], side: str, variant: str
) -> None:
    """Rows with different numbers of visual tokens; a plain decoder takes any number, without pixels."""
    inputs, model = make_rows([(i % 4, 2 + i, 9 - i) for i in range(8)], side), make_llama()
    del inputs["pixel_values"]
    tokens = TokenMap.from_inputs(model, inputs)
    removal = RemoveTokens("vision", range(1, 3), **OPTIONS[variant])
    with torch.no_grad(), intervene(model, tokens, removal) as receipt:
        logits = model(**inputs).logits
    assert receipt[0].tokens == {1: 44, 2: 44}
    for row in range(8):
        unpadded = inputs["attention_mask"][row].bool()
        single = {name: values[row, unpadded][None] for name, values in inputs.items()}
        with torch.no_grad(), intervene(model, TokenMap.from_inputs(model, single), removal):
            close(logits[row, unpadded], model(**single).logits[0])


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("variant", "cache"),
    [("mask", "dynamic"), ("mask", "static"), ("drop", "dynamic"), *(("drop, cache kept", c) for c in CACHES)],
)
def test_remove_tokens_cached_steps_do_not_attend_to_removed_tokens(
    make_llava: Callable[..., Model],
    make_inputs: Callable[..., Inputs],
    padded: bool,
    implementation: str,
    variant: str,
    cache: str,
) -> None:
    """Without padding, sdpa gets no mask in the prompt and in the steps, so the mask has to be built."""
    inputs, model = make_inputs("left"), make_llava(implementation)
    if not padded:
        inputs = {name: values[:1] for name, values in inputs.items()}
    rows, length = inputs["input_ids"].shape
    steps, mask = torch.tensor([[5, 6], [7, 8], [9, 10]])[:rows], inputs["attention_mask"]
    tokens = TokenMap.from_inputs(model, inputs)
    past = StaticCache(config=model.config.text_config, max_cache_len=length + 3) if cache == "static" else None
    with torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", [0, 1], **OPTIONS[variant])) as receipt:
        past = model(**inputs, past_key_values=past, use_cache=True).past_key_values
        logits = []
        for step in steps.split(1, dim=1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = model(input_ids=step, attention_mask=mask, past_key_values=past, use_cache=True)
            logits.append(out.logits)
    assert receipt[0].calls == {0: 3, 1: 3}
    assert receipt[0].tokens == dict.fromkeys([0, 1], int(tokens.mask("vision").sum()))

    full = inputs | {"input_ids": torch.cat([inputs["input_ids"], steps], dim=1), "attention_mask": mask}
    vision = full["input_ids"] == IMAGE_TOKEN
    for row in range(rows):
        close(torch.cat(logits, dim=1)[row], logits_without_tokens(model, full, row, [0, 1], vision)[-2:])


@pytest.mark.parametrize("variant", ["mask", "drop, cache kept"])
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_remove_tokens_when_prefill_or_decode_acts_in_these_calls(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], variant: str, when: Any
) -> None:
    """In the last layer, where the image's own states no longer matter: only in the prompt, or only in two steps."""
    inputs, model = make_inputs("left"), make_llava()
    steps, mask = torch.tensor([[5, 6], [7, 8], [9, 10]]), inputs["attention_mask"]
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", [2], when, **OPTIONS[variant])) as receipt:
        out = model(**inputs, use_cache=True)
        logits = [out.logits]
        for step in steps.split(1, dim=1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = model(input_ids=step, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    assert receipt[0].calls == {2: {"prefill": 1, "decode": 2}[when]}
    full = inputs | {"input_ids": torch.cat([inputs["input_ids"], steps], dim=1), "attention_mask": mask}
    vision = full["input_ids"] == IMAGE_TOKEN
    blind = (torch.arange(15) < 13) == (when == "prefill")
    for row in range(3):
        unpadded = reference_llama.unpadded(full, row)
        edges = blind[unpadded, None] & vision[row, unpadded]
        expected, _ = reference_llama.run_decoder(model, reference_llama.embed_row(model, full, row), {2: edges})
        text = ~vision[row, unpadded]
        close(torch.cat(logits, dim=1)[row, unpadded][text], expected[text])


def test_remove_tokens_generated_group_removes_generated_tokens(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """The prompt has no response, so the layer is unchanged until the first step."""
    inputs, model = make_inputs(), make_llava()
    with intervene(model, TokenMap.from_inputs(model, inputs), RemoveTokens("response", [2])) as receipt:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert (receipt[0].calls, receipt[0].tokens) == ({2: 2}, {2: 6})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_remove_tokens_queries_without_key_stay_finite(
    make_llama: Callable[..., Any], implementation: str, dtype: torch.dtype
) -> None:
    """The removed tokens have no visible key, the first text token only its own; NaN would spread in the gradients."""
    model = make_llama(implementation).to(dtype)
    inputs = {"input_ids": torch.tensor([[IMAGE_TOKEN] * 4 + [5, 6]])}
    with intervene(model, TokenMap.from_inputs(model, inputs), RemoveTokens("vision", range(3))):
        logits = model(**inputs).logits
    logits.sum().backward()
    assert logits.isfinite().all()
    assert model.get_input_embeddings().weight.grad.isfinite().all()


def test_remove_tokens_no_layers_is_bit_identical(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        plain = model(**inputs).logits
        with intervene(model, tokens, RemoveTokens("vision", range(2, 2))) as receipt:
            assert torch.equal(model(**inputs).logits, plain)
        assert receipt[0].calls == receipt[0].tokens == {}
        with intervene(model, tokens, RemoveTokens("vision", range(3))):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, plain), "no hook is left"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.get_decoder().modules())


@pytest.mark.parametrize("record_first", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_record_attention_under_removal_has_nan_for_removed_tokens(
    make_llava: Callable[..., Model],
    make_inputs: Callable[..., Inputs],
    record_first: bool,
    implementation: str,
) -> None:
    inputs, model = make_inputs(), make_llava(implementation)
    tokens = TokenMap.from_inputs(model, inputs)
    removal = intervene(model, tokens, RemoveTokens("vision", [1]))
    recording = record_attention(model, tokens)
    with torch.no_grad():
        with recording if record_first else removal as outer, removal if record_first else recording as inner:
            changed = model(**inputs).logits
        with intervene(model, tokens, RemoveTokens("vision", [1])):
            assert torch.equal(model(**inputs).logits, changed)
    attention = outer if record_first else inner
    vision, target = tokens.index("vision"), attention.targets.index("vision")
    text = attention.targets.index("instruction")
    assert attention.mass[1, :, :, :, vision].isnan().all(), "no query attends to the removed source"
    assert attention.mass[1, :, :, target].isnan().all(), "the removed tokens attend to no key"
    assert (attention.queries[1, ..., vision] == 0).all()
    assert (attention.mass[[0, 2]][:, :2, :, text, vision] > 0).all()
    other_sources = [tokens.index("system"), tokens.index("instruction")]
    whole = attention.mass[1, 0, :, text, other_sources].sum(-1)
    torch.testing.assert_close(whole, torch.ones(4), msg="the other keys get all of the attention")


class TestInterveneErrors:
    @pytest.fixture
    def model(self, make_llava: Callable[..., Model]) -> Model:
        return make_llava()

    @pytest.fixture
    def inputs(self, make_inputs: Callable[..., Inputs]) -> Inputs:
        return make_inputs()

    @pytest.mark.parametrize(
        ("removal", "message"),
        [
            (RemoveTokens("vision", [1, 3]), r"layers \[3\] are outside the model.*3 layers, 0 to 2"),
            (RemoveTokens("vision", [-1]), r"layers \[-1\] are outside the model"),
            (RemoveTokens("image", [1]), "unknown group 'image'.*pad, system, vision"),
        ],
    )
    def test_unknown_layer_or_group_raises(
        self, model: Model, inputs: Inputs, removal: RemoveTokens, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            intervene(model, TokenMap.from_inputs(model, inputs), removal).__enter__()

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (RemoveTokens("vision", 1), r"^layers: 1 .*\[1\]$"),  # type: ignore[arg-type]
            (RemoveTokens("vision", ["1"]), r"^layers: '1' .*\[0, 1\]$"),  # type: ignore[list-item]
            (PatchActivations("vision", [1], "mlp", torch.zeros(32)), "^values: found a Tensor"),  # type: ignore[arg-type]
            ([RemoveTokens("vision", [1])], r"^interventions: found a list"),
        ],
    )
    def test_layer_that_is_no_list_or_list_of_interventions_raises(
        self, model: Model, inputs: Inputs, given: Any, message: str
    ) -> None:
        with pytest.raises(TypeError, match=message):
            intervene(model, TokenMap.from_inputs(model, inputs), given).__enter__()

    def test_intervention_without_effect_raises(self, model: Model, inputs: Inputs) -> None:
        tokens = TokenMap.from_inputs(model, inputs)
        raises = pytest.raises(RuntimeError, match=r"RemoveTokens\(vision\) did nothing in layers \[0, 2\]")
        with raises, intervene(model, tokens, RemoveTokens("vision", [0, 2])):
            pass
        raises = pytest.raises(RuntimeError, match=r"RemoveTokens\(response\) did nothing")
        with raises, torch.no_grad(), intervene(model, tokens, RemoveTokens("response", [0])):
            model(**inputs)

    def test_exception_inside_block_is_not_replaced(self, model: Model, inputs: Inputs) -> None:
        tokens = TokenMap.from_inputs(model, inputs)
        with pytest.raises(KeyError, match="from inside"), intervene(model, tokens, RemoveTokens("vision", [0])):
            raise KeyError("from inside")
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.get_decoder().modules())

    def test_call_that_does_not_fit_token_map_raises(self, model: Model, inputs: Inputs) -> None:
        tokens = TokenMap.from_inputs(model, {name: values[:1] for name, values in inputs.items()})
        raises = pytest.raises(ValueError, match=r"the token map has 1 x 13 positions .* called with 3 x 13")
        with raises, torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", [0])):
            model(**inputs)

    @pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
    def test_attention_without_writable_mask_raises(self, model: Model, inputs: Inputs, implementation: str) -> None:
        tokens: Any = TokenMap.from_inputs(model, inputs)
        model.get_decoder().config._attn_implementation = implementation
        with pytest.raises(ValueError, match=f"'{implementation}' cannot be probed.*'sdpa'"):
            intervene(model, tokens, RemoveTokens("vision", [0])).__enter__()


@pytest.mark.parametrize("selector", [["vision"], None, np.ones((3, 8), bool)], ids=["list", "none", "numpy"])
def test_intervene_with_unknown_kind_of_selector_raises_type_error(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], selector: Any
) -> None:
    model, inputs = make_llava(), make_inputs("left")
    tokens, kind = TokenMap.from_inputs(model, inputs), type(selector).__name__
    for name, intervention in [
        ("source", BlockAttention(selector, "instruction", [1])),
        ("target", BlockAttention("vision", selector, [1])),
        ("group", RemoveTokens(selector, [1])),
        ("at", PatchActivations(selector, [1], "residual", "zero")),
    ]:
        with pytest.raises(TypeError, match=f"{name}: found a {kind}"), intervene(model, tokens, intervention):
            pass
