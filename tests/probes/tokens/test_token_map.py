"""TokenMap: construction from inputs, and pooling, relabelling and splitting of groups."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from probes import TokenMap
from probes.tokens.grid import Grid
from probes.tokens.places import Places
from probes.tokens.token_map import GROUPS
from tests.tiny_models import tiny_text_config

IMAGE_TOKEN = 9


def smallest_config(**fields: Any) -> LlamaConfig:
    """Return a configuration of one layer of width 4, and a vocabulary of 10."""
    sizes = {"vocab_size": 10, "hidden_size": 4, "intermediate_size": 4}
    return tiny_text_config(**sizes, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, **fields)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A text model whose config names an image token; these tests use only its config."""
    return LlamaForCausalLM(smallest_config(image_token_id=IMAGE_TOKEN))


segments = st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(1, 4), st.integers(0, 3))


@given(
    rows=st.lists(segments, min_size=1, max_size=4).filter(lambda rows: any(row[1] for row in rows)),
    sides=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_from_inputs_of_known_layout_returns_its_groups(
    model: LlamaForCausalLM, rows: list[tuple[int, int, int, int]], sides: list[bool]
) -> None:
    """Rows have (system, vision, instruction, response) tokens, and padding on either side."""
    length = max(map(sum, rows))
    expected, ids, attention, labels = [], [], [], []
    for (system, vision, instruction, response), left in zip(rows, sides, strict=False):
        text = ["system" if vision else "instruction"] * system
        row = text + ["vision"] * vision + ["instruction"] * instruction + ["response"] * response
        pads = ["pad"] * (length - len(row))
        row = pads + row if left else row + pads
        expected.append(row)
        ids.append([IMAGE_TOKEN if name == "vision" else 5 for name in row])
        attention.append([name != "pad" for name in row])
        labels.append([5 if name == "response" else -100 for name in row])
    inputs = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(attention).long(),
        "labels": torch.tensor(labels),
    }
    tokens = TokenMap.from_inputs(model, inputs)
    assert [[GROUPS[label] for label in row] for row in tokens.labels.tolist()] == expected

    memberships = torch.stack([tokens.mask(group) for group in tokens.groups])
    assert (memberships.sum(dim=0) == 1).all(), "the groups partition the positions"


def test_from_inputs_with_padded_image_token_returns_pad(model: LlamaForCausalLM) -> None:
    ids = torch.tensor([[9, 9, 3, 9, 4]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0, 1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, -100, -100, -100, 4]]),
    }
    tokens = TokenMap.from_inputs(model, inputs)
    assert tokens.labels.tolist() == [[GROUPS.index(n) for n in ("pad", "vision", "instruction", "vision", "pad")]]


def test_from_inputs_with_answers_of_several_turns_returns_response(model: LlamaForCausalLM) -> None:
    """Labels, the chat template's mask, or LLaVA-Mini's mask mark the answers; the last is aligned to the row's end."""
    ids = torch.tensor([[3, 9, 9, 4, 5, 6, 4, 5]])
    expected = [[1, 2, 2, 3, 4, 4, 3, 4]]
    marks = {
        "labels": torch.tensor([[-100, -100, -100, -100, 5, 6, -100, 5]]),
        "assistant_masks": [[0, 0, 0, 0, 1, 1, 0, 1]],
        "answer_mask": torch.tensor([[False, True, True, False, True]]),
    }
    for name, mark in marks.items():
        assert TokenMap.from_inputs(model, {"input_ids": ids, name: mark}).labels.tolist() == expected, name
    longer = {"answer_mask": torch.tensor([[True] * 3 + [False] * 4 + [True, True, False, True]])}
    assert TokenMap.from_inputs(model, {"input_ids": ids} | longer).labels.tolist() == expected, (
        "it is aligned to the end of the row"
    )


def test_from_inputs_with_video_token_returns_vision(model: LlamaForCausalLM) -> None:
    config = copy.deepcopy(model.config)
    config.video_token_id = 8
    video_model = LlamaForCausalLM(config)
    assert TokenMap.from_inputs(video_model, {"input_ids": torch.tensor([[3, 8, 9, 4]])}).labels.tolist() == [
        [1, 2, 2, 3]
    ]


def test_relabel_with_old_and_new_names_moves_positions(model: LlamaForCausalLM) -> None:
    tokens = TokenMap.from_inputs(model, {"input_ids": torch.tensor([[3, 9, 9, 4, 5]])})
    last, object_ = torch.tensor([[0, 0, 0, 0, 1]]).bool(), torch.tensor([[0, 0, 1, 0, 0]]).bool()
    marked = tokens.relabel({"response": last, "object": object_})
    assert marked.groups == (*GROUPS, "object")
    assert marked.labels.tolist() == [[1, 2, 5, 3, 4]]
    assert tokens.labels.tolist() == [[1, 2, 2, 3, 3]], "the original is unchanged"
    assert marked.relabel({"vision": object_}).labels.tolist() == [[1, 2, 2, 3, 4]], "a later mask overrides"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": torch.tensor([[0, 5]])}, r"labels .* must be \[batch, positions\] with values from 0 to 4"),
        ({"labels": torch.tensor([[-1, 2]])}, r"labels .* values from 0 to 4"),
        ({"labels": torch.tensor([0, 2])}, r"labels \[2\] must be \[batch, positions\]"),
        ({"groups": ("a", "a"), "generated": "a"}, r"groups \('a', 'a'\) must be unique"),
        ({"generated": "answer"}, "must be unique and include 'answer'"),
    ],
)
def test_token_map_with_invalid_fields_raises_value_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenMap(**{"labels": torch.tensor([[0, 1]]), **fields})


masks = st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=2, max_size=2)


@given(first=masks, second=masks)
def test_relabel_of_any_partition_keeps_unmasked_positions(first: list[list[int]], second: list[list[int]]) -> None:
    """Positions with a number get its group; positions with 0 keep theirs."""
    tokens = TokenMap(torch.tensor(first), ("a", "b", "c", "d", "e"), "e")
    numbers = torch.tensor(second)
    names = {1: "b", 2: "new", 3: "d", 4: "newer"}
    marked = tokens.relabel({name: numbers == number for number, name in names.items()})
    assert marked.groups == ("a", "b", "c", "d", "e", "new", "newer")
    for row in range(2):
        for position in range(6):
            number = second[row][position]
            expected = names[number] if number else "abcde"[first[row][position]]
            assert marked.groups[marked.labels[row, position]] == expected


@given(labels=masks, new=st.lists(st.integers(0, 2), min_size=5, max_size=5), generated=st.sampled_from("abcde"))
def test_merge_of_any_partition_moves_only_pooled_groups(
    labels: list[list[int]], new: list[int], generated: str
) -> None:
    """Groups move to one of two pools, or stay (0)."""
    tokens = TokenMap(torch.tensor(labels), tuple("abcde"), generated)
    pools = {
        name: [old for old, pool in zip("abcde", new, strict=True) if pool == n] for n, name in ((1, "x"), (2, "y"))
    }
    merged = tokens.merge({name: olds for name, olds in pools.items() if olds})
    new_name = {old: ("", "x", "y")[pool] or old for old, pool in zip("abcde", new, strict=True)}
    assert merged.groups == tuple(dict.fromkeys(new_name.values()))
    assert [[merged.groups[i] for i in row] for row in merged.labels.tolist()] == [
        [new_name["abcde"[i]] for i in row] for row in labels
    ]
    assert merged.generated == new_name[generated]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": torch.ones(1, 2)}, r"the mask of 'a' has shape \[1, 2\], the map \[1, 4\]"),
        ({"a": torch.tensor([[1, 0, 0, 0]])}, "position 0 of row 0 cannot be 'a': it is padding"),
        ({"a": torch.tensor([[0, 1, 1, 0]]), "b": torch.tensor([[0, 0, 1, 0]])}, "position 2 of row 0 cannot be 'b'"),
    ],
)
def test_relabel_with_invalid_mask_raises_value_error(
    model: LlamaForCausalLM, groups: dict[str, torch.Tensor], message: str
) -> None:
    inputs = {"input_ids": torch.tensor([[3, 9, 9, 4]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    with pytest.raises(ValueError, match=message):
        TokenMap.from_inputs(model, inputs).relabel(groups)


GRIDS = [Grid(0, 1, 2), Grid(1, 1, 1, frame=0), Grid(1, 1, 1, frame=1, tile=2), Grid(2, 1, 3)]
PLACED = torch.tensor([[1, 2, 2, 3, 2, 2, 4], [2, 2, 2, 3, 3, 4, 4]])  # two images, one image


@pytest.mark.parametrize(
    ("by", "parts", "expected"),
    [
        ("image", 2, [[1, 2, 2, 4, 3, 3, 5], [2, 2, 2, 4, 4, 5, 5]]),
        ("frame", 2, [[1, 2, 2, 4, 2, 3, 5], [2, 2, 2, 4, 4, 5, 5]]),
        ("tile", 3, [[1, 2, 2, 5, 2, 4, 6], [2, 2, 2, 5, 5, 6, 6]]),
    ],
)
def test_split_by_coordinate_returns_one_group_per_part(by: str, parts: int, expected: list[list[int]]) -> None:
    tokens = TokenMap(PLACED, places=Places.from_grids(PLACED == 2, GRIDS))
    parted = tokens.split("vision", by=by)
    assert parted.groups == ("pad", "system", *[f"vision_{n}" for n in range(parts)], "instruction", "response")
    assert parted.labels.tolist() == expected
    merged = parted.merge({"vision": [f"vision_{n}" for n in range(parts)]})
    assert merged.groups == GROUPS
    assert torch.equal(merged.labels, PLACED), "merge reverses split"


def test_split_with_invalid_arguments_raises_value_error() -> None:
    tokens = TokenMap(PLACED, places=Places.from_grids(PLACED == 2, GRIDS))
    for map_, group, by, message in (
        (tokens, "vision", "row", "cannot split by 'row'.*image, frame or tile"),
        (tokens, "instruction", "image", "cannot split 'instruction' by image.*visual tokens"),
        (tokens, "pad", "image", "cannot split 'pad' by image.*visual tokens"),
        (tokens, "sky", "image", "unknown group 'sky'"),
        (tokens.relabel({"vision_1": PLACED == 4}), "vision", "image", "already has a group 'vision_1'"),
        (TokenMap(PLACED), "vision", "image", "no places of visual tokens for a map built without a model"),
        (TokenMap(PLACED, model_type="new"), "vision", "image", "no places of visual tokens for model_type 'new'"),
    ):
        with pytest.raises(ValueError, match=message):
            map_.split(group, by=by)


def test_merge_returns_pool_at_index_of_first_group(model: LlamaForCausalLM) -> None:
    tokens = TokenMap.from_inputs(model, {"input_ids": torch.tensor([[3, 9, 9, 4]])})
    merged = tokens.merge({"text": ["system", "instruction", "response"]})
    assert merged.groups == ("pad", "text", "vision")
    assert merged.labels.tolist() == [[1, 2, 2, 1]]
    assert merged.generated == "text", "`generated` follows its group"
    assert tokens.groups == GROUPS, "the original is unchanged"


def test_merge_into_name_of_pooled_group_keeps_name(model: LlamaForCausalLM) -> None:
    tokens = TokenMap.from_inputs(model, {"input_ids": torch.tensor([[3, 9, 4]])})
    merged = tokens.merge({"instruction": ["system", "instruction"]})
    assert merged.groups == ("pad", "instruction", "vision", "response")
    assert torch.equal(merged.mask("instruction"), torch.tensor([[True, False, True]]))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"text": ["system", "sky"]}, "unknown group 'sky'.*pad, system, vision"),
        ({"a": ["system"], "b": ["system"]}, "pooled twice"),
        ({"vision": ["system"]}, "cannot pool into 'vision'"),
    ],
)
def test_merge_with_invalid_pools_raises_value_error(
    model: LlamaForCausalLM, groups: dict[str, list[str]], message: str
) -> None:
    tokens = TokenMap.from_inputs(model, {"input_ids": torch.tensor([[3, 9, 4]])})
    with pytest.raises(ValueError, match=message):
        tokens.merge(groups)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 3)}, r"inputs need input_ids .* given: inputs_embeds"),
        ({"input_ids": torch.tensor([9, 9])}, "inputs need input_ids of shape"),
        ({"input_ids": torch.tensor([[9, 9]]), "attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
        ({"input_ids": torch.tensor([[9, 9]]), "assistant_masks": [[1]]}, r"assistant_masks has shape \[1, 1\]"),
        ({"input_ids": torch.tensor([[3, 4]])}, "no visual token"),
        ({"input_ids": torch.tensor([[9, 4]]), "attention_mask": torch.tensor([[0, 1]])}, "no visual token"),
    ],
)
def test_from_inputs_with_invalid_inputs_raises_value_error(
    model: LlamaForCausalLM, inputs: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenMap.from_inputs(model, inputs)


def test_from_inputs_of_text_model_raises_value_error(model: LlamaForCausalLM) -> None:
    text_only = LlamaForCausalLM(smallest_config())
    with pytest.raises(ValueError, match="LlamaConfig has neither image_token_id nor image_token_index"):
        TokenMap.from_inputs(text_only, {"input_ids": torch.tensor([[9]])})


def test_mask_of_unknown_group_raises_value_error(model: LlamaForCausalLM) -> None:
    tokens = TokenMap.from_inputs(model, {"input_ids": torch.tensor([[3, 9, 4]])})
    with pytest.raises(ValueError, match=r"unknown group 'image'.*pad, system, vision, instruction"):
        tokens.mask("image")
