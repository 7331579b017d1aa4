"""Forward pass, training and generation of LLaVA-Mini."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, GPT2Config

from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration, LlavaMiniModel
from llava_mini.compressors import COMPRESSORS

IMAGE_TOKEN = 99  # as in conftest.py

both_attentions = pytest.mark.parametrize("attention", ["eager", "sdpa"])
every_compressor = pytest.mark.parametrize("compressor", ["none", *sorted(COMPRESSORS)])


def num_visual(model):
    """Return the number of visual tokens of one image."""
    return model.config.num_visual_tokens(16)


def make_batch(samples, side):
    """Make token ids padded with 0 on `side`, their mask, and the stacked pixels."""
    ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in samples], batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(i) for i, _ in samples], batch_first=True, padding_side=side
    )
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.stack([pixels for _, pixels in samples])}


def record_embeddings(model, **inputs):
    """Run the model and return the language model's input embeddings, (batch, length, width)."""
    recorded = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: recorded.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return recorded[0]


@both_attentions
@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_forward_without_compressor_and_prefusion_equals_llava(tiny_llava, sample, attention, text, vision):
    llava = tiny_llava(text, vision, attention=attention)
    mini = LlavaMiniForConditionalGeneration.from_llava(llava, compressor="none", prefusion_layers=0)
    batch = make_batch([sample(16, 5, 1), sample(16, 8, 2)], "left")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, -100)
    with torch.no_grad():
        ours, theirs = mini(**batch, labels=labels), llava(**batch, labels=labels)
        features = llava.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.image_hidden_states, torch.stack(list(features)).flatten(0, 1))


@pytest.fixture
def one_thread():
    """Use one thread. Threads split a matrix product by its shape, which changes these logits by up to 2e-5."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@both_attentions
@every_compressor
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_of_a_padded_batch_equals_each_row_alone(tiny_mini, sample, attention, compressor, side):
    model = tiny_mini(attention=attention, compressor=compressor)
    samples = [sample(num_visual(model), length, length) for length in (4, 9, 6)]
    batch = make_batch(samples, side)
    with torch.no_grad():
        batch_logits = model(**batch).logits
        for row, (ids, pixels) in enumerate(samples):
            alone = model(input_ids=ids[None], pixel_values=pixels[None]).logits[0]
            torch.testing.assert_close(
                batch_logits[row][batch["attention_mask"][row] == 1], alone, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("compressor", ["none", "query"])
def test_forward_with_eager_and_sdpa_attention_is_the_same(tiny_mini, sample, text, compressor):
    model = tiny_mini(text, compressor=compressor)
    batch = make_batch([sample(num_visual(model), 4), sample(num_visual(model), 7)], "left")
    is_token = batch["attention_mask"] == 1
    with torch.no_grad():
        eager = model(**batch).logits[is_token]
        model.set_attn_implementation("sdpa")
        assert model.model.prefusion.layers[0].self_attn.config._attn_implementation == "sdpa"
        torch.testing.assert_close(model(**batch).logits[is_token], eager, atol=1e-4, rtol=1e-4)


def test_forward_without_images_equals_llava(tiny_llava, sample):
    llava = tiny_llava()
    mini = LlavaMiniForConditionalGeneration.from_llava(llava)
    ids = sample(0, 6)[0][None]
    with torch.no_grad():
        assert torch.equal(mini(input_ids=ids).logits, llava(input_ids=ids).logits)


def test_forward_of_a_text_row_beside_an_image_row_keeps_raw_embeddings(tiny_mini, sample):
    model = tiny_mini()
    (with_image, pixels), (alone, _) = sample(4, 3), sample(0, 7)
    embeds = record_embeddings(model, input_ids=torch.stack([alone, with_image]), pixel_values=pixels[None])
    raw = model.get_input_embeddings()(torch.stack([alone, with_image]))
    assert torch.equal(embeds[0], raw[0])
    assert (embeds[1] != raw[1]).any(dim=-1).all()


@pytest.mark.parametrize("compressor", ["none", "query"])
def test_forward_with_another_question_has_the_same_visual_tokens(tiny_mini, sample, compressor):
    """Conformance 3: the visual tokens come first and the mask is causal."""
    model = tiny_mini(compressor=compressor)
    (first, pixels), (second, _) = sample(num_visual(model), 6, 1), sample(num_visual(model), 6, 2)
    assert not torch.equal(first, second)
    with torch.no_grad():
        visual = [model(input_ids=i[None], pixel_values=pixels[None]).image_hidden_states for i in (first, second)]
        changed = model(input_ids=first[None], pixel_values=pixels[None] + 1).image_hidden_states
    assert torch.equal(*visual)
    assert not torch.allclose(visual[0], changed)


def test_forward_with_labels_keeps_answers_raw_and_unattended(tiny_mini, sample):
    """Conformance 4: answers have raw embeddings, and no other position depends on them."""
    model = tiny_mini()
    ids, pixels = sample(4, 8)
    labels = ids.clone()
    labels[:8] = -100
    labels[9] = -100  # an instruction token between two answers attends to neither
    other = torch.where(labels == -100, ids, (ids + 1) % IMAGE_TOKEN)
    one, two = (
        record_embeddings(model, input_ids=i[None], pixel_values=pixels[None], labels=labels[None])[0]
        for i in (ids, other)
    )
    answer = labels != -100
    assert torch.equal(one[answer], model.get_input_embeddings()(ids[answer]))
    assert torch.equal(one[~answer], two[~answer])
    inference = record_embeddings(model, input_ids=ids[None], pixel_values=pixels[None])[0]
    assert (inference[answer] != one[answer]).any(dim=-1).all()


def test_forward_fuses_every_instruction_position(tiny_mini, sample):
    model = tiny_mini()
    ids, pixels = sample(4, 5)
    first, second = (
        record_embeddings(model, input_ids=ids[None], pixel_values=p[None])[0] for p in (pixels, pixels + 1)
    )
    assert ((first - second).abs() > 1e-4).any(dim=-1).all()


@both_attentions
@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("compressor", ["none", "query"])
def test_generate_equals_a_greedy_loop(tiny_mini, sample, attention, text, compressor):
    model = tiny_mini(text, attention=attention, compressor=compressor)
    batch = make_batch([sample(num_visual(model), 4, 3), sample(num_visual(model), 7, 4)], "left")
    embeds, mask = record_embeddings(model, **batch), batch["attention_mask"]
    new = []
    with torch.no_grad():
        for _ in range(6):
            logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
            new.append(logits[:, -1, :IMAGE_TOKEN].argmax(-1))  # a generated placeholder has no image
            embeds = torch.cat([embeds, model.get_input_embeddings()(new[-1])[:, None]], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    for cache in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}):
        generated = model.generate(
            **batch, max_new_tokens=6, do_sample=False, eos_token_id=None, suppress_tokens=[IMAGE_TOKEN], **cache
        )
        assert generated[:, batch["input_ids"].shape[1] :].tolist() == torch.stack(new, dim=1).tolist()


def test_generate_runs_vision_tower_and_prefusion_once(tiny_mini, sample):
    model = tiny_mini()
    ids, pixels = sample(4, 5)
    calls = []
    for module in (model.model.vision_tower, model.model.prefusion):
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    output = model.generate(ids[None], pixel_values=pixels[None], max_new_tokens=4, return_dict_in_generate=True)
    assert sorted(calls) == ["CLIPVisionModel", "Prefusion"]
    assert len(output.past_key_values) == model.config.text_config.num_hidden_layers
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1


def test_generate_with_beams_is_the_same_with_and_without_a_cache(tiny_mini, sample):
    model = tiny_mini()
    ids, pixels = sample(4, 5)
    with_cache, without = (
        model.generate(
            ids[None],
            pixel_values=pixels[None],
            max_new_tokens=5,
            num_beams=3,
            suppress_tokens=[IMAGE_TOKEN],
            use_cache=cache,
        )
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


@every_compressor
@pytest.mark.parametrize("prefusion_layers", [0, 2])
def test_backward_reaches_every_part(tiny_mini, sample, compressor, prefusion_layers):
    model = tiny_mini(compressor=compressor, prefusion_layers=prefusion_layers).train()
    model.model.vision_tower.requires_grad_(False)
    ids, pixels = sample(num_visual(model), 8)
    labels = ids.clone()
    labels[:-3] = -100
    model(input_ids=ids[None], pixel_values=pixels[None], labels=labels[None]).loss.backward()
    without_gradient = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert without_gradient == []
    for part in (model.model.compressor, model.model.prefusion, model.model.multi_modal_projector, model.lm_head):
        for parameter in part.parameters() if part is not None else ():
            assert torch.isfinite(parameter.grad).all()


def test_forward_returns_attentions_and_states_of_the_language_model_only(tiny_mini, sample):
    ids, pixels = sample(4, 5)
    output = tiny_mini()(
        input_ids=ids[None], pixel_values=pixels[None], output_attentions=True, output_hidden_states=True
    )
    assert [tuple(a.shape) for a in output.attentions] == [(1, 4, 9, 9)] * 2
    assert [tuple(h.shape) for h in output.hidden_states] == [(1, 9, 24)] * 3


def test_look_at_with_several_layers_concatenates_their_features(tiny_llava, sample):
    llava = tiny_llava()
    config = LlavaMiniConfig(**(llava.config.to_dict() | {"vision_feature_layer": [-1, -3]}), prefusion_layers=1)
    model = LlavaMiniForConditionalGeneration(config).eval()
    ids, pixels = sample(1, 5)
    hidden_states = model.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states
    features = model.model.look_at(pixels[None]).features
    assert torch.equal(features, torch.cat([hidden_states[-1], hidden_states[-3]], dim=-1)[:, 1:])
    assert model(input_ids=ids[None], pixel_values=pixels[None]).logits.shape == (1, 6, 100)


def test_forward_in_bfloat16_returns_bfloat16(tiny_mini, sample):
    ids, pixels = sample(4, 5)
    model = tiny_mini().to(torch.bfloat16)
    assert model(input_ids=ids[None], pixel_values=pixels[None]).logits.dtype == torch.bfloat16


def test_backward_under_autocast_is_the_same_with_checkpointing(tiny_mini, sample):
    model = tiny_mini().train()
    ids, pixels = sample(4, 8)
    labels = ids.clone()
    labels[:-3] = -100
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.model.prefusion.layers)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids[None], pixel_values=pixels[None], labels=labels[None]).loss.backward()
        gradients.append(model.model.prefusion.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_forward_of_an_image_without_text_returns_logits(tiny_mini, sample):
    ids, pixels = sample(4, 0)
    assert tiny_mini()(input_ids=ids[None], pixel_values=pixels[None]).logits.shape == (1, 4, 100)


def test_forward_with_return_dict_false_returns_a_tuple(tiny_mini, sample):
    ids, pixels = sample(4, 5)
    model = tiny_mini()
    logits = model(input_ids=ids[None], pixel_values=pixels[None]).logits
    assert torch.equal(model(input_ids=ids[None], pixel_values=pixels[None], return_dict=False)[0], logits)
    assert isinstance(model.model(input_ids=ids[None], pixel_values=pixels[None], return_dict=False), tuple)


@pytest.mark.parametrize(
    ("counts", "images", "message"),
    [
        ((8,), 1, "row 0 has 8 placeholders.* 1 .* 4 visual tokens"),
        ((3,), 1, "row 0 has 3 placeholders.* 1 .* 4 visual tokens"),
        ((4,), 2, "row 0 has 4 placeholders.* 2 .* 8 visual tokens"),
        ((0,), 1, "row 0 has 0 placeholders.* 1 .* 4 visual tokens"),
        ((4, 0), 2, "row 0 has 4 placeholders.* 2 .* 8 visual tokens"),
        ((5, 1), 2, r"2 images for rows with \[5, 1\] placeholders"),
    ],
)
def test_forward_with_a_wrong_number_of_placeholders_raises(tiny_mini, sample, counts, images, message):
    ids = torch.stack([sample(count, 12 - count)[0] for count in counts])
    with pytest.raises(ValueError, match=message):
        tiny_mini()(input_ids=ids, pixel_values=torch.randn(images, 3, 24, 24))


def test_forward_with_wrong_arguments_raises(tiny_mini, sample):
    model = tiny_mini()
    ids, pixels = sample(4, 5)
    ids, pixels = ids[None], pixels[None]
    with pytest.raises(ValueError, match=r"pixel_values .*input_ids, not inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids), pixel_values=pixels)
    with pytest.raises(ValueError, match="2-D mask"):
        model(input_ids=ids, pixel_values=pixels, attention_mask=torch.zeros(1, 1, 9, 9))
    with pytest.raises(ValueError, match=r"input_ids has placeholders.*pixel_values"):
        model(input_ids=ids)
    with pytest.raises(TypeError, match=r"no field 'compresor'.* compress_before_projection, compressor,"):
        LlavaMiniForConditionalGeneration.from_llava(model, compresor="average")
    with pytest.raises(TypeError, match=r"no vision_feature_layer.*-1"):
        model(input_ids=ids, pixel_values=pixels, vision_feature_layer=-1)


def test_from_llava_keeps_the_generation_config(tiny_llava):
    """Some models name their end-of-turn token there alone."""
    llava = tiny_llava()
    llava.generation_config.eos_token_id = [2, 7]
    llava.generation_config.repetition_penalty = 1.3
    mini = LlavaMiniForConditionalGeneration.from_llava(llava)
    assert (mini.generation_config.eos_token_id, mini.generation_config.repetition_penalty) == ([2, 7], 1.3)
    assert mini.generation_config is not llava.generation_config


@pytest.mark.parametrize("part", ["model", "language_model"])
def test_from_llava_with_another_model_raises(part, tiny_llava):
    llava = tiny_llava()
    other = llava.model if part == "model" else llava.model.language_model
    with pytest.raises(TypeError, match=type(other).__name__):
        LlavaMiniForConditionalGeneration.from_llava(other)


def test_model_with_prefusion_on_a_decoder_without_rotary_positions_raises():
    config = {"vision_config": CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)}
    config |= {"text_config": GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)}
    with pytest.raises(TypeError, match=r"GPT2Model.*prefusion_layers=0"):
        LlavaMiniModel(LlavaMiniConfig(**config))
    LlavaMiniModel(LlavaMiniConfig(**config, prefusion_layers=0))
