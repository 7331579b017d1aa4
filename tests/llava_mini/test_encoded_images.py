"""Pictures encoded once, and what pre-fusion leaves out, against everything run plainly in whole_prefusion.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaAttention

from llava_mini import PRESETS
from probes import TokenMap
from probes.attention.recording import record_attention
from tests.llava_mini import whole_prefusion as whole

IMAGE_TOKEN = 99  # as in conftest.py
VARIANTS = {
    "code": {},
    "paper": PRESETS["paper"],
    "text alone": {"prefuse_visual_tokens": False},
    "no compressor": {"compressor": "none"},
    "no compressor, text alone": {"compressor": "none", "prefuse_visual_tokens": False},
    "no tokens": {"compressor_size": 0},
    "no pre-fusion": {"prefusion_layers": 0},
    "one layer": {"prefusion_layers": 1},
    "deeper than the decoder": {"prefusion_layers": 3},
}


def questions(model, pictures, texts, seed=1):
    """Ids padded on the left, and their mask: each row asks about `pictures` (frames, tiles) in `texts[row]` words."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for of_row, words in zip(pictures, texts, strict=True):
        count = sum(frames * model.config.num_visual_tokens(16 * tiles**2) for frames, tiles in of_row)
        text = torch.randint(3, IMAGE_TOKEN, (words,), generator=generator)
        rows.append(torch.cat([text[:2], torch.full((count,), IMAGE_TOKEN), text[2:]]))
    width = max(map(len, rows))
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in rows]), mask


def batch(model, seed=1, dtype=torch.float32):
    """A video of three frames and a picture in tiles; a picture; text alone."""
    pictures = [[(3, 1), (1, 2)], [(1, 1)], []]
    ids, mask = questions(model, pictures, (5, 8, 4), seed)
    layout = torch.tensor([[row, *one] for row, of_row in enumerate(pictures) for one in of_row])
    pixels = torch.randn(9, 3, 24, 24, generator=torch.Generator().manual_seed(7), dtype=dtype)
    return {"input_ids": ids, "attention_mask": mask, "visual_layout": layout, "pixel_values": pixels}


def without_pixels(inputs):
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def encoded(model, inputs, **options):
    """The pictures, with a row more for the text alone, which has none."""
    pictures = model.encode_pictures(inputs["pixel_values"], inputs["visual_layout"], **options)
    assert pictures.rows == 2
    return pictures


def both(model, inputs, **options):
    """Logits of the two rows with pictures, from pixels and from what was encoded."""
    seen = inputs["attention_mask"][:2] > 0
    pictures = encoded(model, inputs, **options)
    two = {name: value[:2] for name, value in without_pixels(inputs).items()}
    return model(**inputs).logits[:2][seen], model(**two, pictures=pictures).logits[seen]


def check(model, inputs, **options):
    seen = inputs["attention_mask"][:2] > 0
    expected = whole.logits(model, **inputs)[:2][seen]
    assert expected.std() > 0.1
    for found in both(model, inputs, **options):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("text", "attention"),
    [
        *((text, "eager") for text in ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")),
        *((text, "sdpa") for text in ("qwen2", "qwen3", "gemma", "gemma3")),
    ],
)
def test_every_family(tiny_mini, text, attention):
    model = tiny_mini(text, attention=attention, prefusion_layers=2, frames_per_chunk=2)
    check(model, batch(model))


@torch.no_grad()
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_every_variant(tiny_mini, fields):
    model = tiny_mini(attention="sdpa", **fields)
    check(model, batch(model))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 64])
@pytest.mark.parametrize("room", [0, 1 / 3, 2 / 3])
def test_what_does_not_fit_is_encoded_anew(tiny_mini, chunk, room):
    model = tiny_mini(attention="sdpa", frames_per_chunk=chunk)
    inputs = batch(model)
    needed = encoded(model, inputs).nbytes
    pictures = encoded(model, inputs, max_bytes=int(needed * room))
    assert pictures.nbytes <= needed * room
    if chunk == 1:
        assert pictures.kept_frames == (0, 2, 3)[round(room * 3)]
    check(model, inputs, max_bytes=int(needed * room))


@torch.no_grad()
def test_bytes_kept_of_each_frame(tiny_mini):
    model = tiny_mini(prefusion_layers=2, compressor_size=2)
    pictures = encoded(model, batch(model))
    # 2 layers x keys and values x 2 heads x width 6, for the patches and 4 tokens, and the 4 tokens of width 24
    positions = [16 + 4] * 3 + [16 * 5 + 4] + [16 + 4]
    assert pictures.nbytes == 4 * sum(2 * 2 * 2 * 6 * n + 4 * 24 for n in positions)
    away = pictures.to("meta")
    assert away.nbytes == pictures.nbytes
    assert {part.tokens.device.type for part in away.kept} == {"meta"}
    assert {states.device.type for part in away.kept for pair in part.past for states in pair} == {"meta"}


def storage(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 64])
@pytest.mark.parametrize("fields", [VARIANTS["code"], VARIANTS["text alone"]])
def test_nothing_more_is_held_than_is_counted(tiny_mini, fields, chunk):
    """Neither patches nor text hang on in the memory of a view."""
    model = tiny_mini(frames_per_chunk=chunk, **fields)
    inputs = batch(model)
    pictures = encoded(model, inputs)
    states = [states for part in pictures.kept for pair in part.past for states in pair]
    assert storage([*states, *(part.tokens for part in pictures.kept)]) == pictures.nbytes
    assert pictures.pixel_values is None
    pictures = encoded(model, inputs, max_bytes=0)
    rows = torch.tensor([0, 0, 0, 0, 1])
    asked = list(model.model._fuse_frames(pictures, torch.randn(2, 6, 24), torch.ones(2, 6, dtype=torch.bool), rows))
    assert storage([tokens for _, tokens, _ in asked]) == 4 * 24 * 4 * 5


@torch.no_grad()
@pytest.mark.parametrize("max_bytes", [None, 0])
@pytest.mark.parametrize("rows", [[1, 0], [1, 1], [0, 0]])
def test_rows_that_change_places(tiny_mini, rows, max_bytes):
    """As many frames asked about as there are in a chunk, but not the same in the same order."""
    model = tiny_mini(attention="sdpa")
    ids, mask = questions(model, [[(1, 1)], [(1, 1)]], (6, 6))
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(7))
    found = model(input_ids=ids, pictures=model.encode_pictures(pixels, max_bytes=max_bytes).select(rows)).logits
    layout = torch.tensor([[0, 1, 1], [1, 1, 1]])
    expected = whole.logits(model, input_ids=ids, pixel_values=pixels[rows], attention_mask=mask, visual_layout=layout)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("max_bytes", [None, 0])
def test_rows_ask_different_questions_about_the_same_pictures(tiny_mini, max_bytes):
    model = tiny_mini(attention="sdpa", frames_per_chunk=2)
    inputs = batch(model)
    pictures = encoded(model, inputs, max_bytes=max_bytes)
    rows = [0, 1, 0, 0]
    of_row = [[(3, 1), (1, 2)], [(1, 1)]]
    ids, mask = questions(model, [of_row[row] for row in rows], (7, 4, 5, 9), seed=3)
    found = model(input_ids=ids, attention_mask=mask, pictures=pictures.select(rows)).logits
    crops = [inputs["pixel_values"][:8], inputs["pixel_values"][8:]]
    for row, asked in enumerate(rows):
        layout = inputs["visual_layout"][inputs["visual_layout"][:, 0] == asked] * torch.tensor([0, 1, 1])
        alone = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        expected = whole.logits(model, **alone, pixel_values=crops[asked], visual_layout=layout)
        seen = mask[row] > 0
        torch.testing.assert_close(found[row][seen], expected[0][seen], atol=1e-5, rtol=1e-5)
    # a selection of a selection; and the other row's frames are not encoded for it
    again = pictures.select(rows).select([1])
    alone = model(input_ids=ids[1:2], attention_mask=mask[1:2], pictures=again).logits
    torch.testing.assert_close(alone[0][mask[1] > 0], found[1][mask[1] > 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_neither_tower_nor_patches_run_again(tiny_mini):
    model = tiny_mini()
    inputs = batch(model)
    pictures = encoded(model, inputs)
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append("tower"))
    model.model.prefusion.layers[0].register_forward_hook(lambda *call: calls.append(call[-1].shape[1]))
    two = {name: value[:2] for name, value in without_pixels(inputs).items()}
    before = [[states.clone() for pair in part.past for states in pair] for part in pictures.kept]
    for _ in range(2):
        model(**two, pictures=pictures)
    assert "tower" not in calls
    assert set(calls) == {8}  # the longer text, of both rows
    after = [[states for pair in part.past for states in pair] for part in pictures.kept]
    assert all(
        torch.equal(*pair) for one, two in zip(before, after, strict=True) for pair in zip(one, two, strict=True)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
@pytest.mark.parametrize("max_bytes", [None, 0])
def test_generation(tiny_mini, options, max_bytes):
    model = tiny_mini(attention="sdpa")
    pictures = [[(3, 1)], [(1, 1), (1, 1)]]
    ids, mask = questions(model, pictures, (5, 8))
    layout = torch.tensor([[0, 3, 1], [1, 1, 1], [1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask, "visual_layout": layout}
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "suppress_tokens": [IMAGE_TOKEN],
    } | options
    pixels = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(7))
    kept = model.encode_pictures(pixels, layout, max_bytes=max_bytes)
    expected = model.generate(**inputs, pixel_values=pixels, **options)
    assert torch.equal(model.generate(**inputs, pictures=kept, **options), expected)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("text", ["llama", "gemma3"])
@pytest.mark.parametrize("way", ["pixels", "pictures", "asked twice", "checkpointed"])
def test_gradients(tiny_mini, way, text):
    model = tiny_mini(text, attention="sdpa", prefusion_layers=2, frames_per_chunk=2).double().train()
    inputs = batch(model, dtype=torch.float64)
    inputs = {name: value[:2] if name in ("input_ids", "attention_mask") else value for name, value in inputs.items()}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-3] = -100
    expected = gradients(model, whole.loss(model, labels, **inputs))
    if way == "checkpointed":
        model.gradient_checkpointing_enable()
    if way in ("pixels", "checkpointed"):
        found = gradients(model, model(**inputs, labels=labels).loss)
    else:
        pictures = model.encode_pictures(inputs["pixel_values"], inputs["visual_layout"])
        asked = without_pixels(inputs)
        times = 2 if way == "asked twice" else 1
        losses = [model(**asked, labels=labels, pictures=pictures).loss / times for _ in range(times)]
        found = gradients(model, sum(losses))
    assert found.keys() == expected.keys()
    assert any(name.startswith("model.prefusion.layers.1.self_attn.k_proj") for name in found)
    for name, gradient in expected.items():  # of up to 10; norms and softmax round to float32
        torch.testing.assert_close(found[name], gradient, atol=5e-6, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_checkpointed_layers_cannot_see_what_was_encoded(tiny_mini):
    model = tiny_mini()
    inputs = batch(model)
    pictures = encoded(model, inputs)
    model.gradient_checkpointing_enable()
    two = {name: value[:2] for name, value in without_pixels(inputs).items()}
    model.eval()(**two, pictures=pictures)
    with pytest.raises(ValueError, match=r"need gradient_checkpointing_disable\(\)"):
        model.train()(**two, pictures=pictures)


def prefusion_flops(model, unread):
    """Of 16 patches, 4 tokens and 6 words, by operation."""
    visual, text = torch.randn(1, 20, 24), torch.randn(1, 6, 24)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.model.prefusion(visual, text, model.model.language_model.rotary_emb, unread=unread)
    return counter.get_total_flops()


def test_the_last_layer_makes_keys_and_values_of_patches_and_nothing_more(tiny_mini):
    model = tiny_mini()
    spared = prefusion_flops(model, 0) - prefusion_flops(model, 16)
    # width 24, 4 heads of 6, MLP 40 wide: queries and output, MLP; scores and their product with the values
    assert spared == 16 * 2 * (2 * 24 * 24 + 3 * 24 * 40) + 16 * 26 * 2 * 2 * 24
    hook = model.model.prefusion.layers[-1].mlp.register_forward_hook(lambda *_: None)
    assert prefusion_flops(model, 0) == prefusion_flops(model, 16)
    hook.remove()
    assert prefusion_flops(model, 0) - prefusion_flops(model, 16) == spared


@torch.no_grad()
@pytest.mark.parametrize("why", ["hooked", "unknown attention"])
def test_a_last_layer_that_runs_whole_says_the_same(tiny_mini, why):
    model = tiny_mini(attention="sdpa")
    last, shapes = model.model.prefusion.layers[-1], []
    if why == "hooked":
        last.register_forward_hook(lambda *call: shapes.append(call[-1].shape[1]))
    else:
        last.self_attn.__class__ = type("Own", (LlamaAttention,), {})
    check(model, batch(model))
    if why == "hooked":
        assert max(shapes) == 5 * 16 + 4 + 8  # tiles and whole, tokens, the longest text


@torch.no_grad()
def test_half_precision(tiny_mini):
    model = tiny_mini(attention="sdpa").to(torch.bfloat16)
    pixels, pictures = both(model, batch(model))
    assert pictures.dtype == torch.bfloat16
    torch.testing.assert_close(pictures.float(), pixels.float(), atol=0.1, rtol=0.1)


def test_wrong_calls_are_one_line(tiny_mini):
    model = tiny_mini(frames_per_chunk=16)
    inputs = batch(model)
    pictures, asked = encoded(model, inputs), without_pixels(inputs)
    two = {name: value[:2] for name, value in asked.items()}
    with pytest.raises(ValueError, match=r"pictures are of 2 rows, but input_ids have 3: pictures\.select"):
        model(**asked, pictures=pictures)
    with pytest.raises(ValueError, match="pictures stand in place of pixel_values"):
        model(**inputs, pictures=pictures)
    with pytest.raises(ValueError, match="need input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(2, 3, 24), pictures=pictures)
    with pytest.raises(ValueError, match=r"visual_layout \[\[0, 4, 1\]\] is not that of the pictures"):
        model(**two, pictures=pictures, visual_layout=torch.tensor([[0, 4, 1]]))
    with pytest.raises(ValueError, match="row 0 has 16 placeholders, but its 1 pictures become 4"):
        model(**two, pictures=pictures.select([1, 0]))
    with pytest.raises(ValueError, match=r"rows \[2, -1\] are unknown: the pictures are of 2 rows"):
        pictures.select([0, 2, -1])
    with pytest.raises(ValueError, match="a stream of frames needs a visual_layout"):
        model.encode_pictures(iter(inputs["pixel_values"][:, None]))
    once = iter(torch.randn(20, 1, 3, 24, 24))
    with pytest.raises(ValueError, match=r"frames from 16 on do not fit in max_bytes=\d+,\d+, and the stream"):
        model.encode_pictures(once, torch.tensor([[0, 20, 1]]), max_bytes=70_000)


def test_streams(tiny_mini):
    """A list of frames starts anew; a stream that is gone through once will do where everything is kept."""
    model = tiny_mini(frames_per_chunk=2)
    frames = list(torch.randn(5, 1, 3, 24, 24, generator=torch.Generator().manual_seed(0)))
    layout = torch.tensor([[0, 5, 1]])
    ids, mask = questions(model, [[(5, 1)]], (6,))
    with torch.no_grad():
        expected = whole.logits(
            model, input_ids=ids, pixel_values=torch.cat(frames), attention_mask=mask, visual_layout=layout
        )
        each = model.encode_pictures(iter(frames), layout).nbytes // 5
        some = [model.encode_pictures(iter(frames), layout), model.encode_pictures(frames, layout, max_bytes=3 * each)]
        assert [pictures.kept_frames for pictures in some] == [5, 2]
        for pictures in some:
            for _ in range(2):
                found = model(input_ids=ids, pictures=pictures).logits
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_probing_what_was_encoded_ahead_is_refused(tiny_mini):
    model = tiny_mini(attention="sdpa")
    ids, _ = questions(model, [[(1, 1)]], (6,))
    pixels = torch.randn(1, 3, 24, 24)
    tokens = TokenMap.from_inputs(model, {"input_ids": ids, "pixel_values": pixels}, stack="prefusion")
    pictures = model.encode_pictures(pixels)
    refused = pytest.raises(ValueError, match="encoded in advance skip pre-fusion's visual tokens")
    with refused, torch.no_grad(), record_attention(model, tokens):
        model(input_ids=ids, pictures=pictures)
    with torch.no_grad(), record_attention(model, tokens) as attention:
        model(input_ids=ids, pixel_values=pixels)
    # patches attend to patches in the last layer too, while somebody looks
    assert attention.mass[1, 0, :, attention.targets.index("vision"), attention.sources.index("vision")].min() > 0.99
    assert not any(module._forward_pre_hooks for module in model.model.prefusion.modules())
