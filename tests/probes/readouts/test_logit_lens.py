"""`logit_lens` against the model's own logits, and against norm and head of transformers' hidden states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from probes import RemoveTokens, TokenMap, intervene
from probes.readouts.logit_lens import logit_lens
from probes.tokens.grid import Grid
from probes.tokens.places import Places
from tests.tiny_models import IMAGE_TOKEN, LAYERS, tiny_text_config


class WordTokenizer:
    """Decodes token 7 as "w7"."""

    def decode(self, ids):
        return "".join(f"w{token}" for token in ids)


def expected_logprobs(model, inputs, norm):
    """Return log-probabilities [depths, batch, positions, vocabulary] from transformers' own hidden states."""
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    inner = [model.get_output_embeddings()(norm(state)) for state in output.hidden_states[:-1]]
    return torch.stack([*inner, output.logits]).log_softmax(-1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logit_lens_equals_norm_and_head_of_every_state(make_llava, make_inputs, side):
    model, inputs = make_llava(), make_inputs(side)
    tokens = TokenMap.from_inputs(model, inputs)
    expected = expected_logprobs(model, inputs, model.model.language_model.norm)[:, inputs["attention_mask"].bool()]
    with torch.no_grad(), logit_lens(model, tokens, top=4, track=[5, 11]) as lens:
        model(**inputs)
    assert lens.depths == tuple(range(LAYERS + 1))
    assert torch.equal(lens.index, inputs["attention_mask"].nonzero())
    best, ids = expected.topk(4)
    assert torch.equal(lens.ids, ids)
    torch.testing.assert_close(lens.logprobs, best, rtol=0, atol=2e-6)
    torch.testing.assert_close(lens.tracked_logprobs, expected[..., [5, 11]], rtol=0, atol=2e-6)
    order = expected.argsort(-1, descending=True)
    ranks = torch.stack([(order == token).nonzero()[:, -1].view(order.shape[:-1]) + 1 for token in (5, 11)], -1)
    assert torch.equal(lens.tracked_ranks, ranks)


def test_logit_lens_last_depth_is_exactly_the_models_prediction(make_llava, make_rows):
    """All positions are read at once, so the matrix products have the same shape and the results are bit-identical."""
    model, inputs = make_llava(), make_rows([(3, 4, 5), (4, 4, 4)], "left")
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), logit_lens(model, tokens, depths=[LAYERS], top=64) as lens:
        logits = model(**inputs).logits.flatten(0, 1)
    assert torch.equal(lens.ids[0], logits.topk(64).indices)
    assert torch.equal(lens.logprobs[0], logits.topk(64).values - logits.logsumexp(-1, keepdim=True))


def test_logit_lens_selected_positions_and_depths_in_chunks_equal_expected(make_llava, make_inputs, monkeypatch):
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    expected = expected_logprobs(model, inputs, model.model.language_model.norm)[[0, 2]][:, tokens.mask("vision")]
    monkeypatch.setattr("probes.readouts.logit_lens.LOGITS_PER_CHUNK", 3 * 64)
    with torch.no_grad(), logit_lens(model, tokens, at="vision", depths=[2, 0], top=1) as lens:
        model(**inputs)
    assert lens.depths == (0, 2)
    assert torch.equal(lens.ids, expected.topk(1).indices)
    torch.testing.assert_close(lens.logprobs, expected.topk(1).values, rtol=0, atol=2e-6)


def test_logit_lens_chunked_prompt_equals_one_pass(make_llama, make_rows):
    model, inputs = make_llama(), make_rows([(3, 4, 5), (2, 4, 2)], "left")
    tokens = TokenMap.from_inputs(model, inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        with logit_lens(model, tokens, at="instruction") as whole:
            model(ids, attention_mask=mask)
        with logit_lens(model, tokens, at="instruction") as chunks:
            cache = DynamicCache(config=model.config)
            for start, stop in ((0, 4), (4, 8), (8, 12)):
                model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
    assert torch.equal(chunks.ids, whole.ids)
    torch.testing.assert_close(chunks.logprobs, whole.logprobs, rtol=0, atol=1e-5)


def test_logit_lens_beam_search_reads_each_row_once(make_llama, make_rows):
    model, inputs = make_llama(), make_rows([(3, 4, 5), (2, 4, 6)], "left")
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), logit_lens(model, tokens) as whole:
        model(inputs["input_ids"])
    with logit_lens(model, tokens) as beams:
        model.generate(inputs["input_ids"], max_new_tokens=2, num_beams=3, do_sample=False)
    assert torch.equal(beams.ids, whole.ids)
    torch.testing.assert_close(beams.logprobs, whole.logprobs, rtol=0, atol=1e-5)


def test_logit_lens_generation_reads_prompt_only(make_llama, make_rows):
    model, inputs = make_llama(), make_rows([(3, 4, 5)], "left")
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), logit_lens(model, tokens) as whole:
        model(inputs["input_ids"])
    with logit_lens(model, tokens) as generated:
        model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated.ids, whole.ids)
    torch.testing.assert_close(generated.logprobs, whole.logprobs, rtol=0, atol=1e-5)


def small_config(config_class, **overrides):
    """Return a configuration with 2 layers of 2 heads each, and large weights."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    fields = {"pad_token_id": 0, "image_token_id": IMAGE_TOKEN, "initializer_range": 0.5}
    return tiny_text_config(config_class, **sizes, **fields, **overrides)


def make_gemma2():
    return Gemma2ForCausalLM(small_config(Gemma2Config, head_dim=16, final_logit_softcapping=2.0))


@pytest.mark.parametrize("make", [make_gemma2, lambda: PhiForCausalLM(small_config(PhiConfig))], ids=["gemma2", "phi"])
def test_logit_lens_soft_cap_and_other_norm_names_equal_model_logits(make, make_rows):
    torch.manual_seed(0)
    model = make().eval()
    ids = make_rows([(3, 4, 5)], "left")["input_ids"]
    with torch.no_grad(), logit_lens(model, TokenMap.from_inputs(model, {"input_ids": ids}), top=64) as lens:
        states = model(ids, output_hidden_states=True)
    own = states.logits[0].log_softmax(-1)
    torch.testing.assert_close(lens.logprobs[-1], own.topk(64).values, rtol=0, atol=2e-6)
    decoder = model.get_decoder()
    norm = decoder.norm if hasattr(decoder, "norm") else decoder.final_layernorm
    with torch.no_grad():
        first = model.get_output_embeddings()(norm(states.hidden_states[0][0]))
    if model.config.model_type == "gemma2":
        first = 2 * torch.tanh(first / 2)
    torch.testing.assert_close(lens.logprobs[0], first.log_softmax(-1).topk(64).values, rtol=0, atol=2e-6)


def test_logit_lens_model_with_scaled_logits_raises(make_rows):
    """Granite divides its logits, so norm and head alone would give other log-probabilities."""
    torch.manual_seed(0)
    model = GraniteForCausalLM(small_config(GraniteConfig, logits_scaling=8.0)).eval()
    ids = make_rows([(3, 4, 5)], "left")["input_ids"]
    tokens = TokenMap.from_inputs(model, {"input_ids": ids})
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"logits.*final norm and head"),
        logit_lens(model, tokens),
    ):
        model(ids)


def test_logit_lens_bfloat16_is_close_to_model_logits(make_llava, make_inputs):
    model, inputs = make_llava().to(torch.bfloat16), make_inputs("left")
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), logit_lens(model, tokens, depths=[LAYERS]) as lens:
        logits = model(**inputs).logits[inputs["attention_mask"].bool()].float()
    torch.testing.assert_close(lens.logprobs[0], logits.log_softmax(-1).topk(5).values, rtol=0, atol=0.1)


@pytest.mark.parametrize("how", ["mask", "drop"])
@pytest.mark.parametrize("lens_first", [True, False])
def test_logit_lens_reads_states_after_intervention(make_llava, make_inputs, lens_first, how):
    """Removed tokens keep their states, whichever block opens first, also if the layer runs without them."""
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    lens_block = logit_lens(model, tokens, at="vision")
    removal_block = intervene(model, tokens, RemoveTokens("vision", [1], how=how))
    blocks = (lens_block, removal_block) if lens_first else (removal_block, lens_block)
    with torch.no_grad(), blocks[0] as first, blocks[1] as second:
        model(**inputs)
    lens = first if lens_first else second
    assert torch.equal(lens.logprobs[1], lens.logprobs[2])
    assert not torch.equal(lens.logprobs[0], lens.logprobs[1])


def test_logit_lens_frame_and_table_list_expected_tokens(make_llava, make_rows):
    model, inputs = make_llava(), make_rows([(2, 4, 3), (1, 4, 2)], "left")
    tokens = TokenMap.from_inputs(model, inputs)
    places = Places.from_grids(tokens.mask("vision"), [Grid(0, 2, 2), Grid(1, 2, 2)])
    tokens = TokenMap(tokens.labels, tokens.groups, places=places)
    with torch.no_grad():
        logprobs = model(**inputs).logits.log_softmax(-1)
        frequent = int(logprobs.argmax(-1).mode().values[0])  # among the top at some positions, not at all
        with logit_lens(model, tokens, top=2, track=[5, frequent]) as lens:
            model(**inputs)
    listed = (lens.ids == frequent).any(-1)
    assert listed.any()
    assert not listed.all()
    frame = lens.frame(WordTokenizer())
    assert list(frame) == ["depth", "sample", "position", "group", "row", "column", "rank", "id", "token", "logprob"]
    assert not frame.duplicated(["depth", "sample", "position", "id"]).any()
    assert (frame.token == "w" + frame.id.astype(str)).all()
    last = frame[frame.depth == LAYERS]
    own = logprobs[last["sample"].tolist(), last["position"].tolist(), last["id"].tolist()]
    torch.testing.assert_close(torch.tensor(last.logprob.to_numpy()), own, rtol=0, atol=2e-6)
    ranks = (logprobs > logprobs[..., 5:6]).sum(-1) + 1
    five = last[last.id == 5]
    assert len(five) == int(inputs["attention_mask"].sum()), "the tracked token has one row at every position"
    assert five["rank"].tolist() == ranks[five["sample"].tolist(), five["position"].tolist()].tolist()
    vision = frame[(frame.group == "vision") & (frame["rank"] == 1) & (frame.depth == 0) & (frame["sample"] == 1)]
    assert vision[["row", "column"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert frame[frame.group != "vision"].row.isna().all()

    table = lens.table(WordTokenizer(), sample=1)
    assert table.index.tolist() == [0, 1, 2, 3]
    assert table.columns.tolist() == inputs["attention_mask"][1].nonzero().flatten().tolist()
    position = table.columns[3]
    assert table.loc[LAYERS, position] == f"w{int(logprobs[1, position].argmax())}"
    with pytest.raises(ValueError, match="no position of sample 2"):
        lens.table(WordTokenizer(), sample=2)


def test_logit_lens_frame_without_places_has_missing_rows(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("right")
    tokens = TokenMap.from_inputs(model, inputs)
    tokens = TokenMap(tokens.labels, tokens.groups)
    with torch.no_grad(), logit_lens(model, tokens, at="vision", depths=[1]) as lens:
        model(**inputs)
    assert lens.frame(WordTokenizer()).row.isna().all()


def test_logit_lens_exception_leaves_no_hook(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    with pytest.raises(KeyError, match="from inside"), logit_lens(model, tokens):
        raise KeyError("from inside")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_logit_lens_invalid_use_raises(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    for arguments, message in (
        ({"depths": [0, 4]}, r"depths \[4\] are outside the model.* 0 \(embeddings\) to 3"),
        ({"at": "question"}, "unknown group 'question'"),
        ({"at": "response"}, "no position to read: the map has none of 'response'"),
        ({"at": torch.ones(1, 2, dtype=torch.bool)}, r"shape \[1, 2\].*\[3, 13\]"),
        ({"at": torch.ones(3, 13, dtype=torch.long)}, r"torch.int64 of shape \[3, 13\]"),
        ({"top": 65}, "do not fit a vocabulary of 64 tokens"),
        ({"track": [64]}, "do not fit a vocabulary of 64 tokens"),
    ):
        with pytest.raises(ValueError, match=message), logit_lens(model, tokens, **arguments):
            pass
    for arguments, message in (
        ({"depths": 1}, "^depths: 1 "),
        ({"depths": [1.5]}, r"^depths: 1\.5 "),
        ({"track": 5}, "^track: 5 "),
        ({"track": ["red"]}, "^track: 'red' "),
    ):
        with pytest.raises(TypeError, match=message), logit_lens(model, tokens, **arguments):
            pass
    with torch.no_grad(), pytest.raises(ValueError, match="return_dict is False"), logit_lens(model, tokens):
        model(**inputs, return_dict=False)
    with pytest.raises(ValueError, match=r"map.*prefusion"):
        logit_lens(model, replace(tokens, stack="prefusion")).__enter__()
    with pytest.raises(ValueError, match="has no head"), logit_lens(model.model, tokens):
        pass
    with logit_lens(model, tokens) as lens:
        pass
    with pytest.raises(RuntimeError, match="no complete forward pass"):
        _ = lens.ids
    with torch.no_grad(), logit_lens(model, tokens):
        model(**inputs)
        with pytest.raises(RuntimeError, match="a second prompt"):
            model(**inputs)


def test_logit_lens_layer_with_fewer_positions_raises(make_llama, make_rows):
    """If a layer gets fewer positions than the call, their indices no longer match the map."""
    model, inputs = make_llama(), make_rows([(3, 4, 5)], "left")
    tokens = TokenMap.from_inputs(model, inputs)
    handle = model.model.layers[-1].register_forward_hook(lambda module, args, output: output[:, 4:])
    try:
        with torch.no_grad(), pytest.raises(ValueError, match="tokens were dropped"), logit_lens(model, tokens):
            model(inputs["input_ids"])
    finally:
        handle.remove()


@torch.no_grad()
def test_logit_lens_of_call_that_keeps_some_logits_reads_all_positions(make_llava, make_inputs) -> None:
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    with logit_lens(model, tokens) as expected:
        model(**inputs)
    for kept in (1, torch.tensor([3, 5])):
        with logit_lens(model, tokens) as lens:
            model(**inputs, logits_to_keep=kept)
        assert torch.equal(lens.ids, expected.ids)
