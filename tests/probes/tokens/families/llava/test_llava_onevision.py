"""Visual layout of LLaVA-OneVision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from probes.tokens.token_map import TokenMap

SIZES = [(32, 32), (64, 64), (40, 100), (100, 40), (9, 13), (300, 211), (24, 200), (333, 61), (97, 99), (64, 40)]
PROMPT = "user : <image> what is this"
IMAGE, VIDEO = 10, 11


@pytest.mark.parametrize("tiles", [9, 2])
def test_llava_onevision_layout_boxes_match_colours(
    make_llava_onevision: Any, coordinate_image: Any, token_colours: Any, check_boxes: Any, tiles: int
) -> None:
    """One batch has all sizes, once with all tiles and once interpolated down to two tiles."""
    model, processor = make_llava_onevision(tiles)
    images = [coordinate_image(*size) for size in SIZES]
    inputs = processor(images=images, text=[PROMPT] * len(SIZES), padding=True, return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor)
    places = tokens.require_places()
    assert torch.equal(places.image >= 0, tokens.mask("vision"))
    sizes = torch.tensor(SIZES)[tokens.mask("vision").nonzero()[:, 0]]
    check_boxes(token_colours(model, inputs), places, sizes)


def video_inputs(inputs: Any, frames: torch.Tensor) -> dict[str, Any]:
    """Return inputs for video frames [videos, frames, 3, 32, 32]: 3 x 3 tokens per frame, and a newline."""
    count = frames.shape[1] * 9 + 1
    rows = [torch.cat([x.expand(count) if x == VIDEO else x[None] for x in row]) for row in inputs["input_ids"]]
    return {"input_ids": torch.stack(rows), "pixel_values_videos": frames}


def resized_frame(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255


def test_llava_onevision_layout_of_several_images_per_row_pads_to_squares(
    make_llava_onevision: Any, coordinate_image: Any, token_colours: Any, check_boxes: Any
) -> None:
    """Several images have one square tile and one newline each; a single image in its row is cut into tiles."""
    model, processor = make_llava_onevision()
    images = [[coordinate_image(40, 100), coordinate_image(60, 30)], [coordinate_image(24, 40)]]
    texts = ["user : <image> what <image>", PROMPT]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor)
    places, visual = tokens.require_places(), tokens.mask("vision")
    assert int(visual[0].sum()) == 2 * 26
    assert places.row[0, visual[0]].tolist() == ([i // 5 for i in range(25)] + [-1]) * 2
    assert places.tile[0, visual[0]].tolist() == [0] * 52
    assert places.tile[1, visual[1]].max() > 0
    sizes = torch.tensor([[(40, 100), (60, 30)], [(24, 40), (0, 0)]])
    colours = token_colours(model, inputs)
    colours[25] = colours[51] = float("nan")
    check_boxes(colours, places, sizes[visual.nonzero()[:, 0], places.image[visual]], 0.02)


def test_llava_onevision_layout_of_video_returns_pooled_frames(
    make_llava_onevision: Any, coordinate_image: Any, token_colours: Any, check_boxes: Any
) -> None:
    """Three frames are pooled to 3 x 3 tokens, with one newline at the end."""
    model, processor = make_llava_onevision()
    text = processor.tokenizer("user : <video> what", return_tensors="pt")
    inputs = video_inputs(text, torch.stack([resized_frame(coordinate_image(40, 100))] * 3)[None])
    processor.video_processor = SimpleNamespace(do_resize=True, size={"height": 32, "width": 32}, do_center_crop=None)
    tokens = TokenMap.from_inputs(model, inputs, processor, [(40, 100)])
    places, visual = tokens.require_places(), tokens.mask("vision")
    assert places.frame[visual].tolist() == [0] * 9 + [1] * 9 + [2] * 10
    assert places.row[visual].tolist() == [i // 3 for i in range(9)] * 3 + [-1]
    check_boxes(token_colours(model, inputs), places, (40, 100), 0.03)
    assert TokenMap.from_inputs(model, inputs, processor).require_places().box.isnan().all(), "sizes are unknown"
    with pytest.raises(ValueError, match=r"hold 1 images.*2 images"):
        TokenMap.from_inputs(model, inputs, processor, [(40, 100)] * 2)
    with pytest.raises(ValueError, match="inputs have no pixel_values_videos"):
        TokenMap.from_inputs(model, {"input_ids": inputs["input_ids"], "pixel_values": torch.zeros(0)})


def test_llava_onevision_layout_of_video_between_images_counts_in_reading_order(
    make_llava_onevision: Any, coordinate_image: Any
) -> None:
    """Images count in reading order, although the pixels of images and videos are separate inputs."""
    model, processor = make_llava_onevision()
    processor.video_processor = SimpleNamespace(do_resize=True, size={"height": 32, "width": 32}, do_center_crop=None)
    images = processor.image_processor([[coordinate_image(20, 40), coordinate_image(40, 20)]], return_tensors="pt")
    text = processor.tokenizer("user <image> what <video> is <image>", return_tensors="pt")
    inputs = video_inputs(text, torch.stack([resized_frame(coordinate_image(50, 60))] * 2)[None])
    ids = inputs["input_ids"][0]
    inputs["input_ids"] = torch.cat([x.expand(26) if x == IMAGE else x[None] for x in ids])[None]
    inputs |= images
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    for sizes in ([(20, 40), (50, 60), (40, 20)], None):
        tokens = TokenMap.from_inputs(model, inputs, processor, sizes)
        places, visual = tokens.require_places(), tokens.mask("vision")
        assert places.image[visual].tolist() == [0] * 26 + [1] * 19 + [2] * 26
        ends = [places.box[0, visual[0]][places.image[visual] == image].nan_to_num(0).amax(0) for image in range(3)]
        assert ends[0].tolist()[2:] == [37.5, 27.5], "30 of 32 pixels of a padded square of 40, with 10 above the image"
        assert ends[1].tolist()[2:] == ([56.25, 46.875] if sizes else [0, 0])
        assert ends[2].tolist()[2:] == [27.5, 37.5]
    assert tokens.split("vision", by="image").groups[2:5] == ("vision_0", "vision_1", "vision_2")


def test_llava_onevision_layout_of_interpolated_tokens_returns_tile_of_centre(
    make_llava_onevision: Any, coordinate_image: Any
) -> None:
    """The 15 x 15 patches of 3 x 3 tiles of 32 pixels become 7 x 7 tokens."""
    model, processor = make_llava_onevision(tiles=2)
    inputs = processor(images=coordinate_image(96, 96), text=PROMPT, return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs)
    places = tokens.require_places()
    detail = (places.tile > 0) & (places.column >= 0)
    left, top, right, bottom = places.box[detail].unbind(-1)
    column, row = ((left + right) / 2 // 32).long(), ((top + bottom) / 2 // 32).long()
    assert int(detail.sum()) == 49
    assert torch.equal(places.tile[detail], 1 + 3 * row + column)
