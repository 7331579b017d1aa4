"""Visual layout of LLaVA-Mini, in the language model and in the pre-fusion layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava_mini import PRESETS
from llava_mini.video import Video
from llava_mini.visual_layout import COMPRESSED, PATCH
from probes.tokens.token_map import GROUPS, TokenMap

SIZES = [(24, 24), (40, 100), (101, 41), (13, 14), (300, 211)]
# A row with two images, a row with a video, a row without image.
TEXTS = ["what <image> is <image> this", "is <video> what is this user :", "what is this"]


@pytest.fixture
def mixed(coordinate_image: Any) -> dict[str, Any]:
    return {
        "images": [coordinate_image(30, 50), coordinate_image(50, 30)],
        "videos": [Video([coordinate_image(36, 60)] * 3)],
        "text": TEXTS,
        "padding": True,
        "return_tensors": "pt",
    }


def sizes_of(tokens: TokenMap, sizes: list[tuple[int, int]], images_per_row: list[int]) -> torch.Tensor:
    """Return the size of the image of each visual token `[tokens, 2]`."""
    first = torch.tensor([sum(images_per_row[:row]) for row in range(len(images_per_row))])
    places, visual = tokens.require_places(), tokens.mask("vision")
    row = visual.nonzero()[:, 0]
    return torch.tensor(sizes)[first[row if tokens.samples is None else tokens.samples[row]] + places.image[visual]]


@pytest.mark.parametrize("stack", ["decoder", "prefusion"])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize(("tiles", "size"), [(1, 2), (1, 3), (2, 2), (2, 3), (3, 6)])
def test_llava_mini_layout_boxes_match_colours(
    make_llava_mini: Any,
    coordinate_image: Any,
    token_colours: Any,
    check_boxes: Any,
    tiles: int,
    size: int,
    pad: bool,
    stack: str,
) -> None:
    """The cases are averages of patches, cells that share patches, tiles with gaps between them, and padding."""
    model, processor = make_llava_mini(tiles, pad, compressor="average", compressor_size=size)
    images = [coordinate_image(*size) for size in SIZES]
    inputs = processor(images=images, text=["what <image> is"] * len(SIZES), return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor, images, stack=stack)
    sizes = sizes_of(tokens, SIZES, [1] * len(SIZES))
    # Interpolation blurs the edges of tiles that are cropped before they are resized.
    check_boxes(token_colours(model, inputs, stack == "prefusion"), tokens.require_places(), sizes, 0.02)


@pytest.mark.parametrize("first", [True, False], ids=["compress first", "project first"])
@pytest.mark.parametrize("tiles", [1, 2])
def test_llava_mini_layout_with_kept_patches_boxes_match_colours(
    make_llava_mini: Any, coordinate_image: Any, token_colours: Any, check_boxes: Any, tiles: int, first: bool
) -> None:
    fields = {"compressor": "average", "prefusion_layers": 0, "keep_patches": True}
    model, processor = make_llava_mini(tiles, compress_before_projection=first, **fields)
    images = [coordinate_image(*size) for size in SIZES]
    inputs = processor(images=images, text=["what <image> is"] * len(SIZES), return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor, images)
    check_boxes(token_colours(model, inputs), tokens.require_places(), sizes_of(tokens, SIZES, [1] * len(SIZES)), 0.02)
    tile = tokens.require_places().tile[tokens.mask("vision")].view(len(SIZES), -1)
    assert (tile[:, -4:] == tiles**2).all()
    assert (tile[:, :-4] < tiles**2).all()
    assert tile.shape[1] == 16 * tiles**2 + 4


@pytest.mark.parametrize("stack", ["decoder", "prefusion"])
@pytest.mark.parametrize("tiles", [1, 2])
def test_llava_mini_layout_of_images_and_video_boxes_match_colours(
    make_llava_mini: Any, mixed: dict[str, Any], token_colours: Any, check_boxes: Any, tiles: int, stack: str
) -> None:
    model, processor = make_llava_mini(tiles, compressor="average")
    inputs = processor(**mixed)
    sizes = [(30, 50), (50, 30), (36, 60)]
    tokens = TokenMap.from_inputs(model, inputs, processor, sizes, stack=stack)
    check_boxes(
        token_colours(model, inputs, stack == "prefusion"),
        tokens.require_places(),
        sizes_of(tokens, sizes, [2, 1, 0]),
        0.02,
    )
    places = tokens.require_places()
    if stack == "decoder":
        assert places.image[0, tokens.mask("vision")[0]].tolist() == [0] * 4 + [1] * 4
        assert places.frame[1, tokens.mask("vision")[1]].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    else:
        assert tokens.samples.tolist() == [0, 0, 1, 1, 1]
        assert places.image[:, 0].tolist() == [0, 1, 0, 0, 0]
        assert places.frame[:, 0].tolist() == [0, 0, 0, 1, 2]
        tile = places.tile[0, tokens.mask("vision")[0]].tolist()
        if tiles == 1:
            assert tile == [0] * 16 + [1] * 4, "the compressed tokens are a separate tile"
        else:
            line = [0] * 4 + [1] * 4
            assert tile == line * 4 + [n + 2 for n in line] * 4 + [4] * 16 + [5] * 4


def test_llava_mini_layout_of_query_tokens_returns_box_of_all_patches(
    make_llava_mini: Any, coordinate_image: Any
) -> None:
    model, processor = make_llava_mini()
    image = coordinate_image(30, 50)
    inputs = processor(images=image, text="what <image> is", return_tensors="pt")
    places = TokenMap.from_inputs(model, inputs, processor, [image]).require_places()
    assert torch.allclose(places.box[0, 1:5], torch.tensor([10.0, 0, 40, 30]), atol=1)  # 24 x 40, cropped to 24 x 24
    assert places.row[0, 1:5].tolist() == [0, 0, 1, 1]
    assert places.column[0, 1:5].tolist() == [0, 1, 0, 1]
    without_processor = TokenMap.from_inputs(model, inputs).require_places()
    assert without_processor.box.isnan().all()
    assert torch.equal(without_processor.row, places.row)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("answers", ["none", "labels", "answer_mask"])
@pytest.mark.parametrize(
    ("tiles", "fields"),
    [
        (1, {}),
        (1, PRESETS["paper"]),
        (1, {"compressor": "none"}),
        (1, {"compressor_size": 0}),
        (2, {"frames_per_chunk": 2}),
        (2, {"compressor": "none", "prefuse_visual_tokens": False}),
    ],
)
def test_from_inputs_of_prefusion_stack_equals_received_sequences(
    make_llava_mini: Any, mixed: dict[str, Any], tiles: int, fields: dict[str, Any], answers: str, side: str
) -> None:
    """Every position holds its text embedding, its patch, its compressed token, or zeros."""
    model, processor = make_llava_mini(tiles, **fields)
    inputs = dict(processor(**mixed, padding_side=side))
    ids = inputs["input_ids"]
    if answers == "labels":
        inputs["labels"] = torch.where(ids == 5, ids, -100)
    elif answers == "answer_mask":
        inputs["answer_mask"] = ids[:, 2:] == 5
    tokens = TokenMap.from_inputs(model, inputs, stack="prefusion")
    positions, samples = model.prefusion_positions(**inputs)
    assert torch.equal(samples, tokens.samples)

    calls = []
    handle = model.model.prefusion.register_forward_pre_hook(lambda module, args: calls.append(torch.cat(args[:2], 1)))
    with torch.no_grad():
        model(**inputs)
        handle.remove()
        embeds = model.model.embed(ids)
        crops = inputs["pixel_values"].unflatten(0, (5, -1))
        patches, compressed = model.model.encode(crops)
    received = [sequence for call in calls for sequence in call]
    assert len(received) == len(positions) == 5
    for frame, sequence in enumerate(received):
        codes, group = positions[frame, : len(sequence)], tokens.labels[frame]
        expected = torch.zeros_like(sequence)
        expected[codes >= 0] = embeds[samples[frame], codes[codes >= 0]]
        expected[codes == PATCH] = patches[frame]
        if (codes == COMPRESSED).any():
            expected[codes == COMPRESSED] = compressed[frame]
        torch.testing.assert_close(sequence, expected)
        assert (positions[frame, len(sequence) :] == -1).all()
        names = [GROUPS[label] for label in group]
        assert [name == "vision" for name in names] == (positions[frame] < -1).tolist()
        assert [name == "pad" for name in names] == (positions[frame] == -1).tolist()
        assert "response" not in names, "answers are not fused"
        if fields.get("compressor_size") != 0:  # without visual tokens, the language model has no system text
            decoder = TokenMap.from_inputs(model, inputs).labels[samples[frame]]
            assert torch.equal(group[positions[frame] >= 0], decoder[positions[frame][positions[frame] >= 0]])


def test_from_inputs_of_prefusion_stack_with_unequal_tiles_pads_rows(
    make_llava_mini: Any, coordinate_image: Any
) -> None:
    """Shorter sequences of a batch end with padding."""
    model, processor = make_llava_mini(1)
    whole = processor(images=coordinate_image(30, 30), text="what <image> is", return_tensors="pt")
    processor.tiles = 2
    tiles = processor(images=coordinate_image(30, 30), text="what <image> is", return_tensors="pt")
    inputs = {name: torch.cat([whole[name], tiles[name]]) for name in whole}
    inputs["visual_layout"][1, 0] = 1
    tokens = TokenMap.from_inputs(model, inputs, stack="prefusion")
    counts = torch.stack([tokens.mask(name).sum(1) for name in ("vision", "system", "instruction", "pad")], 1)
    assert counts.tolist() == [[16 + 4, 1, 1, 64], [5 * 16 + 4, 1, 1, 0]]
    assert torch.equal(tokens.require_places().image >= 0, tokens.mask("vision"))


def test_from_inputs_with_frame_stream_does_not_consume_it(make_llava_mini: Any) -> None:
    model, processor = make_llava_mini()
    frames = [Image.fromarray(np.zeros((30, 40, 3), np.uint8))] * 4
    inputs = processor(videos=[Video(frames)], text="what <video> is", stream=True, return_tensors="pt")
    inputs["pixel_values"] = iter([])
    places = TokenMap.from_inputs(model, inputs, processor, [(30, 40)]).require_places()
    assert places.frame[0].tolist() == [-1] + [frame for frame in range(4) for _ in range(4)] + [-1]
    assert TokenMap.from_inputs(model, inputs, stack="prefusion").labels.shape == (4, 16 + 4 + 2)


def test_from_inputs_of_missing_prefusion_stack_raises_value_error(
    make_llava_mini: Any, make_llava: Any, coordinate_image: Any
) -> None:
    call = {"images": coordinate_image(24, 24), "text": "what <image> is", "return_tensors": "pt"}
    model, processor = make_llava_mini(prefusion_layers=0)
    with pytest.raises(ValueError, match="prefusion_layers=0"):
        TokenMap.from_inputs(model, processor(**call), stack="prefusion")
    model, processor = make_llava()
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration has no stack 'prefusion'"):
        TokenMap.from_inputs(model, processor(**call), stack="prefusion")
    with pytest.raises(ValueError, match=r"unknown stack 'vision'.*decoder or prefusion"):
        TokenMap.from_inputs(model, processor(**call), stack="vision")
