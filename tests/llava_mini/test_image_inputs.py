"""Rows with several images, videos and tiles, and batches of different rows."""

from __future__ import annotations

import pytest
import torch

from llava_mini.visual_layout import VisualLayout, crops_per_frame

IMAGE_TOKEN = 99  # as in conftest.py
TOKENS = 4  # C = 2
TEXT = [5, 17, 42, 8, 23, 61]

# Visual inputs of each row: (number of words ahead of it, frames, tiles).
ROWS = {
    "text": [],
    "image": [(2, 1, 1)],
    "image first": [(0, 1, 1)],
    "two images": [(1, 1, 1), (4, 1, 1)],
    "video": [(2, 3, 1)],
    "video and image": [(1, 5, 1), (3, 1, 1)],
    "tiles": [(2, 1, 2)],
    "tiles, image, video in tiles": [(0, 1, 3), (2, 1, 1), (6, 2, 2)],
}


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread. Threads split a matrix product by its shape, which changes these logits by up to 2e-5."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_row(name: str, words: int = len(TEXT)) -> dict[str, torch.Tensor]:
    """Make a batch of one row."""
    ids, layout, pixels = [], [], []
    generator = torch.Generator().manual_seed(len(name))
    for position in range(words + 1):
        for input_position, frames, tiles in ROWS[name]:
            if input_position == position:
                ids += [IMAGE_TOKEN] * (TOKENS * frames)
                layout.append([0, frames, tiles])
                pixels.append(torch.randn(frames * crops_per_frame(tiles), 3, 24, 24, generator=generator))
        ids += TEXT[position : position + 1] if position < words else []
    batch = {"input_ids": torch.tensor([ids])}
    return batch if not layout else batch | {"visual_layout": torch.tensor(layout), "pixel_values": torch.cat(pixels)}


def join_rows(rows: list[dict[str, torch.Tensor]], side: str) -> dict[str, torch.Tensor]:
    """Join rows to one batch, padded on `side`."""
    ids = [row["input_ids"][0] for row in rows]
    padding = {"batch_first": True, "padding_side": side}
    batch = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, **padding),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], **padding),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows if "pixel_values" in row]),
    }
    layouts = [row["visual_layout"] + torch.tensor([i, 0, 0]) for i, row in enumerate(rows) if "visual_layout" in row]
    return batch | {"visual_layout": torch.cat(layouts)}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fields", [{}, {"prefuse_visual_tokens": False}, {"compress_before_projection": False}])
def test_forward_of_a_mixed_batch_equals_each_row_alone(tiny_mini, side, fields):
    model = tiny_mini(attention="sdpa", **fields)
    rows = [make_row(name, words) for name, words in zip(ROWS, (4, 6, 3, 6, 5, 6, 2, 6), strict=True)]
    batch = join_rows(rows, side)
    logits = model(**batch).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            logits[i][batch["attention_mask"][i] == 1], model(**row).logits[0], atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_fuse_averages_text_over_frames_then_over_visual_inputs(tiny_mini):
    model = tiny_mini()
    row = make_row("video and image")
    embeds, _ = model.model.fuse(**row)
    fused_texts = []
    for pixels in row["pixel_values"]:
        alone = {"input_ids": make_row("image first")["input_ids"], "pixel_values": pixels[None]}
        fused_texts.append(model.model.fuse(**alone)[0][0, TOKENS:])
    expected = torch.stack(fused_texts[:5]).mean(0) / 2 + fused_texts[5] / 2
    torch.testing.assert_close(embeds[0, row["input_ids"][0] != IMAGE_TOKEN], expected)


@torch.no_grad()
def test_fuse_with_equal_frames_equals_one_frame(tiny_mini):
    """Conformance 6: T equal frames fuse the text as one frame does, and give T times its visual tokens."""
    model = tiny_mini()
    image, video = make_row("image"), make_row("video")
    video["pixel_values"] = image["pixel_values"].expand(3, -1, -1, -1)
    (one, one_tokens), (three, three_tokens) = model.model.fuse(**image), model.model.fuse(**video)
    torch.testing.assert_close(
        three[0, video["input_ids"][0] != IMAGE_TOKEN], one[0, image["input_ids"][0] != IMAGE_TOKEN]
    )
    torch.testing.assert_close(three_tokens, one_tokens.repeat(3, 1))


@torch.no_grad()
@pytest.mark.parametrize(("name", "tiles"), [("image", 1), ("tiles", 2)])
def test_prefusion_input_has_the_text_after_all_visual_tokens(tiny_mini, name, tiles):
    """Conformance 5: text starts after the patches of tiles and whole image and the C x C tokens."""
    model = tiny_mini()
    layer_inputs = {}
    model.model.prefusion.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: layer_inputs.update(kwargs, states=args[0]), with_kwargs=True
    )
    row = make_row(name)
    model(**row)
    start = 16 * crops_per_frame(tiles) + TOKENS
    raw = model.get_input_embeddings()(torch.tensor([TEXT]))
    assert torch.equal(layer_inputs["states"][:, start:], raw)
    assert layer_inputs["position_ids"].tolist() == [list(range(start + len(TEXT)))]


@torch.no_grad()
@pytest.mark.parametrize("stream", [False, True])
def test_forward_in_chunks_or_from_a_stream_has_the_same_logits(tiny_mini, stream):
    model = tiny_mini()
    row = make_row("tiles, image, video in tiles")
    expected = model(**row).logits
    if stream:
        row["pixel_values"] = row["pixel_values"].split([10, 1, 5, 5])
    for size in (1, 2):
        model.config.frames_per_chunk = size
        torch.testing.assert_close(model(**row).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_forward_from_a_stream_reads_at_most_one_chunk_ahead(tiny_mini):
    model = tiny_mini()
    model.config.frames_per_chunk = 2
    read, num_read = [], []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: num_read.append(len(read)))

    def frames():
        for i in range(9):
            read.append(i)
            yield torch.randn(1, 3, 24, 24)

    ids = torch.tensor([[5, *[IMAGE_TOKEN] * (9 * TOKENS), 17]])
    model(input_ids=ids, pixel_values=frames(), visual_layout=torch.tensor([[0, 9, 1]]))
    # A thread reads the next chunk meanwhile, so that a count lies anywhere from its own chunk's end to the next one's.
    for count, fewest, most in zip(num_read, [2, 4, 6, 8, 9], [4, 6, 8, 9, 9], strict=True):
        assert fewest <= count <= most


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generate_with_beams_equals_each_row_alone(tiny_mini, cache):
    model = tiny_mini()
    rows = [make_row("two images"), make_row("video"), make_row("image", 4)]
    settings = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "suppress_tokens": [IMAGE_TOKEN]}
    settings |= {"eos_token_id": None} | cache
    batch = join_rows(rows, "left")
    length = batch["input_ids"].shape[1]
    sequences = model.generate(**batch, **settings)[:, length:].unflatten(0, (3, 2))
    for i, row in enumerate(rows):
        assert torch.equal(sequences[i], model.generate(**row, **settings)[:, row["input_ids"].shape[1] :])


def test_generate_with_beams_encodes_frames_once(tiny_mini):
    model = tiny_mini()
    batch_sizes = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: batch_sizes.append(len(args[0])))
    model.generate(**make_row("video"), max_new_tokens=2, num_beams=4)
    assert batch_sizes == [3]


@torch.no_grad()
def test_fuse_with_compressor_size_0_passes_the_image_through_prefusion(tiny_mini):
    model = tiny_mini(compressor_size=0)
    ids, pixels = torch.tensor([TEXT, TEXT[::-1]]), torch.randn(3, 3, 24, 24)
    embeds, tokens = model.model.fuse(ids, pixels[:2])
    assert tokens.shape == (0, 24)
    patches = model.model.multi_modal_projector(model.model.look_at(pixels[:2]).features)
    raw = model.get_input_embeddings()(ids)
    states = model.model.prefusion(patches, raw, model.model.language_model.rotary_emb)[1]
    torch.testing.assert_close(embeds, states)
    # With a second image in the second row its text is the mean over both.
    layout = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1]])
    both, _ = model.model.fuse(ids, pixels, visual_layout=layout)
    other, _ = model.model.fuse(ids, pixels[[0, 2]])
    torch.testing.assert_close(both, torch.stack([embeds[0], (embeds[1] + other[1]) / 2]))


@pytest.mark.parametrize(
    ("layout", "pixels", "message"),
    [
        ([[0, 3, 1]], torch.zeros(2, 3, 24, 24), "pixel_values holds 2 crops.*3"),
        ([[0, 1, 2]], torch.zeros(4, 3, 24, 24), "pixel_values holds 4 crops.*5"),
        ([[1, 3, 1]], torch.zeros(3, 3, 24, 24), r"visual_layout names rows \[1\].* 0 to 0"),
        ([[0, 0, 1]], torch.zeros(0, 3, 24, 24), r"visual_layout .*at least one frame.*frames \[0\]"),
        (None, [torch.zeros(1, 3, 24, 24)], "a stream of frames needs a visual_layout"),
        ([[0, 3, 1]], [torch.zeros(1, 3, 24, 24)], "stream of frames ended 2 frames early"),
        ([[0, 1, 2]], [torch.zeros(1, 3, 24, 24)], r"has \[1\] crops.*visual_layout.*5"),
    ],
)
def test_forward_with_pixels_that_do_not_match_the_layout_raises_one_line(tiny_mini, layout, pixels, message):
    layout = None if layout is None else torch.tensor(layout)
    with pytest.raises(ValueError, match=message) as error:
        tiny_mini()(input_ids=make_row("video")["input_ids"], pixel_values=pixels, visual_layout=layout)
    assert "\n" not in str(error.value)


def test_frame_weight_is_equal_for_inputs_of_a_row_and_frames_of_an_input():
    layout = VisualLayout(torch.tensor([0, 2, 2]), torch.tensor([2, 1, 3]), torch.tensor([1, 1, 1]))
    assert layout.frame_row.tolist() == [0, 0, 2, 2, 2, 2]
    torch.testing.assert_close(layout.frame_weight, torch.tensor([1 / 2, 1 / 2, 1 / 2, 1 / 6, 1 / 6, 1 / 6]))
