"""`BlockAttention` against a decoder in plain tensor operations with the edges cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlavaForConditionalGeneration, MistralConfig, MistralForCausalLM, StaticCache

from probes.attention.recording import record_attention
from probes.interventions import BlockAttention, RemoveTokens, intervene
from probes.tokens.token_map import TokenMap
from tests.probes import reference_llama
from tests.tiny_models import tiny_text_config

Model = LlavaForConditionalGeneration
Inputs = dict[str, Tensor]


def single_row() -> Inputs:
    """Return one row: a word, an image of four patches, two words."""
    return {
        "input_ids": torch.tensor([[5, *[reference_llama.IMAGE_TOKEN] * 4, 6, 7]]),
        "attention_mask": torch.ones(1, 7, dtype=torch.long),
        "pixel_values": torch.linspace(-1, 1, 192).view(1, 3, 8, 8),
    }


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def logits_with_blocked_edges(
    model: Model, inputs: Inputs, row: int, source: Tensor, target: Tensor, layers: Any
) -> tuple[Tensor, int]:
    """Return the logits of a row with the edges cut, and the number of queries that lose an edge."""
    unpadded = reference_llama.unpadded(inputs, row)
    edges = target[row, unpadded][:, None] & source[row, unpadded][None]
    logits, _ = reference_llama.run_decoder(
        model, reference_llama.embed_row(model, inputs, row), dict.fromkeys(layers, edges)
    )
    return logits, int((edges & torch.ones_like(edges).tril()).any(dim=1).sum())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("source", "target"), [("vision", "instruction"), ("vision", "vision"), ("system", "instruction")]
)
def test_block_attention_equals_run_with_blocked_edges(
    make_llava: Callable[..., Model],
    make_inputs: Callable[..., Inputs],
    side: str,
    implementation: str,
    source: str,
    target: str,
) -> None:
    """All unpadded positions of every row. Vision at the start of a row has no key left if its own is blocked."""
    inputs, model = make_inputs(side), make_llava(implementation)
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), intervene(model, tokens, BlockAttention(source, target, [0, 2])) as receipt:
        logits = model(**inputs).logits
    touched = 0
    for row in range(3):
        masks = tokens.mask(source), tokens.mask(target)
        expected, queries = logits_with_blocked_edges(model, inputs, row, *masks, [0, 2])
        close(logits[row, reference_llama.unpadded(inputs, row)], expected)
        touched += queries
    assert receipt[0].calls == {0: 1, 2: 1}
    assert receipt[0].tokens == {0: touched, 2: touched}
    assert receipt[0].mass == {0: 0.0, 2: 0.0}


def test_block_attention_changes_only_target_of_rows_with_source(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        plain = model(**inputs).logits
        with intervene(model, tokens, BlockAttention("vision", "instruction", [1])):
            changed = model(**inputs).logits
    differs = (plain - changed).abs().amax(dim=-1) > 1e-3
    instruction = tokens.mask("instruction")
    instruction[2] = False  # the row without an image
    assert torch.equal(differs, instruction)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=st.lists(st.booleans(), min_size=7, max_size=7), target=st.lists(st.booleans(), min_size=7, max_size=7))
def test_block_attention_any_masks_equals_run_with_blocked_edges(
    make_llava: Callable[..., Model], implementation: str, source: list[bool], target: list[bool]
) -> None:
    """Masks instead of groups, on an unpadded row. Without an edge to cut, logits are identical and leaving raises."""
    model, inputs = make_llava(implementation), single_row()
    tokens = TokenMap.from_inputs(model, inputs)
    masks = torch.tensor([source]), torch.tensor([target])
    expected, queries = logits_with_blocked_edges(model, inputs, 0, *masks, [1])
    expected_exit = (
        contextlib.nullcontext() if queries else pytest.raises(RuntimeError, match=r"did nothing in layers \[1\]")
    )
    with expected_exit, intervene(model, tokens, BlockAttention(*masks, [1])) as receipt, torch.no_grad():
        logits = model(**inputs).logits
    close(logits[0], expected)
    assert receipt[0].tokens == {1: queries}
    if not queries:
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("when", ["prefill", "decode", "both"])
def test_block_attention_cached_steps_equal_one_pass(
    make_llava: Callable[..., Model],
    make_inputs: Callable[..., Inputs],
    padded: bool,
    cache: str,
    implementation: str,
    when: str,
) -> None:
    """Steps of one token and of two. Without padding, sdpa gets no mask in the prompt and in the steps."""
    inputs, model = make_inputs("left"), make_llava(implementation)
    if not padded:
        inputs = {name: values[:1] for name, values in inputs.items()}
    rows, length = inputs["input_ids"].shape
    steps, mask = torch.tensor([[5, 6, 4], [7, 8, 3], [9, 10, 2]])[:rows], inputs["attention_mask"]
    tokens = TokenMap.from_inputs(model, inputs).merge({"text": ["instruction", "response"]})
    past = StaticCache(config=model.config.text_config, max_cache_len=length + 5) if cache == "static" else None
    with torch.no_grad(), intervene(model, tokens, BlockAttention("vision", "text", [1, 2], when)) as receipt:
        past = model(**inputs, past_key_values=past, use_cache=True).past_key_values
        logits = []
        for step in steps.split([1, 2], dim=1):
            mask = torch.nn.functional.pad(mask, (0, step.shape[1]), value=1)
            out = model(input_ids=step, attention_mask=mask, past_key_values=past, use_cache=True)
            logits.append(out.logits)
    assert receipt[0].calls == dict.fromkeys([1, 2], {"prefill": 1, "decode": 2, "both": 3}[when])
    assert receipt[0].mass == {1: 0.0, 2: 0.0}

    full = inputs | {"input_ids": torch.cat([inputs["input_ids"], steps], dim=1), "attention_mask": mask}
    decoding = torch.arange(length + 3) >= length
    text = torch.nn.functional.pad(tokens.mask("text"), (0, 3), value=True)
    target = text & {"prefill": ~decoding, "decode": decoding, "both": torch.ones_like(decoding)}[when]
    vision = full["input_ids"] == reference_llama.IMAGE_TOKEN
    for row in range(rows):
        expected, _ = logits_with_blocked_edges(model, full, row, vision, target, [1, 2])
        close(torch.cat(logits, dim=1)[row], expected[-3:])


def test_block_attention_generation_equals_step_by_step_decoding(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    inputs, model = make_inputs("left"), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    knockouts = [BlockAttention("vision", target, range(3)) for target in ("instruction", "response")]
    with intervene(model, tokens, *knockouts) as receipt:
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
    assert [effect.calls for effect in receipt] == [dict.fromkeys(range(3), 1), dict.fromkeys(range(3), 3)]
    for row in range(3):
        unpadded = reference_llama.unpadded(inputs, row)
        full = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        answer: list[int] = []
        for _ in range(4):
            length = full["input_ids"].shape[1]
            vision = full["input_ids"] == reference_llama.IMAGE_TOKEN
            text = torch.nn.functional.pad(tokens.mask("instruction"), (0, length - unpadded.numel()), value=True)
            logits, _ = logits_with_blocked_edges(model, full, row, vision, text, range(3))
            answer.append(int(logits[-1].argmax()))
            full["input_ids"] = torch.cat([full["input_ids"], torch.full((3, 1), answer[-1])], dim=1)
            full["attention_mask"] = torch.nn.functional.pad(full["attention_mask"], (0, 1), value=1)
        assert generated[row].tolist() == answer


def test_block_attention_batch_equals_single_rows(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]
) -> None:
    """Eight left-padded rows with different numbers of visual tokens; a plain decoder takes any number of them."""
    inputs, model = make_rows([(i % 4, 2 + i, 9 - i) for i in range(8)], "left"), make_llama()
    del inputs["pixel_values"]
    knockout = BlockAttention("vision", "instruction", [0, 1])
    with torch.no_grad(), intervene(model, TokenMap.from_inputs(model, inputs), knockout):
        logits = model(**inputs).logits
    for row in range(8):
        unpadded = reference_llama.unpadded(inputs, row)
        single = {name: values[row, unpadded][None] for name, values in inputs.items()}
        with torch.no_grad(), intervene(model, TokenMap.from_inputs(model, single), knockout):
            close(logits[row, unpadded], model(**single).logits[0])


def test_block_attention_keeps_sliding_window() -> None:
    """Keys outside the window stay hidden, and only edges inside it count as cut."""
    torch.manual_seed(0)
    config = tiny_text_config(
        MistralConfig, sliding_window=3, initializer_range=0.2, image_token_id=reference_llama.IMAGE_TOKEN
    )
    model: Any = MistralForCausalLM(config).eval()
    input_ids = torch.tensor([[5, 6, *[reference_llama.IMAGE_TOKEN] * 3, 7, 8, 9, 4]])
    tokens = TokenMap.from_inputs(model, {"input_ids": input_ids})
    with torch.no_grad(), intervene(model, tokens, BlockAttention("vision", "instruction", [0, 1, 2])) as receipt:
        logits = model(input_ids=input_ids).logits[0]
    assert receipt[0].tokens == dict.fromkeys(range(3), 2), "positions 5 and 6 attend to vision, 7 and 8 only to text"
    distance = torch.arange(9)[:, None] - torch.arange(9)
    vision, target = tokens.mask("vision")[0], tokens.mask("instruction")[0]
    edges = (distance >= 3) | (target[:, None] & vision)
    with torch.no_grad():
        expected, _ = reference_llama.run_decoder(
            model, model.get_input_embeddings()(input_ids), dict.fromkeys(range(3), edges)
        )
    close(logits, expected)


@pytest.mark.parametrize("record_first", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_record_attention_under_block_attention_has_nan_for_blocked_edges(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], record_first: bool, implementation: str
) -> None:
    inputs, model = make_inputs(), make_llava(implementation)
    tokens = TokenMap.from_inputs(model, inputs)
    knockout = intervene(model, tokens, BlockAttention("vision", "instruction", [1]))
    recording = record_attention(model, tokens)
    with torch.no_grad():
        with recording if record_first else knockout as outer, knockout if record_first else recording as inner:
            changed = model(**inputs).logits
        with intervene(model, tokens, BlockAttention("vision", "instruction", [1])):
            assert torch.equal(model(**inputs).logits, changed)
    attention = outer if record_first else inner
    vision, text = tokens.index("vision"), attention.targets.index("instruction")
    assert attention.mass[1, :, :, text, vision].isnan().all(), "the instruction does not attend to vision"
    assert (attention.mass[1, :2, :, attention.targets.index("vision"), vision] > 0).all(), (
        "vision still attends to vision"
    )
    assert (attention.mass[[0, 2]][:, :2, :, text, vision] > 0).all(), (
        "the instruction attends to vision in other layers"
    )


def test_intervene_several_interventions_compose(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """Edges cut by either of two interventions on one layer are cut, in any order, and also with a removal."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    pair = BlockAttention("vision", "instruction", [1]), BlockAttention("system", "instruction", [1, 2])
    either = tokens.mask("vision") | tokens.mask("system")
    with torch.no_grad():
        with intervene(model, tokens, *pair):
            first = model(**inputs).logits
        with intervene(model, tokens, *reversed(pair)):
            second = model(**inputs).logits
        joint = BlockAttention(either, "instruction", [1]), BlockAttention("system", "instruction", [2])
        with intervene(model, tokens, *joint):
            third = model(**inputs).logits
        with intervene(model, tokens, RemoveTokens("vision", [1])):
            removed = model(**inputs).logits
        with intervene(model, tokens, RemoveTokens("vision", [1]), pair[0]):
            after_removal = model(**inputs).logits
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert torch.equal(after_removal, removed), "removed tokens have no edge to cut"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_block_attention_kernel_without_mask_raises(
    make_llava: Callable[..., Model],
    make_inputs: Callable[..., Inputs],
    implementation: str,
) -> None:
    """An attention that loses its mask before the kernel raises."""
    inputs, model = make_inputs(), make_llava(implementation)
    attention = model.get_decoder().layers[1].self_attn

    def discard_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs["attention_mask"]
        return args, kwargs | {"attention_mask": torch.full_like(mask, mask.dtype == torch.bool)}

    attention.register_forward_pre_hook(discard_mask, with_kwargs=True)
    raises = pytest.raises(RuntimeError, match=r"blocked keys is 0\.\d+, not 0, in layer 1: LlamaAttention")
    tokens = TokenMap.from_inputs(model, inputs)
    with raises, torch.no_grad(), intervene(model, tokens, BlockAttention("vision", "instruction", [1])):
        model(**inputs)
    assert torch.overrides._get_current_function_mode_stack() == []


def test_receipt_frame_and_str_list_effects(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    both = BlockAttention("vision", "instruction", [1]), RemoveTokens("vision", [2])
    with torch.no_grad(), intervene(model, tokens, *both) as receipt:
        model(**inputs)
    frame = receipt.frame()
    assert frame.columns.tolist() == ["intervention", "layer", "calls", "tokens", "mass"]
    assert frame.iloc[0].tolist() == ["BlockAttention(vision -> instruction)", 1, 1, 10, 0.0]
    assert frame.iloc[1].tolist()[:4] == ["RemoveTokens(vision)", 2, 1, 8]
    assert frame["mass"].isna().tolist() == [False, True]
    assert str(receipt).splitlines() == [
        "BlockAttention(vision -> instruction): 1 calls of layers [1], 10 tokens, blocked mass 0",
        "RemoveTokens(vision): 1 calls of layers [2], 8 tokens",
    ]


@pytest.mark.parametrize("exception", [KeyError, KeyboardInterrupt])
def test_block_attention_exception_in_attention_leaves_no_hook(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], exception: type[BaseException]
) -> None:
    """It is raised inside the attention, while its kernel is intercepted: by a fault, or by a user who stops a cell."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)

    def fail(*args: Any) -> None:
        raise exception("from inside")

    handle = model.get_decoder().layers[1].self_attn.o_proj.register_forward_pre_hook(fail)
    with (
        pytest.raises(exception, match="from inside"),
        intervene(model, tokens, BlockAttention("vision", "instruction", [1])),
    ):
        model(**inputs)
    handle.remove()
    assert torch.overrides._get_current_function_mode_stack() == []
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.get_decoder().modules())


@pytest.mark.parametrize(
    ("knockout", "message"),
    [
        (BlockAttention("image", "vision", [1]), "unknown group 'image'"),
        (BlockAttention("vision", "instruction", [3]), r"layers \[3\] are outside the model"),
        (BlockAttention("vision", "instruction", [1], "always"), "unknown when='always'"),  # type: ignore[arg-type]
        (
            BlockAttention(torch.ones(1, 13), "vision", [1]),
            r"torch.float32 of shape \[1, 13\]: it must be torch.bool of shape \[3, 13\]",
        ),
    ],
)
def test_block_attention_invalid_argument_raises(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], knockout: BlockAttention, message: str
) -> None:
    model = make_llava()
    with pytest.raises(ValueError, match=message):
        intervene(model, TokenMap.from_inputs(model, make_inputs()), knockout).__enter__()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.get_decoder().modules())
