"""Images encoded once, and computations that pre-fusion skips, against the reference in reference_model.py."""

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
from tests.llava_mini import reference_model as reference

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


def make_questions(model, visual_inputs, lengths, seed=1):
    """Make token ids padded on the left, and their mask.

    Each row asks about its visual inputs, given as (frames, tiles), with `lengths[row]` words.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row_inputs, words in zip(visual_inputs, lengths, strict=True):
        count = sum(frames * model.config.num_visual_tokens(16 * tiles**2) for frames, tiles in row_inputs)
        text = torch.randint(3, IMAGE_TOKEN, (words,), generator=generator)
        rows.append(torch.cat([text[:2], torch.full((count,), IMAGE_TOKEN), text[2:]]))
    width = max(map(len, rows))
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in rows]), mask


def make_batch(model, seed=1, dtype=torch.float32):
    """Make a batch of three rows: a video of three frames and a tiled image; an image; only text."""
    visual_inputs = [[(3, 1), (1, 2)], [(1, 1)], []]
    ids, mask = make_questions(model, visual_inputs, (5, 8, 4), seed)
    layout = torch.tensor([[row, *one] for row, row_inputs in enumerate(visual_inputs) for one in row_inputs])
    pixels = torch.randn(9, 3, 24, 24, generator=torch.Generator().manual_seed(7), dtype=dtype)
    return {"input_ids": ids, "attention_mask": mask, "visual_layout": layout, "pixel_values": pixels}


def without_pixels(inputs):
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def encode(model, inputs, **options):
    """Encode the images and videos of the first two rows. The third row has none."""
    pictures = model.encode_pictures(inputs["pixel_values"], inputs["visual_layout"], **options)
    assert pictures.rows == 2
    return pictures


def compute_logits(model, inputs, **options):
    """Compute the logits of the first two rows, from pixels and from encoded images."""
    is_token = inputs["attention_mask"][:2] > 0
    pictures = encode(model, inputs, **options)
    two = {name: value[:2] for name, value in without_pixels(inputs).items()}
    return model(**inputs).logits[:2][is_token], model(**two, pictures=pictures).logits[is_token]


def check_logits(model, inputs, **options):
    """Check the logits from pixels and from encoded images against the reference."""
    is_token = inputs["attention_mask"][:2] > 0
    expected = reference.logits(model, **inputs)[:2][is_token]
    assert expected.std() > 0.1
    for logits in compute_logits(model, inputs, **options):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("text", "attention"),
    [
        *((text, "eager") for text in ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")),
        *((text, "sdpa") for text in ("qwen2", "qwen3", "gemma", "gemma3")),
    ],
)
def test_forward_of_every_language_model_equals_the_reference(tiny_mini, text, attention):
    model = tiny_mini(text, attention=attention, prefusion_layers=2, frames_per_chunk=2)
    check_logits(model, make_batch(model))


@torch.no_grad()
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_forward_of_every_variant_equals_the_reference(tiny_mini, fields):
    model = tiny_mini(attention="sdpa", **fields)
    check_logits(model, make_batch(model))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 64])
@pytest.mark.parametrize("share", [0, 1 / 3, 2 / 3])
def test_encode_pictures_with_a_memory_limit_encodes_the_other_frames_again(tiny_mini, chunk, share):
    model = tiny_mini(attention="sdpa", frames_per_chunk=chunk)
    inputs = make_batch(model)
    all_bytes = encode(model, inputs).nbytes
    pictures = encode(model, inputs, max_bytes=int(all_bytes * share))
    assert pictures.nbytes <= all_bytes * share
    if chunk == 1:
        assert pictures.kept_frames == (0, 2, 3)[round(share * 3)]
    check_logits(model, inputs, max_bytes=int(all_bytes * share))


@torch.no_grad()
def test_nbytes_counts_tokens_keys_and_values_of_each_frame(tiny_mini):
    model = tiny_mini(prefusion_layers=2, compressor_size=2)
    pictures = encode(model, make_batch(model))
    # Each of the patches and 4 tokens has 2 layers x keys and values x 2 heads x width 6; the 4 tokens have width 24.
    positions = [16 + 4] * 3 + [16 * 5 + 4] + [16 + 4]
    assert pictures.nbytes == 4 * sum(2 * 2 * 2 * 6 * n + 4 * 24 for n in positions)
    moved = pictures.to("meta")
    assert moved.nbytes == pictures.nbytes
    assert {part.tokens.device.type for part in moved.kept} == {"meta"}
    assert {states.device.type for part in moved.kept for pair in part.past for states in pair} == {"meta"}


def count_storage_bytes(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 64])
@pytest.mark.parametrize("fields", [VARIANTS["code"], VARIANTS["text alone"]])
def test_encode_pictures_holds_only_the_bytes_it_counts(tiny_mini, fields, chunk):
    """No view keeps patches or text in memory."""
    model = tiny_mini(frames_per_chunk=chunk, **fields)
    inputs = make_batch(model)
    pictures = encode(model, inputs)
    states = [states for part in pictures.kept for pair in part.past for states in pair]
    assert count_storage_bytes([*states, *(part.tokens for part in pictures.kept)]) == pictures.nbytes
    assert pictures.pixel_values is None
    pictures = encode(model, inputs, max_bytes=0)
    rows = torch.tensor([0, 0, 0, 0, 1])
    chunks = list(model.model._fuse_frames(pictures, torch.randn(2, 6, 24), torch.ones(2, 6, dtype=torch.bool), rows))
    assert count_storage_bytes([tokens for _, tokens, _ in chunks]) == 4 * 24 * 4 * 5


@torch.no_grad()
@pytest.mark.parametrize("max_bytes", [None, 0])
@pytest.mark.parametrize("rows", [[1, 0], [1, 1], [0, 0]])
def test_select_of_reordered_rows_equals_the_reference(tiny_mini, rows, max_bytes):
    """The selection has as many frames as a chunk, but in another order or with repetitions."""
    model = tiny_mini(attention="sdpa")
    ids, mask = make_questions(model, [[(1, 1)], [(1, 1)]], (6, 6))
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(7))
    logits = model(input_ids=ids, pictures=model.encode_pictures(pixels, max_bytes=max_bytes).select(rows)).logits
    layout = torch.tensor([[0, 1, 1], [1, 1, 1]])
    expected = reference.logits(
        model, input_ids=ids, pixel_values=pixels[rows], attention_mask=mask, visual_layout=layout
    )
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("max_bytes", [None, 0])
def test_select_of_repeated_rows_answers_each_question_as_alone(tiny_mini, max_bytes):
    model = tiny_mini(attention="sdpa", frames_per_chunk=2)
    inputs = make_batch(model)
    pictures = encode(model, inputs, max_bytes=max_bytes)
    rows = [0, 1, 0, 0]
    visual_inputs = [[(3, 1), (1, 2)], [(1, 1)]]
    ids, mask = make_questions(model, [visual_inputs[row] for row in rows], (7, 4, 5, 9), seed=3)
    logits = model(input_ids=ids, attention_mask=mask, pictures=pictures.select(rows)).logits
    crops = [inputs["pixel_values"][:8], inputs["pixel_values"][8:]]
    for row, source_row in enumerate(rows):
        layout = inputs["visual_layout"][inputs["visual_layout"][:, 0] == source_row] * torch.tensor([0, 1, 1])
        alone = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        expected = reference.logits(model, **alone, pixel_values=crops[source_row], visual_layout=layout)
        is_token = mask[row] > 0
        torch.testing.assert_close(logits[row][is_token], expected[0][is_token], atol=1e-5, rtol=1e-5)
    # A selection of a selection does not encode the frames of other rows.
    reselected = pictures.select(rows).select([1])
    alone = model(input_ids=ids[1:2], attention_mask=mask[1:2], pictures=reselected).logits
    torch.testing.assert_close(alone[0][mask[1] > 0], logits[1][mask[1] > 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_forward_with_pictures_runs_neither_vision_tower_nor_patches(tiny_mini):
    model = tiny_mini()
    inputs = make_batch(model)
    pictures = encode(model, inputs)
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append("vision tower"))
    model.model.prefusion.layers[0].register_forward_hook(lambda *call: calls.append(call[-1].shape[1]))
    two = {name: value[:2] for name, value in without_pixels(inputs).items()}
    before = [[states.clone() for pair in part.past for states in pair] for part in pictures.kept]
    for _ in range(2):
        model(**two, pictures=pictures)
    assert "vision tower" not in calls
    assert set(calls) == {8}  # length of the longer text
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
def test_generate_with_pictures_equals_generate_with_pixels(tiny_mini, options, max_bytes):
    model = tiny_mini(attention="sdpa")
    ids, mask = make_questions(model, [[(3, 1)], [(1, 1), (1, 1)]], (5, 8))
    layout = torch.tensor([[0, 3, 1], [1, 1, 1], [1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask, "visual_layout": layout}
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "suppress_tokens": [IMAGE_TOKEN],
    } | options
    pixels = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(7))
    pictures = model.encode_pictures(pixels, layout, max_bytes=max_bytes)
    expected = model.generate(**inputs, pixel_values=pixels, **options)
    assert torch.equal(model.generate(**inputs, pictures=pictures, **options), expected)


def compute_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("text", ["llama", "gemma3"])
@pytest.mark.parametrize("mode", ["pixels", "pictures", "two questions", "checkpointed"])
def test_gradients_equal_those_of_the_reference(tiny_mini, mode, text):
    model = tiny_mini(text, attention="sdpa", prefusion_layers=2, frames_per_chunk=2).double().train()
    inputs = make_batch(model, dtype=torch.float64)
    inputs = {name: value[:2] if name in ("input_ids", "attention_mask") else value for name, value in inputs.items()}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-3] = -100
    expected = compute_gradients(model, reference.loss(model, labels, **inputs))
    if mode == "checkpointed":
        model.gradient_checkpointing_enable()
    if mode in ("pixels", "checkpointed"):
        actual = compute_gradients(model, model(**inputs, labels=labels).loss)
    else:
        pictures = model.encode_pictures(inputs["pixel_values"], inputs["visual_layout"])
        question = without_pixels(inputs)
        times = 2 if mode == "two questions" else 1
        losses = [model(**question, labels=labels, pictures=pictures).loss / times for _ in range(times)]
        actual = compute_gradients(model, sum(losses))
    assert actual.keys() == expected.keys()
    assert any(name.startswith("model.prefusion.layers.1.self_attn.k_proj") for name in actual)
    for name, gradient in expected.items():  # up to 10; norms and softmax round to float32
        torch.testing.assert_close(
            actual[name], gradient, atol=5e-6, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_forward_with_pictures_and_checkpointing_raises(tiny_mini):
    model = tiny_mini()
    inputs = make_batch(model)
    pictures = encode(model, inputs)
    model.gradient_checkpointing_enable()
    two = {name: value[:2] for name, value in without_pixels(inputs).items()}
    model.eval()(**two, pictures=pictures)
    with pytest.raises(ValueError, match=r"need gradient_checkpointing_disable\(\)"):
        model.train()(**two, pictures=pictures)


def count_prefusion_flops(model, unread):
    """Count the FLOPs of pre-fusion over 16 patches, 4 tokens and 6 words."""
    visual, text = torch.randn(1, 20, 24), torch.randn(1, 6, 24)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.model.prefusion(visual, text, model.model.language_model.rotary_emb, unread=unread)
    return counter.get_total_flops()


def test_prefusion_with_unread_patches_computes_only_their_keys_and_values_in_the_last_layer(tiny_mini):
    model = tiny_mini()
    saved = count_prefusion_flops(model, 0) - count_prefusion_flops(model, 16)
    # Width 24, 4 heads of width 6, MLP width 40: query and output projections, MLP; scores and weighted values.
    assert saved == 16 * 2 * (2 * 24 * 24 + 3 * 24 * 40) + 16 * 26 * 2 * 2 * 24
    hook = model.model.prefusion.layers[-1].mlp.register_forward_hook(lambda *_: None)
    assert count_prefusion_flops(model, 0) == count_prefusion_flops(model, 16)
    hook.remove()
    assert count_prefusion_flops(model, 0) - count_prefusion_flops(model, 16) == saved


@torch.no_grad()
@pytest.mark.parametrize("reason", ["hooked", "unknown attention"])
def test_prefusion_whose_last_layer_runs_in_full_equals_the_reference(tiny_mini, reason):
    model = tiny_mini(attention="sdpa")
    last, shapes = model.model.prefusion.layers[-1], []
    if reason == "hooked":
        last.register_forward_hook(lambda *call: shapes.append(call[-1].shape[1]))
    else:
        last.self_attn.__class__ = type("CustomAttention", (LlamaAttention,), {})
    check_logits(model, make_batch(model))
    if reason == "hooked":
        assert max(shapes) == 5 * 16 + 4 + 8  # patches of tiles and whole image, tokens, longest text


@torch.no_grad()
def test_forward_in_bfloat16_is_close_with_pixels_and_pictures(tiny_mini):
    model = tiny_mini(attention="sdpa").to(torch.bfloat16)
    pixel_logits, picture_logits = compute_logits(model, make_batch(model))
    assert picture_logits.dtype == torch.bfloat16
    torch.testing.assert_close(picture_logits.float(), pixel_logits.float(), atol=0.1, rtol=0.1)


@torch.no_grad()
def test_pictures_serve_a_batch_whose_last_row_is_text(tiny_mini):
    model = tiny_mini()
    inputs = make_batch(model)
    logits = model(**without_pixels(inputs), pictures=encode(model, inputs)).logits
    torch.testing.assert_close(logits, model(**inputs).logits)


def test_pictures_in_a_wrong_call_raise(tiny_mini):
    model = tiny_mini(frames_per_chunk=16)
    inputs = make_batch(model)
    pictures, questions = encode(model, inputs), without_pixels(inputs)
    two = {name: value[:2] for name, value in questions.items()}
    for rows in ([0, 1, 0], [0]):  # a third row with placeholders, and a row too few
        with pytest.raises(ValueError, match=rf"pictures has 2 rows.*input_ids has {len(rows)}"):
            model(**{name: value[rows] for name, value in questions.items()}, pictures=pictures)
    with pytest.raises(ValueError, match="both pixel_values and pictures"):
        model(**inputs, pictures=pictures)
    with pytest.raises(ValueError, match="pictures need input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(2, 3, 24), pictures=pictures)
    with pytest.raises(ValueError, match=r"visual_layout \[\[0, 4, 1\]\]"):
        model(**two, pictures=pictures, visual_layout=torch.tensor([[0, 4, 1]]))
    with pytest.raises(ValueError, match=r"row 0 has 16 placeholders.* 4 visual tokens"):
        model(**two, pictures=pictures.select([1, 0]))
    with pytest.raises(ValueError, match=r"rows \[2, -1\].*pictures has 2 rows"):
        pictures.select([0, 2, -1])
    with pytest.raises(ValueError, match="stream of frames needs a visual_layout"):
        model.encode_pictures(iter(inputs["pixel_values"][:, None]))
    one_time_stream = iter(torch.randn(20, 1, 3, 24, 24))
    with pytest.raises(ValueError, match=r"frames from 16 on.*max_bytes=70,000.*stream"):
        model.encode_pictures(one_time_stream, torch.tensor([[0, 20, 1]]), max_bytes=70_000)


def test_encode_pictures_of_a_stream_equals_the_reference(tiny_mini):
    """A list of frames can be read again. A one-time stream suffices if all encodings fit in memory."""
    model = tiny_mini(frames_per_chunk=2)
    frames = list(torch.randn(5, 1, 3, 24, 24, generator=torch.Generator().manual_seed(0)))
    layout = torch.tensor([[0, 5, 1]])
    ids, mask = make_questions(model, [[(5, 1)]], (6,))
    with torch.no_grad():
        expected = reference.logits(
            model, input_ids=ids, pixel_values=torch.cat(frames), attention_mask=mask, visual_layout=layout
        )
        frame_bytes = model.encode_pictures(iter(frames), layout).nbytes // 5
        encoded = [
            model.encode_pictures(iter(frames), layout),
            model.encode_pictures(frames, layout, max_bytes=3 * frame_bytes),
        ]
        assert [pictures.kept_frames for pictures in encoded] == [5, 2]
        for pictures in encoded:
            for _ in range(2):
                logits = model(input_ids=ids, pictures=pictures).logits
                torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_record_attention_of_prefusion_with_pictures_raises(tiny_mini):
    model = tiny_mini(attention="sdpa")
    ids, _ = make_questions(model, [[(1, 1)]], (6,))
    pixels = torch.randn(1, 3, 24, 24)
    tokens = TokenMap.from_inputs(model, {"input_ids": ids, "pixel_values": pixels}, stack="prefusion")
    pictures = model.encode_pictures(pixels)
    raises = pytest.raises(ValueError, match=r"pre-fusion.*pixel_values")
    with raises, torch.no_grad(), record_attention(model, tokens):
        model(input_ids=ids, pictures=pictures)
    with torch.no_grad(), record_attention(model, tokens) as attention:
        model(input_ids=ids, pixel_values=pixels)
    # While attention is recorded, patches attend to patches in the last layer too.
    assert attention.mass[1, 0, :, attention.targets.index("vision"), attention.sources.index("vision")].min() > 0.99
    assert not any(module._forward_pre_hooks for module in model.model.prefusion.modules())
