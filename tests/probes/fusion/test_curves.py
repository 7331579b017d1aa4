from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from probes.fusion.curves import attention_curve, knockout_curve, removal_curve, removal_scores, text_states
from probes.hooks.decoder import decoder_layers, find_decoder
from probes.hooks.partial_call import can_cut
from probes.interventions import BlockAttention, RemoveTokens, intervene
from probes.tokens.token_map import TokenMap

LAYERS = 3
Make = Callable[..., Any]


def last(logits: torch.Tensor) -> torch.Tensor:
    """Some score of the last position."""
    return logits[:, -1].log_softmax(-1)[:, 5]


@pytest.fixture
def batch(make_llava: Make, make_inputs: Make) -> tuple[Any, TokenMap, dict[str, torch.Tensor]]:
    """A picture in the middle, one at the start, none; left-padded."""
    model, inputs = make_llava("sdpa"), make_inputs("left")
    return model, TokenMap.from_inputs(model, inputs), inputs


class ByHand:
    """The same model run layer by layer in eager attention, with an additive mask of its own for every layer."""

    def __init__(self, make_llava: Make, inputs: dict[str, torch.Tensor]) -> None:
        self.model = make_llava("eager")
        self.inputs = inputs
        real = inputs["attention_mask"].bool()
        length = real.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, :]
        self.visible = visible | torch.eye(length, dtype=torch.bool)  # padding sees itself, nobody looks
        self.vision = inputs["input_ids"] == 63
        self.text = real & ~self.vision

    @torch.no_grad()
    def __call__(self, hidden_edges: dict[int, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor], list[Any]]:
        """Logits, states after 0, 1, ... layers and attention; `hidden_edges[layer]` `[batch, queries, keys]`."""
        language = self.model.model.language_model
        embeddings = self.model.get_input_embeddings()(self.inputs["input_ids"])
        features = self.model.model.get_image_features(self.inputs["pixel_values"]).pooler_output
        embeddings[self.vision] = torch.cat(list(features))
        states, weights = [embeddings], []
        rotary = language.rotary_emb(embeddings, torch.arange(embeddings.shape[1])[None])
        for number, layer in enumerate(language.layers):
            seen = self.visible & ~hidden_edges.get(number, torch.zeros_like(self.visible))
            mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
            normed = layer.input_layernorm(states[-1])
            attended, attention = layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)
            middle = states[-1] + attended
            states.append(middle + layer.mlp(layer.post_attention_layernorm(middle)))
            weights.append(attention)
        return self.model.lm_head(language.norm(states[-1])), states, weights


def test_the_hand_run_is_the_model(batch: Any, make_llava: Make) -> None:
    model, _, inputs = batch
    logits, _, _ = ByHand(make_llava, inputs)({})
    assert last(model(**inputs).logits).detach() == pytest.approx(last(logits), abs=1e-4)


def test_attention_curve(batch: Any, make_llava: Make) -> None:
    model, tokens, inputs = batch
    hand = ByHand(make_llava, inputs)
    _, _, weights = hand({})
    queries = tokens.mask("instruction") & (tokens.mask("vision").cumsum(1) > 0)
    curve = attention_curve(model, tokens, inputs)
    assert curve.shape == (LAYERS, 3)
    for layer in range(LAYERS):
        mass = (weights[layer].mean(1) * hand.vision[:, None]).sum(-1)
        for sample in (0, 1):
            assert curve[layer, sample] == pytest.approx(float(mass[sample, queries[sample]].mean()), abs=1e-5)
    assert np.isnan(curve[:, 2]).all(), "no picture"


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_knockout_curve(batch: Any, make_llava: Make, width: int) -> None:
    """Windows by hand: text queries do not see visual keys; visual queries do."""
    model, tokens, inputs = batch
    hand = ByHand(make_llava, inputs)
    cut = hand.text[:, :, None] & hand.vision[:, None, :]
    windows = [range(max(end - width + 1, 0), min(end + 1, LAYERS)) for end in range(LAYERS + width - 1)]
    expected = [last(hand(dict.fromkeys(window, cut))[0]) for window in ([], *windows)]
    curve = knockout_curve(model, tokens, inputs, last, width)
    assert curve.shape == (LAYERS + width, 3)
    assert curve == pytest.approx(torch.stack(expected).numpy(), abs=1e-4)
    assert (abs(curve[1:, :2] - curve[0, :2]) > 1e-4).all(), "every window matters to this model"
    assert curve[:, 2] == pytest.approx(curve[0, 2], abs=1e-5), "no picture, nothing to lose"


def test_windows_run_on_the_text_behind_the_picture(batch: Any) -> None:
    model, tokens, inputs = batch
    layers = decoder_layers(find_decoder(model))
    ran: list[int] = []
    with contextlib.ExitStack() as stack:
        for layer in layers:
            hook = layer.mlp.register_forward_hook(lambda _, args, output: ran.append(output.shape[1]))
            stack.callback(hook.remove)
        knockout_curve(model, tokens, inputs, last)
    behind = tokens.mask("instruction") & (tokens.mask("vision").cumsum(1) > 0)
    assert ran == LAYERS * [inputs["input_ids"].shape[1]] + (3 + 2 + 1) * [int(behind.sum(1).max())]


def test_windows_hold_each_layer_as_often(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, inputs = batch
    for width in (1, 2, 3, 5):
        seen: list[int] = []

        def note(model: Any, tokens: Any, block: Any, seen: list[int] = seen) -> Any:
            seen.extend(block.layers)
            return contextlib.nullcontext()

        monkeypatch.setattr("probes.fusion.curves.intervene", note)
        knockout_curve(model, tokens, inputs, last, width)
        assert [seen.count(layer) for layer in range(LAYERS)] == [width] * LAYERS


def test_supervised_answers_are_cut_off_too(batch: Any, make_llava: Make) -> None:
    model, _, inputs = batch
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    tokens = TokenMap.from_inputs(model, inputs | {"labels": labels})
    assert tokens.mask("response").any()
    hand = ByHand(make_llava, inputs)
    cut = hand.text[:, :, None] & hand.vision[:, None, :]
    expected = last(hand(dict.fromkeys(range(LAYERS), cut))[0])
    merged = tokens.merge({"instruction": ["system", "instruction"]})
    for labelled in (tokens, merged):
        assert knockout_curve(model, labelled, inputs, last, LAYERS)[LAYERS] == pytest.approx(
            expected.numpy(), abs=1e-4
        )


def test_removal_curve(batch: Any, make_llava: Make) -> None:
    """By hand: text sees no visual key from layer k on; what visual positions do there no longer counts."""
    model, tokens, inputs = batch
    hand = ByHand(make_llava, inputs)
    cut = hand.text[:, :, None] & hand.vision[:, None, :]
    expected = [last(hand(dict.fromkeys(range(k, LAYERS), cut))[0]) for k in range(LAYERS + 1)]
    curve = removal_curve(model, tokens, inputs, last)
    assert curve == pytest.approx(torch.stack(expected).numpy(), abs=1e-4)
    assert removal_curve(model, tokens, inputs, last, starts=[0, 2, 3]) == pytest.approx(curve[[0, 2, 3]], abs=1e-6)


@torch.no_grad()
def test_removal_scores_share_what_they_can(batch: Any) -> None:
    """One intact run, layers ahead of a span once for all, spans that are alike once, and text alone inside."""
    model, tokens, inputs = batch
    layers = decoder_layers(find_decoder(model))
    spans = [range(1), range(2, 3), range(3), range(2, 3), range(3, 3)]
    expected = []
    for span in spans:
        with intervene(model, tokens, RemoveTokens("vision", span)):
            expected.append(last(model(**inputs).logits))
    ran: list[tuple[int, int]] = []
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers):

            def note(mlp: Any, args: Any, output: Any, number: int = number) -> None:
                ran.append((number, output.shape[1]))

            stack.callback(layer.mlp.register_forward_hook(note).remove)
        scores = removal_scores(model, tokens, inputs, last, spans)
    assert scores == pytest.approx(torch.stack(expected).numpy(), abs=1e-5)
    whole, text = inputs["input_ids"].shape[1], int((~tokens.mask("vision") & ~tokens.mask("pad")).sum(1).max())
    assert sorted(ran[:3]) == [(0, whole), (1, whole), (2, whole)]
    assert ran[3:4] == [(2, text)]
    assert sorted(ran[4:]) == sorted([(0, text), (1, whole), (2, whole), (0, text), (1, text), (2, text)])


def test_layers_that_are_told_more_by_token_are_not_cut(make_llava: Make) -> None:
    """As Gemma 3n's, which add embeddings of their own: what would be left of those is not known."""

    class Layer(LlamaDecoderLayer):
        def forward(self, hidden_states: Any, position_embeddings: Any, per_layer_input: Any, **kwargs: Any) -> Any:
            return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs) + per_layer_input

    decoder = find_decoder(make_llava())
    assert can_cut(decoder)
    decoder.layers[1] = Layer(decoder.config, 1)
    assert not can_cut(decoder)


@torch.no_grad()
def test_layers_that_count_positions_themselves_run_whole() -> None:
    """OPT's, whose positions are added to the embeddings, are not told them: tokens are hidden then."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "init_std": 0.2}
    model = OPTForCausalLM(OPTConfig(vocab_size=64, word_embed_proj_dim=32, image_token_id=63, **sizes)).eval()
    inputs = {"input_ids": torch.tensor([[1, 63, 63, 4, 5], [3, 63, 63, 7, 8]])}
    tokens = TokenMap.from_inputs(model, inputs)
    expected = []
    for start in range(LAYERS + 1):
        with intervene(model, tokens, RemoveTokens("vision", range(start, LAYERS))):
            expected.append(last(model(**inputs).logits))
    curve = removal_curve(model, tokens, inputs, last)
    assert curve == pytest.approx(torch.stack(expected).numpy(), abs=1e-6)
    assert (abs(curve[0] - curve[LAYERS]) > 1e-4).all()
    with intervene(model, tokens, BlockAttention("vision", "instruction", [1])):
        blocked = last(model(**inputs).logits)
    assert knockout_curve(model, tokens, inputs, last)[2] == pytest.approx(blocked.numpy(), abs=1e-6)


def test_text_states(batch: Any, make_llava: Make) -> None:
    model, tokens, inputs = batch
    _, states, _ = ByHand(make_llava, inputs)({})
    found = text_states(model, tokens, inputs)
    assert found.shape == (LAYERS + 1, 3, 32)
    for sample, start in ((0, 3 + 4), (1, 4)):  # after the picture
        padding = int((inputs["attention_mask"][sample] == 0).sum())
        for layer in range(LAYERS + 1):
            expected = states[layer][sample, padding + start :].mean(0)
            assert found[layer, sample] == pytest.approx(expected, abs=1e-4)
    assert found[:, 2].isnan().all(), "no picture"


def test_batches_of_one_give_the_same(make_llava: Make, make_rows: Make) -> None:
    model = make_llava("sdpa")
    inputs = make_rows([(3, 4, 6), (1, 4, 9)], "left")
    measures = [
        attention_curve,
        lambda m, t, i: removal_curve(m, t, i, last),
        lambda m, t, i: knockout_curve(m, t, i, last, 2),
        lambda m, t, i: text_states(m, t, i).flatten(2)[..., 0].numpy(),
    ]
    for measure in measures:
        together = measure(model, TokenMap.from_inputs(model, inputs), inputs)
        for row in range(2):
            real = inputs["attention_mask"][row].bool()
            alone = {
                "input_ids": inputs["input_ids"][row : row + 1, real],
                "pixel_values": inputs["pixel_values"][row : row + 1],
            }
            single = measure(model, TokenMap.from_inputs(model, alone), alone)
            assert single[:, 0] == pytest.approx(together[:, row], abs=1e-4)


def test_the_model_is_left_as_it_was(batch: Any) -> None:
    model, tokens, inputs = batch
    before = model(**inputs).logits
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    def fail(logits: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    for measure in (removal_curve, knockout_curve):
        with pytest.raises(ZeroDivisionError):
            measure(model, tokens, inputs, fail)
    with pytest.raises(ValueError, match="the token map has 3 x"):
        text_states(model, tokens, {name: tensor[:1] for name, tensor in inputs.items()})
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(model(**inputs).logits, before)


def test_errors(batch: Any) -> None:
    model, tokens, inputs = batch
    with pytest.raises(ValueError, match=r"starts \[-1, 4\] are outside the model: it has 3 layers, so 0 to 3"):
        removal_curve(model, tokens, inputs, last, starts=[-1, 0, 4])
    with pytest.raises(ValueError, match="width is 0"):
        knockout_curve(model, tokens, inputs, last, 0)
    with pytest.raises(ValueError, match="unknown group 'question'"):
        attention_curve(model, tokens, inputs, "question")
    with pytest.raises(ValueError, match="unknown group 'question'"):
        text_states(model, tokens, inputs, "question")
