"""The page of an attention record in a browser: what it shows are the recorded numbers."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from probes import RemoveTokens, TokenMap, record_attention
from probes.ask import ask
from probes.view import AttentionView, find_words
from probes.view.run_data import PatchMap, ViewRun
from probes.view.words import TextPart, Word, Words
from tests.probes.tokens.families.boxes import CoordinateImage
from tests.probes.tokens.families.build import tiny

pytestmark = pytest.mark.browser
TINY = "experiments/assets/tiny"
QUESTION = "what shape is right of the green ring?"


@pytest.fixture(scope="module")
def answers():
    """Answers of the shipped model with the image, and with the image hidden in its first layers."""
    model = AutoModelForImageTextToText.from_pretrained(TINY).eval()
    processor = AutoProcessor.from_pretrained(TINY)
    image = Image.open("experiments/assets/scene.png").convert("RGB")
    intact = ask(model, processor, QUESTION, [image])
    hidden = ask(
        model, processor, QUESTION, [image], answer=intact.text, interventions=[RemoveTokens("vision", layers=[2])]
    )
    return intact, hidden


@pytest.fixture
def page(answers, open_page, tmp_path):
    return open_page(answers[0].view("tiny").save(tmp_path / "page.html"))


def recorded(answer, word, layer, head=None):
    """Return the recorded attention of a word to each visual token; head None is the mean over heads."""
    record = answer.attention
    target = record.targets.index(record.words.groups[word])
    rows = record.received[layer, 0, :, target][:, record.tokens.mask("vision")[0]].numpy()
    return rows.mean(0) if head is None else rows[head]


def assert_shown(page, expected, run=0):
    """Check the values on the page, which are stored in 8 bits."""
    shown = np.array(page.evaluate("attentionView.values()")[run])
    np.testing.assert_allclose(shown, expected, atol=np.abs(expected).max() / 255 + 1e-4)


def state(page):
    return page.eval_on_selector("#view", "view => ({...view.dataset})")


def test_click_on_a_word_shows_its_recorded_attention(page, answers):
    layer = int(state(page)["layer"])
    for word in (1, 5):
        page.click(f'#words [data-word="{word}"]')
        assert state(page)["word"] == str(word)
        assert page.get_attribute(f'#words [data-word="{word}"]', "aria-pressed") == "true"
        assert_shown(page, recorded(answers[0], word, layer))


def test_click_on_a_word_redraws_the_heat_map(page):
    def pixels():
        return page.eval_on_selector("#heat canvas", "canvas => canvas.toDataURL()")

    page.click('#words [data-word="1"]')
    before = pixels()
    page.click('#words [data-word="6"]')
    assert pixels() != before


def test_keys_move_between_words_layers_and_heads(page, answers):
    page.click('#words [data-word="3"]')
    layer = int(state(page)["layer"])
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert (state(page)["word"], state(page)["layer"]) == ("4", str(layer + 1))
    assert_shown(page, recorded(answers[0], 4, layer + 1))
    page.keyboard.press("PageDown")
    page.keyboard.press("PageDown")
    assert state(page)["head"] == "1"
    assert_shown(page, recorded(answers[0], 4, layer + 1, head=1))
    page.keyboard.press("m")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert_shown(page, recorded(answers[0], 3, layer))


def test_click_in_the_map_of_layers_and_heads_chooses_the_cell(page, answers):
    page.click('#words [data-word="2"]')
    canvas = page.query_selector("#layer-heads canvas")
    box = canvas.bounding_box()
    columns = len(answers[0].attention.heads) + 2  # the heads, a gap, the mean
    cell = (box["width"] - 36) / columns
    height = (box["height"] - 34) / len(answers[0].attention.layers)
    canvas.click(position={"x": 34 + 2.5 * cell, "y": 4 + 4.5 * height})
    assert (state(page)["layer"], state(page)["head"]) == ("4", "2")
    assert_shown(page, recorded(answers[0], 2, 4, head=2))
    canvas.click(position={"x": 34 + (columns - 0.5) * cell, "y": 4 + 0.5 * height})
    assert (state(page)["layer"], state(page)["head"]) == ("0", "mean")


def test_mass_of_the_summary_is_the_recorded_mass(page, answers):
    record = answers[0].attention
    page.click('#words [data-word="4"]')
    target = record.targets.index(record.words.groups[4])
    mass = record.mass[3, 0, :, target, record.sources.index("vision")].mean().item()
    shown = page.evaluate("attentionView.mass(4, 3, 'mean')")
    assert shown == pytest.approx(mass, abs=1e-5)
    page.evaluate("document.getElementById('layer').value = 3")
    page.dispatch_event("#layer", "input")
    assert f"{mass:.3g}" in page.text_content("#summary")


def test_address_holds_the_state_and_restores_it(answers, open_page, tmp_path):
    path = answers[0].view().save(tmp_path / "page.html")
    page = open_page(path, address="#word=2&layer=5&head=1")
    assert {key: state(page)[key] for key in ("word", "layer", "head")} == {"word": "2", "layer": "5", "head": "1"}
    page.keyboard.press("ArrowUp")
    assert "layer=4" in page.evaluate("location.hash")
    assert_shown(page, recorded(answers[0], 2, 4, head=1))


@pytest.mark.parametrize("address", ["#word=99&layer=-1&head=x", "#word=", "#layer=1.5&map=none&compare=side"])
def test_address_with_wrong_values_shows_the_start(answers, open_page, tmp_path, address):
    path = answers[0].view().save(tmp_path / "page.html")
    assert state(open_page(path, address=address)) == state(open_page(path))


def test_comparison_shows_both_runs_and_their_difference(answers, open_page, tmp_path):
    view = answers[0].view("intact").compare(answers[1].view("hidden in layer 2"))
    page = open_page(view.save(tmp_path / "page.html"), address="#word=8&word2=8&layer=3")
    assert state(page)["compare"] == "side"
    assert page.locator("#heat canvas").count() == 2
    assert_shown(page, recorded(answers[0], 8, 3), run=0)
    assert_shown(page, recorded(answers[1], 8, 3), run=1)
    page.select_option("#compare", "difference")
    assert page.locator("#heat canvas").count() == 1
    first, second = recorded(answers[0], 8, 3), recorded(answers[1], 8, 3)
    shown = np.array(page.evaluate("attentionView.values()")[0])
    np.testing.assert_allclose(shown, second - first, atol=(first.max() + second.max()) / 255 + 1e-4)


def test_page_of_several_runs_shows_the_chosen_ones(answers, open_page, tmp_path):
    views = [answer.view(f"run {number}") for number, answer in enumerate((*answers, answers[0]))]
    page = open_page(
        views[0].compare(views[1]).compare(views[2]).save(tmp_path / "page.html"), address="#word=8&layer=3"
    )
    assert state(page)["compare"] == "single"
    page.select_option("#run-a", "1")
    assert_shown(page, recorded(answers[1], 8, 3))
    page.select_option("#compare", "side")
    page.select_option("#run-b", "2")
    page.click('#words2 [data-word="8"]')
    assert_shown(page, recorded(answers[1], 8, 3), run=0)
    assert_shown(page, recorded(answers[0], 8, 3), run=1)
    assert "a=1&b=2" in page.evaluate("location.hash")


def test_menu_shows_relevancy_and_the_words_of_the_logit_lens(page, answers):
    page.select_option("#map-select", "relevancy")
    layer = int(state(page)["layer"])
    vision = answers[0].tokens.mask("vision")[0]
    assert_shown(page, answers[0].relevancy.layers[layer, 0][vision].numpy())
    page.select_option("#map-select", "lens")
    tokenizer = answers[0].tokenizer
    expected = [tokenizer.decode([token]) for token in answers[0].lens.ids[layer + 1, :, 0].tolist()]
    assert page.evaluate("attentionView.values()")[0] == expected


def test_csv_has_a_row_for_each_patch_with_the_shown_value(page, answers):
    page.click('#words [data-word="5"]')
    with page.expect_download() as download:
        page.click("#export-csv")
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text())))
    np.testing.assert_allclose([float(row["value"]) for row in rows], page.evaluate("attentionView.values()")[0])
    vision = answers[0].tokens.mask("vision")[0].nonzero().flatten().tolist()
    assert [int(row["position"]) for row in rows] == vision
    assert {row["word"] for row in rows} == {"the"}
    boxes = answers[0].tokens.places.box[0][vision].tolist()
    assert [[float(row[side]) for side in ("left", "top", "right", "bottom")] for row in rows] == boxes


def test_png_is_an_image_with_the_colours_of_the_scale(page):
    with page.expect_download() as download:
        page.click("#export-png")
    image = np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)
    assert min(image.shape[:2]) > 200
    assert (image.std(-1) > 10).mean() > 0.3  # colours on most of the image, not the grey of text alone


@pytest.mark.parametrize("width", [400, 1400])
def test_page_fits_its_width(answers, open_page, tmp_path, width):
    view = answers[0].view("intact").compare(answers[1].view("hidden in layer 2"))
    page = open_page(view.save(tmp_path / "page.html"), width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for label in ("#layer", "#head", "#map-select", "#compare"):
        assert page.eval_on_selector(label, "element => element.labels.length") == 1


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_boxes_of_a_family_lie_where_its_places_say(open_page, tmp_path, family):
    image = CoordinateImage(40, 24).image
    inputs = dict(tiny(family)(["see # ?"], [[image]], "left"))
    model, processor = tiny(family).model(), tiny(family).processor
    tokens = TokenMap.from_inputs(model, inputs, processor, [image])
    words = find_words(tokens, inputs["input_ids"], processor.tokenizer)
    with torch.no_grad(), record_attention(model, tokens, words=words) as attention:
        model(**inputs)
    page = open_page(attention.view(images=[image]).save(tmp_path / "page.html"))
    vision = tokens.mask("vision")[0]
    places = tokens.places[0]
    first_tile = places.tile[vision].min()
    checked = 0
    canvas = page.locator("#heat canvas").first
    area = canvas.bounding_box()
    boxes = places.box[vision]
    in_first = (places.tile[vision] == first_tile) & boxes.isfinite().all(-1)
    left, top = min(0, boxes[in_first][:, 0].min().item()), min(0, boxes[in_first][:, 1].min().item())
    right, bottom = max(40, boxes[in_first][:, 2].max().item()), max(24, boxes[in_first][:, 3].max().item())
    for patch in in_first.nonzero().flatten().tolist():
        box = boxes[patch].tolist()
        x = ((box[0] + box[2]) / 2 - left) / (right - left) * area["width"]
        y = ((box[1] + box[3]) / 2 - top) / (bottom - top) * area["height"]
        canvas.hover(position={"x": x, "y": y})
        row, column = places.row[vision][patch] + 1, places.column[vision][patch] + 1
        assert page.text_content("#hover").startswith(f"row {row}, column {column} ")
        checked += 1
    assert checked >= 4


def test_sinks_switch_leaves_the_sinks_out_of_the_map_the_scale_and_the_mass(answers, open_page, tmp_path):
    record = answers[0].attention
    visual = answers[0].tokens.mask("vision")[0].nonzero().flatten()
    sinks = torch.zeros(6, answers[0].tokens.labels.shape[1], dtype=torch.bool)
    sinks[2, visual[[7, 20]]] = True  # in layer 2 alone
    run = record.view_run(answers[0].images, sinks=(sinks, "the rule"))
    page = open_page(AttentionView([run]).save(tmp_path / "page.html"), address="#word=8&layer=2")
    values = recorded(answers[0], 8, 2)
    assert page.text_content("#sinks-rule") == "the rule"
    page.uncheck("#sinks-switch")
    rest = np.delete(values, [7, 20])
    assert float(page.text_content("#scale-high")) == pytest.approx(rest.max(), rel=0.02)
    assert page.evaluate("attentionView.mass(8, 2, 'mean')") == pytest.approx(rest.sum(), abs=2e-3)
    assert page.evaluate("attentionView.mass(8, 3, 'mean')") == pytest.approx(
        recorded(answers[0], 8, 3).sum(), abs=1e-4
    )
    assert "sinks=0" in page.evaluate("location.hash")
    page.check("#sinks-switch")
    assert page.evaluate("attentionView.mass(8, 2, 'mean')") == pytest.approx(values.sum(), abs=1e-4)


def test_menu_shows_attention_times_value_norm(page, answers):
    record, word, layer = answers[0].attention, 5, 3
    page.click(f'#words [data-word="{word}"]')
    page.evaluate(f"document.getElementById('layer').value = {layer}")
    page.dispatch_event("#layer", "input")
    page.select_option("#map-select", "value")
    vision = record.tokens.mask("vision")[0]
    target = record.targets.index(record.words.groups[word])
    expected = (record.received[layer, 0, :, target] * record.value_norm[layer, 0])[:, vision].mean(0).numpy()
    assert_shown(page, expected)


def seven_b_run():
    """Return a run of the shape of LLaVA-1.5-7B, whose attention is a softmax of random scores."""
    layers, heads, count, side = 32, 32, 20, 24
    labels = torch.full((1, 35 + side**2 + 60), 3)
    labels[:, :35], labels[:, 35 : 35 + side**2] = 1, 2
    generator = torch.Generator().manual_seed(0)
    positions = range(35 + side**2, 35 + side**2 + count)
    words = tuple(Word(f"word{index}", "instruction", (position,)) for index, position in enumerate(positions))
    text = (
        TextPart("system ", "system"),
        TextPart("", "vision"),
        *(TextPart(f" word{i}", "instruction", i) for i in range(count)),
    )
    scores = 2 * torch.randn(layers, heads, count, labels.shape[1], generator=generator)
    values = scores.softmax(-1)
    mass = values[..., labels[0] == 2].sum(-1)
    return ViewRun(
        "llava-1.5-7b shape",
        {"model": "llava"},
        TokenMap(labels),
        Words(words, text),
        range(layers),
        range(heads),
        mass,
        torch.full((layers, count), 0.9),
        [PatchMap("attention", "attention", "share", values)],
    )


def test_page_of_the_shape_of_llava_7b_has_at_most_16_megabytes(open_page, tmp_path):
    path = AttentionView([seven_b_run()]).save(tmp_path / "page.html")
    assert path.stat().st_size <= 16e6
    page = open_page(path)
    page.click('#words [data-word="3"]')
    assert len(page.evaluate("attentionView.values()")[0]) == 576
