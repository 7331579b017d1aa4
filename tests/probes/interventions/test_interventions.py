from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, StaticCache

from probes import RemoveTokens, TokenMap, intervene, record_attention
from tests.probes import by_hand

Model = LlavaForConditionalGeneration
Inputs = dict[str, Tensor]
IMAGE_TOKEN = 63


@torch.no_grad()
def drop_by_hand(model: Model, inputs: Inputs, row: int, layers: Iterable[int], group: Tensor) -> Tensor:
    """Logits `[tokens, vocabulary]` of one unpadded row: inside `layers`, the tokens of `group` are not there at all.

    Runs the decoder's layers one by one, on sequences cut to the kept tokens with their position embeddings.
    """
    live = inputs["attention_mask"][row].bool()
    input_ids, group = inputs["input_ids"][row, live][None], group[row, live]
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


# Ways of removal that must not differ.
WAYS = {"mask": {}, "drop": {"how": "drop"}, "drop, cache kept": {"how": "drop", "keep_cache": True}}
CACHES = ("dynamic", "static")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [range(1, 2), range(2), range(1, 3), range(3)])
@pytest.mark.parametrize(("way", "group"), [*((way, "vision") for way in WAYS), ("mask", "system"), ("drop", "system")])
def test_removal_is_a_physical_drop(
    make_llava: Callable[..., Model],
    make_inputs: Callable[..., Inputs],
    side: str,
    implementation: str,
    layers: range,
    way: str,
    group: str,
) -> None:
    """Every live position of every row, the removed ones too, in a padded batch with unequal numbers of them."""
    inputs, model = make_inputs(side), make_llava(implementation)
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), intervene(model, tokens, RemoveTokens(group, layers, **WAYS[way])) as receipt:
        logits = model(**inputs).logits
    for row in range(3):
        expected = drop_by_hand(model, inputs, row, layers, tokens.mask(group))
        close(logits[row, inputs["attention_mask"][row].bool()], expected)
    removed = int(tokens.mask(group).sum())
    assert receipt[0].calls == dict.fromkeys(layers, 1)
    assert receipt[0].tokens == dict.fromkeys(layers, removed)


def test_removal_changes_the_output(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    """The comparison by hand could not see an intervention on nothing: here it must bite, and only where it should."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        plain = model(**inputs).logits
        with intervene(model, tokens, RemoveTokens("vision", range(1, 2))):
            changed = model(**inputs).logits
    assert ((plain - changed)[:2, -1].abs().amax(dim=-1) > 0.01).all(), "the last token saw the picture"
    live = inputs["attention_mask"][2].bool()
    close(changed[2, live], plain[2, live])  # the row without a picture


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_rows(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs], side: str, way: str
) -> None:
    """Rows with different numbers of visual tokens; a plain decoder takes any, without pixels."""
    inputs, model = make_rows([(i % 4, 2 + i, 9 - i) for i in range(8)], side), make_llama()
    del inputs["pixel_values"]
    tokens = TokenMap.from_inputs(model, inputs)
    removal = RemoveTokens("vision", range(1, 3), **WAYS[way])
    with torch.no_grad(), intervene(model, tokens, removal) as receipt:
        logits = model(**inputs).logits
    assert receipt[0].tokens == {1: 44, 2: 44}
    for row in range(8):
        live = inputs["attention_mask"][row].bool()
        single = {name: values[row, live][None] for name, values in inputs.items()}
        with torch.no_grad(), intervene(model, TokenMap.from_inputs(model, single), removal):
            close(logits[row, live], model(**single).logits[0])


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("way", "cache"),
    [("mask", "dynamic"), ("mask", "static"), ("drop", "dynamic"), *(("drop, cache kept", c) for c in CACHES)],
)
def test_cached_steps_do_not_see_removed_tokens(
    make_llava: Callable[..., Model],
    make_inputs: Callable[..., Inputs],
    padded: bool,
    implementation: str,
    way: str,
    cache: str,
) -> None:
    """Without padding sdpa gets no mask, in the prompt and in the steps: it has to be built."""
    inputs, model = make_inputs("left"), make_llava(implementation)
    if not padded:
        inputs = {name: values[:1] for name, values in inputs.items()}
    rows, length = inputs["input_ids"].shape
    steps, mask = torch.tensor([[5, 6], [7, 8], [9, 10]])[:rows], inputs["attention_mask"]
    tokens = TokenMap.from_inputs(model, inputs)
    past = StaticCache(config=model.config.text_config, max_cache_len=length + 3) if cache == "static" else None
    with torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", [0, 1], **WAYS[way])) as receipt:
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
        close(torch.cat(logits, dim=1)[row], drop_by_hand(model, full, row, [0, 1], vision)[-2:])


@pytest.mark.parametrize("way", ["mask", "drop, cache kept"])
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_hidden_in_some_calls(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], way: str, when: Any
) -> None:
    """In the last layer, where the picture's own states no longer matter: in the prompt alone, or in two steps alone."""
    inputs, model = make_inputs("left"), make_llava()
    steps, mask = torch.tensor([[5, 6], [7, 8], [9, 10]]), inputs["attention_mask"]
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", [2], when, **WAYS[way])) as receipt:
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
        live = by_hand.live(full, row)
        edges = blind[live, None] & vision[row, live]
        expected, _ = by_hand.run(model, by_hand.embed(model, full, row), {2: edges})
        text = ~vision[row, live]
        close(torch.cat(logits, dim=1)[row, live][text], expected[text])


def test_generated_tokens_can_be_removed(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    """The prompt has no response, so the layer is left alone until the first step."""
    inputs, model = make_inputs(), make_llava()
    with intervene(model, TokenMap.from_inputs(model, inputs), RemoveTokens("response", [2])) as receipt:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert (receipt[0].calls, receipt[0].tokens) == ({2: 2}, {2: 6})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_any_key_stay_finite(
    make_llama: Callable[..., Any], implementation: str, dtype: torch.dtype
) -> None:
    """The removed tokens have no key at all and the first text token only itself; NaN would spread in the gradients."""
    model = make_llama(implementation).to(dtype)
    inputs = {"input_ids": torch.tensor([[IMAGE_TOKEN] * 4 + [5, 6]])}
    with intervene(model, TokenMap.from_inputs(model, inputs), RemoveTokens("vision", range(3))):
        logits = model(**inputs).logits
    logits.sum().backward()
    assert logits.isfinite().all()
    assert model.get_input_embeddings().weight.grad.isfinite().all()


def test_no_layers_is_bit_identical(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        plain = model(**inputs).logits
        with intervene(model, tokens, RemoveTokens("vision", range(2, 2))) as receipt:
            assert torch.equal(model(**inputs).logits, plain)
        assert receipt[0].calls == receipt[0].tokens == {}
        with intervene(model, tokens, RemoveTokens("vision", range(3))):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, plain), "nothing is left behind"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.get_decoder().modules())


@pytest.mark.parametrize("record_first", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_recording_under_removal(
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
    assert attention.mass[1, :, :, :, vision].isnan().all(), "nobody sees the removed source"
    assert attention.mass[1, :, :, target].isnan().all(), "the removed tokens see nobody"
    assert (attention.queries[1, ..., vision] == 0).all()
    assert (attention.mass[[0, 2]][:, :2, :, text, vision] > 0).all()
    left = [tokens.index("system"), tokens.index("instruction")]
    whole = attention.mass[1, 0, :, text, left].sum(-1)
    torch.testing.assert_close(whole, torch.ones(4), msg="the other keys take all of the attention")


class TestErrors:
    @pytest.fixture
    def model(self, make_llava: Callable[..., Model]) -> Model:
        return make_llava()

    @pytest.fixture
    def inputs(self, make_inputs: Callable[..., Inputs]) -> Inputs:
        return make_inputs()

    @pytest.mark.parametrize(
        ("removal", "message"),
        [
            (RemoveTokens("vision", [1, 3]), r"layers \[3\] are outside the model: it has 3 layers, 0 to 2"),
            (RemoveTokens("vision", [-1]), r"layers \[-1\] are outside the model"),
            (RemoveTokens("image", [1]), "unknown group 'image': this token map has pad, system, vision"),
        ],
    )
    def test_unknown_layer_or_group(self, model: Model, inputs: Inputs, removal: RemoveTokens, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            intervene(model, TokenMap.from_inputs(model, inputs), removal).__enter__()

    def test_never_fired(self, model: Model, inputs: Inputs) -> None:
        tokens = TokenMap.from_inputs(model, inputs)
        unfired = pytest.raises(RuntimeError, match=r"RemoveTokens\(vision\) did nothing in layers \[0, 2\]")
        with unfired, intervene(model, tokens, RemoveTokens("vision", [0, 2])):
            pass
        unfired = pytest.raises(RuntimeError, match=r"RemoveTokens\(response\) did nothing")
        with unfired, torch.no_grad(), intervene(model, tokens, RemoveTokens("response", [0])):
            model(**inputs)

    def test_an_exception_on_its_way_goes_first(self, model: Model, inputs: Inputs) -> None:
        tokens = TokenMap.from_inputs(model, inputs)
        with pytest.raises(KeyError, match="mine"), intervene(model, tokens, RemoveTokens("vision", [0])):
            raise KeyError("mine")
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.get_decoder().modules())

    def test_tokens_of_another_batch(self, model: Model, inputs: Inputs) -> None:
        tokens = TokenMap.from_inputs(model, {name: values[:1] for name, values in inputs.items()})
        refused = pytest.raises(ValueError, match=r"the token map has 1 x 13 positions .* called with 3 x 13")
        with refused, torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", [0])):
            model(**inputs)

    @pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
    def test_attention_without_a_mask_to_write(self, model: Model, inputs: Inputs, implementation: str) -> None:
        tokens: Any = TokenMap.from_inputs(model, inputs)
        model.get_decoder().config._attn_implementation = implementation
        with pytest.raises(ValueError, match=f"'{implementation}' cannot be probed: load the model with 'sdpa'"):
            intervene(model, tokens, RemoveTokens("vision", [0])).__enter__()
