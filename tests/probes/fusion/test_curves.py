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
from probes.hooks.partial_call import can_run_subset
from probes.interventions import BlockAttention, RemoveTokens, intervene
from probes.tokens.token_map import TokenMap

LAYERS = 3
Make = Callable[..., Any]


def last_token_score(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of token 5 after the last position."""
    return logits[:, -1].log_softmax(-1)[:, 5]


@pytest.fixture
def batch(make_llava: Make, make_inputs: Make) -> tuple[Any, TokenMap, dict[str, torch.Tensor]]:
    """A left-padded batch: image in the middle, image at the start, no image."""
    model, inputs = make_llava("sdpa"), make_inputs("left")
    return model, TokenMap.from_inputs(model, inputs), inputs


class ReferenceRun:
    """The same model run layer by layer in eager attention, with a separate additive mask for every layer."""

    def __init__(self, make_llava: Make, inputs: dict[str, torch.Tensor]) -> None:
        self.model = make_llava("eager")
        self.inputs = inputs
        real = inputs["attention_mask"].bool()
        length = real.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, :]
        # Padding attends to itself, as a softmax over nothing is NaN; no other token attends to it.
        self.visible = visible | torch.eye(length, dtype=torch.bool)
        self.vision = inputs["input_ids"] == 63
        self.text = real & ~self.vision

    @torch.no_grad()
    def __call__(self, hidden_edges: dict[int, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor], list[Any]]:
        """Return logits, states after 0, 1, ... layers, and attention.

        `hidden_edges[layer]` `[batch, queries, keys]` are the edges to block.
        """
        language = self.model.model.language_model
        embeddings = self.model.get_input_embeddings()(self.inputs["input_ids"])
        features = self.model.model.get_image_features(self.inputs["pixel_values"]).pooler_output
        embeddings[self.vision] = torch.cat(list(features))
        states, weights = [embeddings], []
        rotary = language.rotary_emb(embeddings, torch.arange(embeddings.shape[1])[None])
        for number, layer in enumerate(language.layers):
            visible = self.visible & ~hidden_edges.get(number, torch.zeros_like(self.visible))
            mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]
            normed = layer.input_layernorm(states[-1])
            attended, attention = layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)
            middle = states[-1] + attended
            states.append(middle + layer.mlp(layer.post_attention_layernorm(middle)))
            weights.append(attention)
        return self.model.lm_head(language.norm(states[-1])), states, weights

    def text_to_vision(self) -> torch.Tensor:
        """Return the edges from text queries to visual keys, `[batch, queries, keys]`."""
        return self.text[:, :, None] & self.vision[:, None, :]


def test_reference_run_without_hidden_edges_equals_model(batch: Any, make_llava: Make) -> None:
    model, _, inputs = batch
    logits, _, _ = ReferenceRun(make_llava, inputs)({})
    assert last_token_score(model(**inputs).logits).detach() == pytest.approx(last_token_score(logits), abs=1e-4)


def test_attention_curve_equals_mean_of_full_attention(batch: Any, make_llava: Make) -> None:
    model, tokens, inputs = batch
    reference = ReferenceRun(make_llava, inputs)
    _, _, weights = reference({})
    queries = tokens.mask("instruction") & (tokens.mask("vision").cumsum(1) > 0)
    curve = attention_curve(model, tokens, inputs)
    assert curve.shape == (LAYERS, 3)
    for layer in range(LAYERS):
        mass = (weights[layer].mean(1) * reference.vision[:, None]).sum(-1)
        for sample in (0, 1):
            assert curve[layer, sample] == pytest.approx(float(mass[sample, queries[sample]].mean()), abs=1e-5)
    assert np.isnan(curve[:, 2]).all(), "sample without an image"


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_knockout_curve_equals_blocked_reference(batch: Any, make_llava: Make, width: int) -> None:
    """In each window text queries do not attend to visual keys; visual queries do."""
    model, tokens, inputs = batch
    reference = ReferenceRun(make_llava, inputs)
    blocked = reference.text_to_vision()
    windows = [range(max(end - width + 1, 0), min(end + 1, LAYERS)) for end in range(LAYERS + width - 1)]
    expected = [last_token_score(reference(dict.fromkeys(window, blocked))[0]) for window in ([], *windows)]
    curve = knockout_curve(model, tokens, inputs, last_token_score, width)
    assert curve.shape == (LAYERS + width, 3)
    assert curve == pytest.approx(torch.stack(expected).numpy(), abs=1e-4)
    assert (abs(curve[1:, :2] - curve[0, :2]) > 1e-4).all(), "every window changes this model's score"
    assert curve[:, 2] == pytest.approx(curve[0, 2], abs=1e-5), "no image, so nothing is lost"


def test_knockout_curve_after_first_call_runs_only_text_after_image(batch: Any) -> None:
    model, tokens, inputs = batch
    layers = decoder_layers(find_decoder(model))
    lengths: list[int] = []
    with contextlib.ExitStack() as stack:
        for layer in layers:
            hook = layer.mlp.register_forward_hook(lambda _, args, output: lengths.append(output.shape[1]))
            stack.callback(hook.remove)
        knockout_curve(model, tokens, inputs, last_token_score)
    text_after_image = tokens.mask("instruction") & (tokens.mask("vision").cumsum(1) > 0)
    whole, subset = inputs["input_ids"].shape[1], int(text_after_image.sum(1).max())
    assert lengths == LAYERS * [whole] + (3 + 2 + 1) * [subset]


def test_knockout_curve_any_width_blocks_each_layer_width_times(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, inputs = batch
    for width in (1, 2, 3, 5):
        blocked: list[int] = []

        def record_block(model: Any, tokens: Any, block: Any, blocked: list[int] = blocked) -> Any:
            blocked.extend(block.layers)
            return contextlib.nullcontext()

        monkeypatch.setattr("probes.fusion.curves.intervene", record_block)
        knockout_curve(model, tokens, inputs, last_token_score, width)
        assert [blocked.count(layer) for layer in range(LAYERS)] == [width] * LAYERS


def test_knockout_curve_with_supervised_response_blocks_response_too(batch: Any, make_llava: Make) -> None:
    model, _, inputs = batch
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    tokens = TokenMap.from_inputs(model, inputs | {"labels": labels})
    assert tokens.mask("response").any()
    reference = ReferenceRun(make_llava, inputs)
    expected = last_token_score(reference(dict.fromkeys(range(LAYERS), reference.text_to_vision()))[0])
    merged = tokens.merge({"instruction": ["system", "instruction"]})
    for token_map in (tokens, merged):
        curve = knockout_curve(model, token_map, inputs, last_token_score, LAYERS)
        assert curve[LAYERS] == pytest.approx(expected.numpy(), abs=1e-4)


def test_removal_curve_equals_blocked_reference(batch: Any, make_llava: Make) -> None:
    """In the reference text attends to no visual key from layer k on, so visual states no longer count there."""
    model, tokens, inputs = batch
    reference = ReferenceRun(make_llava, inputs)
    blocked = reference.text_to_vision()
    expected = [last_token_score(reference(dict.fromkeys(range(k, LAYERS), blocked))[0]) for k in range(LAYERS + 1)]
    curve = removal_curve(model, tokens, inputs, last_token_score)
    assert curve == pytest.approx(torch.stack(expected).numpy(), abs=1e-4)
    some_starts = removal_curve(model, tokens, inputs, last_token_score, starts=[0, 2, 3])
    assert some_starts == pytest.approx(curve[[0, 2, 3]], abs=1e-6)


@torch.no_grad()
def test_removal_scores_of_several_spans_share_layers(batch: Any) -> None:
    """There is one intact run, layers before and inside spans of one start run once, and spans run the text alone."""
    model, tokens, inputs = batch
    layers = decoder_layers(find_decoder(model))
    spans = [range(1), range(2, 3), range(3), range(2, 3), range(3, 3)]
    expected = []
    for span in spans:
        with intervene(model, tokens, RemoveTokens("vision", span)):
            expected.append(last_token_score(model(**inputs).logits))
    runs: list[tuple[int, int]] = []
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers):

            def record_run(mlp: Any, args: Any, output: Any, number: int = number) -> None:
                runs.append((number, output.shape[1]))

            stack.callback(layer.mlp.register_forward_hook(record_run).remove)
        scores = removal_scores(model, tokens, inputs, last_token_score, spans)
    assert scores == pytest.approx(torch.stack(expected).numpy(), abs=1e-5)
    whole, text = inputs["input_ids"].shape[1], int((~tokens.mask("vision") & ~tokens.mask("pad")).sum(1).max())
    assert sorted(runs[:3]) == [(0, whole), (1, whole), (2, whole)]
    assert runs[3:4] == [(2, text)]
    assert sorted(runs[4:]) == sorted([(0, text), (1, text), (2, text), (1, whole), (2, whole)])


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.DataParallel], ids=["plain", "wrapped"])
def test_curves_of_one_batch_encode_its_images_once(batch: Any, wrap: Callable[[Any], Any]) -> None:
    model, tokens, inputs = batch
    runs: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.callback(model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1)).remove)
        removal_scores(wrap(model), tokens, inputs, last_token_score, [range(1), range(2, 3), range(3)])
        assert len(runs) == 1
        knockout_curve(wrap(model), tokens, inputs, last_token_score)
        assert len(runs) == 2


def test_can_run_subset_with_extra_per_token_input_is_false(make_llava: Make) -> None:
    """Gemma 3n's layers add embeddings of their own for each token; a subset of these cannot be selected."""

    class Layer(LlamaDecoderLayer):
        def forward(self, hidden_states: Any, position_embeddings: Any, per_layer_input: Any, **kwargs: Any) -> Any:
            return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs) + per_layer_input

    decoder = find_decoder(make_llava())
    assert can_run_subset(decoder, length=8)
    decoder.layers[1] = Layer(decoder.config, 1)
    assert not can_run_subset(decoder, length=8)


@torch.no_grad()
def test_curves_of_layers_without_position_input_mask_tokens() -> None:
    """OPT adds positions to the embeddings, so its layers cannot run on a subset of tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "init_std": 0.2}
    model = OPTForCausalLM(OPTConfig(vocab_size=64, word_embed_proj_dim=32, image_token_id=63, **sizes)).eval()
    inputs = {"input_ids": torch.tensor([[1, 63, 63, 4, 5], [3, 63, 63, 7, 8]])}
    tokens = TokenMap.from_inputs(model, inputs)
    expected = []
    for start in range(LAYERS + 1):
        with intervene(model, tokens, RemoveTokens("vision", range(start, LAYERS))):
            expected.append(last_token_score(model(**inputs).logits))
    curve = removal_curve(model, tokens, inputs, last_token_score)
    assert curve == pytest.approx(torch.stack(expected).numpy(), abs=1e-6)
    assert (abs(curve[0] - curve[LAYERS]) > 1e-4).all()
    with intervene(model, tokens, BlockAttention("vision", "instruction", [1])):
        blocked = last_token_score(model(**inputs).logits)
    knockout = knockout_curve(model, tokens, inputs, last_token_score)
    assert knockout[2] == pytest.approx(blocked.numpy(), abs=1e-6)


def test_text_states_equal_mean_of_reference_states(batch: Any, make_llava: Make) -> None:
    model, tokens, inputs = batch
    _, reference_states, _ = ReferenceRun(make_llava, inputs)({})
    states = text_states(model, tokens, inputs)
    assert states.shape == (LAYERS + 1, 3, 32)
    for sample, image_end in ((0, 3 + 4), (1, 4)):
        padding = int((inputs["attention_mask"][sample] == 0).sum())
        for layer in range(LAYERS + 1):
            expected = reference_states[layer][sample, padding + image_end :].mean(0)
            assert states[layer, sample] == pytest.approx(expected, abs=1e-4)
    assert states[:, 2].isnan().all(), "sample without an image"


def test_curves_of_single_samples_equal_those_of_batch(make_llava: Make, make_rows: Make) -> None:
    model = make_llava("sdpa")
    inputs = make_rows([(3, 4, 6), (1, 4, 9)], "left")
    measures = [
        attention_curve,
        lambda m, t, i: removal_curve(m, t, i, last_token_score),
        lambda m, t, i: knockout_curve(m, t, i, last_token_score, 2),
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


def test_curves_after_exception_leave_model_unchanged(batch: Any) -> None:
    model, tokens, inputs = batch
    before = model(**inputs).logits
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    def fail(logits: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    for measure in (removal_curve, knockout_curve):
        with pytest.raises(ZeroDivisionError):
            measure(model, tokens, inputs, fail)
    with pytest.raises(ValueError, match=r"token map.*3 x"):
        text_states(model, tokens, {name: tensor[:1] for name, tensor in inputs.items()})
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(model(**inputs).logits, before)


def test_curves_of_right_answers_read_at_padding_raise_value_error(make_llava: Make, make_rows: Make) -> None:
    """Padding gives every answer as wrong, whatever other logits it has; only the right answer put there shows it."""
    model, inputs = make_llava(), make_rows([(2, 4, 9), (2, 4, 6), (0, 4, 3)], "right")
    tokens, rows = TokenMap.from_inputs(model, inputs), torch.arange(3)
    last = inputs["attention_mask"].sum(1) - 1
    with torch.no_grad():
        answers = model(**inputs).logits[rows, last].argmax(-1)  # all are right

    def read_last_column(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1].argmax(-1) == answers).float()

    def read_answers(logits: torch.Tensor) -> torch.Tensor:
        return (logits[rows, last].argmax(-1) == answers).float()

    for measure in (removal_curve, knockout_curve):
        with pytest.raises(ValueError, match=r"rows \[1, 2\] .* padding"):
            measure(model, tokens, inputs, read_last_column)
        curve = measure(model, tokens, inputs, read_answers)
        assert curve.min() == 0, "some points are wrong, so that right and wrong have both been checked"
        assert curve.max() == 1


def test_curves_of_map_without_pad_group_equal_those_with_one(make_llava: Make, make_rows: Make) -> None:
    model, inputs = make_llava(), make_rows([(2, 4, 6)], "left")
    tokens = TokenMap.from_inputs(model, inputs)
    two_groups = TokenMap(tokens.mask("vision").long(), groups=("text", "vision"), generated="text")
    for measure in (removal_curve, knockout_curve):
        expected = measure(model, tokens, inputs, last_token_score)
        assert measure(model, two_groups, inputs, last_token_score) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("curve", [removal_curve, knockout_curve])
def test_curves_of_map_with_visual_tokens_in_another_group_raise_value_error(batch: Any, curve: Make) -> None:
    """The curve hides the group `vision` alone, so these tokens would be left in."""
    model, tokens, inputs = batch
    some = tokens.mask("vision") & (tokens.mask("vision").cumsum(1) > 1)
    with pytest.raises(ValueError, match=f"{int(some.sum())} visual tokens are in object"):
        curve(model, tokens.relabel({"object": some}), inputs, last_token_score)


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (lambda logits: logits.mean(), ValueError, r"score: .*shape \[\]"),
        (lambda logits: logits[:, -1, :2], ValueError, r"score: .*shape \[3, 2\]"),
        (lambda logits: logits[:, -1, 5].numpy(), TypeError, "score: .*ndarray"),
    ],
)
def test_curves_of_score_without_one_number_a_row_raise(
    batch: Any, score: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        removal_curve(*batch, score)
    with pytest.raises(error, match=message):
        knockout_curve(*batch, score)


def test_curves_in_training_mode_raise_value_error(batch: Any) -> None:
    model, tokens, inputs = batch
    model.train()
    for measure in (attention_curve, text_states):
        with pytest.raises(ValueError, match="training mode"):
            measure(model, tokens, inputs)
    for curve in (removal_curve, knockout_curve):
        with pytest.raises(ValueError, match="training mode"):
            curve(model, tokens, inputs, last_token_score)


def test_curves_with_invalid_arguments_raise_value_error(batch: Any) -> None:
    model, tokens, inputs = batch
    with pytest.raises(ValueError, match=r"starts \[-1, 4\].*3 layers"):
        removal_curve(model, tokens, inputs, last_token_score, starts=[-1, 0, 4])
    with pytest.raises(TypeError, match=r"^starts: 2 "):
        removal_curve(model, tokens, inputs, last_token_score, starts=2)
    with pytest.raises(ValueError, match=r"spans .*range\(0, 3, 2\)"):
        removal_scores(model, tokens, inputs, last_token_score, [range(3), range(0, 3, 2)])
    for width in (0, 1.5):
        with pytest.raises(ValueError, match=f"width is {width}"):
            knockout_curve(model, tokens, inputs, last_token_score, width)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group 'question'"):
        attention_curve(model, tokens, inputs, "question")
    with pytest.raises(ValueError, match="group 'question'"):
        text_states(model, tokens, inputs, "question")
