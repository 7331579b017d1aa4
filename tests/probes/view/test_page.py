"""The page of an attention record: its numbers, its parts, and its file."""

import base64
import html
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from probes import TokenMap, record_attention
from probes.view import AttentionView, find_words
from probes.view.encoding import decode_rows
from probes.view.page import page_data
from tests.probes.tokens.families.boxes import CoordinateImage
from tests.probes.tokens.families.build import MODEL_FAMILIES, tiny

TINY = "experiments/assets/tiny"


def record_words(model, inputs, tokens, words):
    with torch.no_grad(), record_attention(model, tokens, words=words) as attention:
        model(**inputs)
    return attention


def eager_attention(model, inputs):
    """Return the model's own attention matrices, [layers, heads, queries, keys]."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    return torch.stack(attentions)[:, 0]


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForImageTextToText.from_pretrained(TINY).eval()
    processor = AutoProcessor.from_pretrained(TINY)
    image = Image.open("experiments/assets/scene.png").convert("RGB")
    inputs = dict(processor(text="<image>what shape is at top left?", images=image, return_tensors="pt"))
    tokens = TokenMap.from_inputs(model, inputs, processor, [image])
    words = find_words(tokens, inputs["input_ids"], processor.tokenizer)
    return model, inputs, tokens, words, image


def test_page_holds_the_attention_of_each_word_as_eager_attention_has_it(shipped):
    model, inputs, tokens, words, image = shipped
    page = record_words(model, inputs, tokens, words).view(images=[image]).html()
    run = page_data(page)["runs"][0]
    matrices = eager_attention(model, inputs)
    model.set_attn_implementation("sdpa")
    shown = decode_rows(run["maps"][0])
    mass = np.frombuffer(base64.b64decode(run["mass"]["values"]), "<f4").reshape(shown.shape[:3])
    assert [word["text"] for word in run["words"]] == [word.text for word in words.words]
    for number, word in enumerate(words.words):
        rows = matrices[:, :, list(word.positions)].mean(2)[..., tokens.mask("vision")[0]].numpy()
        half_step = rows.max(-1, keepdims=True) / 510
        assert (np.abs(shown[:, :, number] - rows) <= half_step + 1e-6).all()
        np.testing.assert_allclose(mass[:, :, number], rows.sum(-1), atol=1e-5)


def test_page_uniform_attention_is_the_share_of_the_image_among_earlier_positions(shipped):
    model, inputs, tokens, words, image = shipped
    run = page_data(record_words(model, inputs, tokens, words).view(images=[image]).html())["runs"][0]
    uniform = np.frombuffer(base64.b64decode(run["mass"]["uniform"]), "<f4").reshape(6, -1)
    one_token = [(number, word) for number, word in enumerate(words.words) if len(word.positions) == 1]
    assert one_token
    for number, word in one_token:
        visible = word.positions[0] + 1
        np.testing.assert_allclose(uniform[:, number], int(tokens.mask("vision").sum()) / visible, rtol=1e-6)


def test_page_needs_no_network_and_names_no_other_file(shipped):
    model, inputs, tokens, words, image = shipped
    page = record_words(model, inputs, tokens, words).view(images=[image]).html()
    without_data = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", without_data) == []
    assert re.findall(r"<(?:link|img|iframe)\b|\bfrom \"\./", without_data) == []
    assert "default-src 'none'" in page


def test_page_title_and_text_with_markup_are_escaped(shipped):
    model, inputs, tokens, words, image = shipped
    attention = record_words(model, inputs, tokens, words)
    page = attention.view(images=[image], name="</script><b>", title="a < b & c").html()
    assert "<title>a &lt; b &amp; c</title>" in page
    assert page.count("</script>") == 2
    assert page_data(page)["runs"][0]["name"] == "</script><b>"


def test_save_writes_the_page_and_no_other_file(shipped, tmp_path):
    model, inputs, tokens, words, image = shipped
    view = record_words(model, inputs, tokens, words).view(images=[image])
    path = view.save(tmp_path / "page.html")
    assert path.read_text() == view.html()
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_save_in_a_missing_folder_raises_and_leaves_nothing(shipped, tmp_path):
    model, inputs, tokens, words, image = shipped
    view = record_words(model, inputs, tokens, words).view(images=[image])
    with pytest.raises(OSError, match="missing"):
        view.save(tmp_path / "missing" / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_compare_has_the_runs_of_both_pages(shipped):
    model, inputs, tokens, words, image = shipped
    attention = record_words(model, inputs, tokens, words)
    first, second = attention.view(images=[image], name="first"), attention.view(images=[image], name="second")
    page = first.compare(second).compare(first).html()
    assert [run["name"] for run in page_data(page)["runs"]] == ["first", "second", "first"]


def test_compare_keeps_the_title_that_was_given(shipped):
    model, inputs, tokens, words, image = shipped
    run = record_words(model, inputs, tokens, words).view_run([image], "first")
    titled, plain = AttentionView([run], "Rings"), AttentionView([run])
    assert titled.compare(plain).title == "Rings"
    assert plain.compare(titled).compare(plain).title == "Rings"
    assert plain.compare(plain).title == "Attention of first"


def test_jupyter_frame_holds_the_page(shipped):
    model, inputs, tokens, words, image = shipped
    view = record_words(model, inputs, tokens, words).view(images=[image])
    frame = view._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert html.unescape(re.search(r'srcdoc="(.*?)" title', frame, re.DOTALL)[1]) == view.html()


def test_view_of_a_record_without_words_is_refused(shipped):
    model, inputs, tokens, _, image = shipped
    with torch.no_grad(), record_attention(model, tokens) as attention:
        model(**inputs)
    with pytest.raises(ValueError, match="words"):
        attention.view(images=[image])


def test_page_of_an_unknown_family_has_no_boxes_and_says_so(shipped):
    model, inputs, tokens, words, _ = shipped
    unplaced = TokenMap(tokens.labels, model_type="newest")
    run = page_data(record_words(model, inputs, unplaced, words).view().html())["runs"][0]
    assert "'newest'" in run["boxes_note"]
    assert run["patches"]["box"] == [None] * 36
    assert run["patches"]["position"] == tokens.mask("vision")[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_page_of_every_family_has_boxes_that_hold_their_pixels(family):
    """The image's colours are its coordinates: the mean colour in a box is its centre."""
    image = CoordinateImage(40, 24)
    inputs = dict(tiny(family)(["see # ?"], [[image.image]], "left"))
    model = tiny(family).model()
    tokens = TokenMap.from_inputs(model, inputs, tiny(family).processor, [image.image])
    words = find_words(tokens, inputs["input_ids"], tiny(family).processor.tokenizer)
    run = page_data(record_words(model, inputs, tokens, words).view(images=[image.image]).html())["runs"][0]
    assert (run["images"][0]["width"], run["images"][0]["height"]) == (40, 24)
    boxes = [box for box in run["patches"]["box"] if box is not None]
    expected = [box for box in tokens.places.box[0][tokens.mask("vision")[0]].tolist() if box[0] == box[0]]
    shared = family in ("blip_2", "llava_mini")  # all tokens cover the same box: drawn by row and column
    assert boxes == ([] if shared else expected)
    assert (run["boxes_note"] is None) == (not shared)
    pixels = np.asarray(image.image, dtype=float)
    for left, top, right, bottom in boxes:
        if left < 0 or top < 0 or right > 40 or bottom > 24:
            continue  # partly padding
        inside = pixels[
            round(top) : max(round(bottom), round(top) + 1), round(left) : max(round(right), round(left) + 1)
        ]
        centre = [(left + right) / 2 / 40 * 255, (top + bottom) / 2 / 24 * 255]
        np.testing.assert_allclose(inside.mean((0, 1))[:2], centre, atol=8)


@pytest.fixture(scope="module")
def recorded(shipped):
    return record_words(*shipped[:4])


def shown_pixels(record, image):
    """Return the pixels of the page's image."""
    uri = page_data(record.view(images=[image]).html())["runs"][0]["images"][0]["frames"][0]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (PIXELS, PIXELS),
        ((PIXELS / 255).astype(np.float32), PIXELS),
        (PIXELS.astype(np.float64), PIXELS),
        (PIXELS.astype(np.uint16), PIXELS),
        (PIXELS.transpose(2, 0, 1), PIXELS),
        (torch.tensor(PIXELS).permute(2, 0, 1) / 255, PIXELS),
        (PIXELS[..., :1], PIXELS[..., [0, 0, 0]]),
        (PIXELS[None, ..., 0], PIXELS[..., [0, 0, 0]]),
        (PIXELS[..., 0], PIXELS[..., [0, 0, 0]]),
        (PIXELS[None], PIXELS),  # a video of one frame
    ],
)
def test_page_shows_arrays_as_they_are(recorded, image, expected):
    assert np.array_equal(shown_pixels(recorded, image), expected)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (PIXELS.astype(np.uint16) * 256, str(int(PIXELS.max()) * 256)),
        (PIXELS / 255 - 0.5, "-0.5"),
        (np.zeros((5, 7, 5)), r"\[5, 7, 5\]"),
        ((5, 7), r"shape \[\]"),
    ],
)
def test_page_of_arrays_that_are_no_images_is_refused(recorded, image, found):
    with pytest.raises(ValueError, match=rf"^images: .*{found}"):
        shown_pixels(recorded, image)


def test_attention_view_of_no_run_is_refused():
    with pytest.raises(ValueError, match="found 0"):
        AttentionView([])
