"""Several images, videos and tiles in a row, and rows that mix them."""

from __future__ import annotations

import pytest
import torch

from llava_mini.visual_layout import VisualLayout, crops_per_frame

IMAGE_TOKEN = 99  # as in conftest.py
TOKENS = 4  # C = 2
TEXT = [5, 17, 42, 8, 23, 61]

# Each row: after how many words its pictures stand, and their (frames, tiles).
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
    """How threads share a matrix product depends on its shape, and moves these logits by up to 2e-5."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def row_of(name: str, words: int = len(TEXT)) -> dict[str, torch.Tensor]:
    """One row as a batch of its own."""
    ids, layout, pixels = [], [], []
    generator = torch.Generator().manual_seed(len(name))
    for at in range(words + 1):
        for place, frames, tiles in ROWS[name]:
            if place == at:
                ids += [IMAGE_TOKEN] * (TOKENS * frames)
                layout.append([0, frames, tiles])
                pixels.append(torch.randn(frames * crops_per_frame(tiles), 3, 24, 24, generator=generator))
        ids += TEXT[at : at + 1] if at < words else []
    batch = {"input_ids": torch.tensor([ids])}
    return batch if not layout else batch | {"visual_layout": torch.tensor(layout), "pixel_values": torch.cat(pixels)}


def together(rows: list[dict[str, torch.Tensor]], side: str) -> dict[str, torch.Tensor]:
    ids = [row["input_ids"][0] for row in rows]
    pad = {"batch_first": True, "padding_side": side}
    batch = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, **pad),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], **pad),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows if "pixel_values" in row]),
    }
    layouts = [row["visual_layout"] + torch.tensor([i, 0, 0]) for i, row in enumerate(rows) if "visual_layout" in row]
    return batch | {"visual_layout": torch.cat(layouts)}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fields", [{}, {"prefuse_visual_tokens": False}, {"compress_before_projection": False}])
def test_a_row_equals_the_sample_alone(tiny_mini, side, fields):
    model = tiny_mini(attention="sdpa", **fields)
    rows = [row_of(name, words) for name, words in zip(ROWS, (4, 6, 3, 6, 5, 6, 2, 6), strict=True)]
    batch = together(rows, side)
    logits = model(**batch).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            logits[i][batch["attention_mask"][i] == 1], model(**row).logits[0], atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_text_is_averaged_over_frames_then_pictures(tiny_mini):
    model = tiny_mini()
    row = row_of("video and image")
    embeds, _ = model.model.fuse(**row)
    parts = []
    for pixels in row["pixel_values"]:
        alone = {"input_ids": row_of("image first")["input_ids"], "pixel_values": pixels[None]}
        parts.append(model.model.fuse(**alone)[0][0, TOKENS:])
    expected = torch.stack(parts[:5]).mean(0) / 2 + parts[5] / 2
    torch.testing.assert_close(embeds[0, row["input_ids"][0] != IMAGE_TOKEN], expected)


@torch.no_grad()
def test_equal_frames_fuse_as_one(tiny_mini):
    """Conformance 6: T equal frames leave the text as one frame does, and give T times its visual tokens."""
    model = tiny_mini()
    image, video = row_of("image"), row_of("video")
    video["pixel_values"] = image["pixel_values"].expand(3, -1, -1, -1)
    (one, one_tokens), (three, three_tokens) = model.model.fuse(**image), model.model.fuse(**video)
    torch.testing.assert_close(
        three[0, video["input_ids"][0] != IMAGE_TOKEN], one[0, image["input_ids"][0] != IMAGE_TOKEN]
    )
    torch.testing.assert_close(three_tokens, one_tokens.repeat(3, 1))


@torch.no_grad()
@pytest.mark.parametrize(("name", "tiles"), [("image", 1), ("tiles", 2)])
def test_text_follows_the_visual_tokens(tiny_mini, name, tiles):
    """Conformance 5: in pre-fusion, text begins after the tiles' patches, the whole picture's and the C x C tokens."""
    model = tiny_mini()
    seen = {}
    model.model.prefusion.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: seen.update(kwargs, states=args[0]), with_kwargs=True
    )
    row = row_of(name)
    model(**row)
    start = 16 * crops_per_frame(tiles) + TOKENS
    raw = model.get_input_embeddings()(torch.tensor([TEXT]))
    assert torch.equal(seen["states"][:, start:], raw)
    assert seen["position_ids"].tolist() == [list(range(start + len(TEXT)))]


@torch.no_grad()
@pytest.mark.parametrize("stream", [False, True])
def test_chunks_and_streams_change_nothing(tiny_mini, stream):
    model = tiny_mini()
    row = row_of("tiles, image, video in tiles")
    expected = model(**row).logits
    if stream:
        row["pixel_values"] = row["pixel_values"].split([10, 1, 5, 5])
    for size in (1, 2):
        model.config.frames_per_chunk = size
        torch.testing.assert_close(model(**row).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_stream_is_taken_chunk_by_chunk(tiny_mini):
    model = tiny_mini()
    model.config.frames_per_chunk = 2
    taken, most = [], []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: most.append(len(taken)))

    def frames():
        for i in range(5):
            taken.append(i)
            yield torch.randn(1, 3, 24, 24)

    ids = torch.tensor([[5, *[IMAGE_TOKEN] * (5 * TOKENS), 17]])
    model(input_ids=ids, pixel_values=frames(), visual_layout=torch.tensor([[0, 5, 1]]))
    assert most == [2, 4, 5]


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_beams_and_returned_sequences(tiny_mini, cache):
    model = tiny_mini()
    rows = [row_of("two images"), row_of("video"), row_of("image", 4)]
    settings = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "suppress_tokens": [IMAGE_TOKEN]}
    settings |= {"eos_token_id": None} | cache
    batch = together(rows, "left")
    length = batch["input_ids"].shape[1]
    new = model.generate(**batch, **settings)[:, length:].unflatten(0, (3, 2))
    for i, row in enumerate(rows):
        assert torch.equal(new[i], model.generate(**row, **settings)[:, row["input_ids"].shape[1] :])


def test_pictures_are_encoded_once_for_all_beams(tiny_mini):
    model = tiny_mini()
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model.generate(**row_of("video"), max_new_tokens=2, num_beams=4)
    assert seen == [3]


@torch.no_grad()
def test_no_visual_tokens(tiny_mini):
    """Pre-fusion alone carries the picture."""
    model = tiny_mini(compressor_size=0)
    ids, pixels = torch.tensor([TEXT, TEXT[::-1]]), torch.randn(3, 3, 24, 24)
    embeds, tokens = model.model.fuse(ids, pixels[:2])
    assert tokens.shape == (0, 24)
    patches = model.model.multi_modal_projector(model.model.look_at(pixels[:2]).features)
    raw = model.get_input_embeddings()(ids)
    states = model.model.prefusion(patches, raw, model.model.language_model.rotary_emb)[1]
    torch.testing.assert_close(embeds, states)
    # a second picture in the second row
    layout = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1]])
    both, _ = model.model.fuse(ids, pixels, visual_layout=layout)
    other, _ = model.model.fuse(ids, pixels[[0, 2]])
    torch.testing.assert_close(both, torch.stack([embeds[0], (embeds[1] + other[1]) / 2]))


@pytest.mark.parametrize(
    ("layout", "pixels", "message"),
    [
        ([[0, 3, 1]], torch.zeros(2, 3, 24, 24), "hold 2 crops, but the pictures of visual_layout have 3"),
        ([[0, 1, 2]], torch.zeros(4, 3, 24, 24), "hold 4 crops, but the pictures of visual_layout have 5"),
        ([[1, 3, 1]], torch.zeros(3, 3, 24, 24), r"names rows \[1\]; they must ascend within 0 to 0"),
        ([[0, 0, 1]], torch.zeros(0, 3, 24, 24), "at least one frame and one tile"),
        (None, [torch.zeros(1, 3, 24, 24)], "a stream of frames needs a visual_layout"),
        ([[0, 3, 1]], [torch.zeros(1, 3, 24, 24)], "ended 2 frames early"),
        ([[0, 1, 2]], [torch.zeros(1, 3, 24, 24)], r"has \[1\] crops where visual_layout says 5"),
    ],
)
def test_what_does_not_fit_is_one_line(tiny_mini, layout, pixels, message):
    layout = None if layout is None else torch.tensor(layout)
    with pytest.raises(ValueError, match=message) as error:
        tiny_mini()(input_ids=row_of("video")["input_ids"], pixel_values=pixels, visual_layout=layout)
    assert "\n" not in str(error.value)


def test_weights_of_frames():
    layout = VisualLayout(torch.tensor([0, 2, 2]), torch.tensor([2, 1, 3]), torch.tensor([1, 1, 1]))
    assert layout.frame_row.tolist() == [0, 0, 2, 2, 2, 2]
    torch.testing.assert_close(layout.frame_weight, torch.tensor([1 / 2, 1 / 2, 1 / 2, 1 / 6, 1 / 6, 1 / 6]))
