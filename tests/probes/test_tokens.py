from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from probes import TokenMap
from probes.tokens import GROUPS

IMAGE_TOKEN = 9


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Only its config matters here."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=10,
            hidden_size=4,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_token_id=IMAGE_TOKEN,
        )
    )


segments = st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(1, 4), st.integers(0, 3))


@settings(deadline=None)
@given(
    rows=st.lists(segments, min_size=1, max_size=4).filter(lambda rows: any(row[1] for row in rows)),
    sides=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_layouts_come_back(model: LlamaForCausalLM, rows: list[tuple[int, int, int, int]], sides: list[bool]) -> None:
    """Rows of (system, vision, instruction, response) with padding on either side are labelled as they were built."""
    length = max(map(sum, rows))
    wanted, ids, attention, labels = [], [], [], []
    for (system, vision, instruction, response), left in zip(rows, sides, strict=False):
        text = ["system" if vision else "instruction"] * system
        row = text + ["vision"] * vision + ["instruction"] * instruction + ["response"] * response
        pads = ["pad"] * (length - len(row))
        row = pads + row if left else row + pads
        wanted.append(row)
        ids.append([IMAGE_TOKEN if name == "vision" else 5 for name in row])
        attention.append([name != "pad" for name in row])
        labels.append([5 if name == "response" else -100 for name in row])
    inputs = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(attention).long(),
        "labels": torch.tensor(labels),
    }
    tokens = TokenMap.from_inputs(model, inputs)
    assert [[GROUPS[label] for label in row] for row in tokens.labels.tolist()] == wanted

    memberships = torch.stack([tokens.mask(group) for group in tokens.groups])
    assert (memberships.sum(dim=0) == 1).all(), "the groups partition the positions"


def test_padding_outranks_the_image_token_and_labels(model: LlamaForCausalLM) -> None:
    ids = torch.tensor([[9, 9, 3, 9, 4]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0, 1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, -100, -100, -100, 4]]),
    }
    tokens = TokenMap.from_inputs(model, inputs)
    assert tokens.labels.tolist() == [[GROUPS.index(n) for n in ("pad", "vision", "instruction", "vision", "pad")]]


def test_merge_pools_in_place(model: LlamaForCausalLM) -> None:
    tokens = TokenMap.from_inputs(model, {"input_ids": torch.tensor([[3, 9, 9, 4]])})
    merged = tokens.merge({"text": ["system", "instruction", "response"]})
    assert merged.groups == ("pad", "text", "vision")
    assert merged.labels.tolist() == [[1, 2, 2, 1]]
    assert merged.generated == "text", "what is generated follows its group"
    assert tokens.groups == GROUPS, "the original is unchanged"


def test_merge_may_reuse_the_name_of_a_pooled_group(model: LlamaForCausalLM) -> None:
    tokens = TokenMap.from_inputs(model, {"input_ids": torch.tensor([[3, 9, 4]])})
    merged = tokens.merge({"instruction": ["system", "instruction"]})
    assert merged.groups == ("pad", "instruction", "vision", "response")
    assert torch.equal(merged.mask("instruction"), torch.tensor([[True, False, True]]))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"text": ["system", "sky"]}, "unknown group 'sky': this token map has pad, system, vision"),
        ({"a": ["system"], "b": ["system"]}, "pooled twice"),
        ({"vision": ["system"]}, "cannot pool into 'vision'"),
    ],
)
def test_merge_errors(model: LlamaForCausalLM, groups: dict[str, list[str]], message: str) -> None:
    tokens = TokenMap.from_inputs(model, {"input_ids": torch.tensor([[3, 9, 4]])})
    with pytest.raises(ValueError, match=message):
        tokens.merge(groups)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 3)}, r"inputs need input_ids .* given: inputs_embeds"),
        ({"input_ids": torch.tensor([9, 9])}, "inputs need input_ids of shape"),
        ({"input_ids": torch.tensor([[9, 9]]), "attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
        ({"input_ids": torch.tensor([[3, 4]])}, "no visual token"),
        ({"input_ids": torch.tensor([[9, 4]]), "attention_mask": torch.tensor([[0, 1]])}, "no visual token"),
    ],
)
def test_input_errors(model: LlamaForCausalLM, inputs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenMap.from_inputs(model, inputs)


def test_a_model_without_image_token(model: LlamaForCausalLM) -> None:
    text_only = LlamaForCausalLM(
        LlamaConfig(vocab_size=10, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="LlamaConfig has neither image_token_id nor image_token_index"):
        TokenMap.from_inputs(text_only, {"input_ids": torch.tensor([[9]])})


def test_unknown_group(model: LlamaForCausalLM) -> None:
    tokens = TokenMap.from_inputs(model, {"input_ids": torch.tensor([[3, 9, 4]])})
    with pytest.raises(ValueError, match="unknown group 'image': this token map has pad, system, vision, instruction"):
        tokens.mask("image")
