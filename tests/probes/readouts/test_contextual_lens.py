"""The contextual lens against a loop over cosine similarities, and on planted states."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from probes import contextual_lens
from probes.readouts import contextual_lens as module
from probes.readouts.contextual_lens import ContextualLens, language_model_fingerprint, shipped_captions
from tests.tiny_models import LAYERS, tiny_llama, tiny_llava

CORPUS = ["a red ring", "a red cross stands alone", "two blue rings", "a blue cross", "a red ring"]
WORDS = ["[pad]", *sorted({word for text in CORPUS for word in text.split()} - {"rings"}), "##s", "alone"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per word, but two for "rings"."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(WORDS))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[pad]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[pad]")


def cosine(a: list[float], b: list[float]) -> float:
    """Return the cosine similarity of two vectors, from the textbook formula."""
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@torch.no_grad()
def states_of_words(model: LlamaForCausalLM) -> dict[tuple[str, str, int], list[float]]:
    """Return the state of each word by word, sentence and depth, each sentence run alone."""
    tokenizer, found, prefixes = word_tokenizer(), {}, set()
    for text in CORPUS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        states = list(model(ids, output_hidden_states=True).hidden_states[1:])
        inner = model.model.layers[-1]
        kept = []
        handle = inner.register_forward_hook(lambda layer, args, output, kept=kept: kept.append(output))
        model(ids)
        handle.remove()
        states[-1] = kept[0]  # transformers applies the final norm to the last one
        position = -1
        for word in text.split():
            position += len(tokenizer.tokenize(word))
            prefix = tuple(ids[0, : position + 1].tolist())
            if position and prefix not in prefixes:
                for depth, state in enumerate(states, 1):
                    found[word, text, depth] = state[0, position].tolist()
            prefixes.add(prefix)
    return found


@pytest.mark.parametrize("depths", [None, [2]])
def test_read_equals_a_loop_over_cosine_similarities(depths: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIMILARITIES_PER_CHUNK", 20)
    model = tiny_llama()
    lens = contextual_lens(model, word_tokenizer(), CORPUS, batch_size=2)
    queries = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    nearest = lens.read(queries, top=4, depths=depths)
    reference = {key: state for key, state in states_of_words(model).items() if depths is None or key[2] in depths}
    assert {(w, t) for w, t in zip(lens.words, lens.texts, strict=True)} == {(w, t) for w, t, _ in reference}
    frame = nearest.frame()
    for row, query in enumerate(queries.tolist()):
        similarities = sorted(((cosine(query, state), key) for key, state in reference.items()), reverse=True)[:4]
        assert nearest.similarity[row].tolist() == pytest.approx([value for value, _ in similarities], abs=1e-3)
        found = frame[frame["state"] == row]
        gaps = [a[0] - b[0] for a, b in itertools.pairwise(similarities)]
        if min(gaps) > 2e-3:  # float16 cannot order states that are nearly equally similar
            assert list(zip(found["word"], found["text"], found["depth"], strict=True)) == [k for _, k in similarities]
    assert list(frame["rank"][:4]) == [1, 2, 3, 4]


def test_contextual_lens_keeps_the_last_token_of_a_word_and_each_prefix_once() -> None:
    lens = contextual_lens(tiny_llama(), word_tokenizer(), CORPUS)
    assert list(zip(lens.words, lens.texts, strict=True)) == [
        ("red", "a red ring"),
        ("ring", "a red ring"),
        ("blue", "a blue cross"),
        ("cross", "a blue cross"),
        ("blue", "two blue rings"),
        ("rings", "two blue rings"),
        ("cross", "a red cross stands alone"),
        ("stands", "a red cross stands alone"),
        ("alone", "a red cross stands alone"),
    ]
    assert lens.states.shape == (LAYERS, 9, 32)
    assert torch.allclose(lens.states.float().norm(dim=-1), torch.ones(LAYERS, 9), atol=1e-3)


def test_read_names_copies_of_word_states_with_noise_by_their_words() -> None:
    """Visual states that are planted copies of words' states, of any length, have these words as nearest."""
    model = tiny_llama()
    lens = contextual_lens(model, word_tokenizer(), CORPUS)
    reference = states_of_words(model)
    generator = torch.Generator().manual_seed(0)
    for (word, text, depth), state in reference.items():
        copy = 7 * torch.tensor([state])
        copy += 0.01 * copy.norm() / 32**0.5 * torch.randn(1, 32, generator=generator)
        nearest = lens.read(copy, top=1)
        assert (nearest.words, lens.texts[nearest.entry[0, 0]]) == ([[word]], text)
        assert nearest.depth.item() == depth


def test_save_and_load_give_the_same_lens_and_refuse_other_weights(tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "lens.safetensors"
    lens = contextual_lens(model, word_tokenizer(), CORPUS, depths=[3, 1])
    lens.save(path)
    loaded = ContextualLens.load(path, model)
    assert (loaded.words, loaded.texts, loaded.depths) == (lens.words, lens.texts, (1, 3))
    assert torch.equal(loaded.states, lens.states)
    assert loaded.fingerprint == lens.fingerprint == language_model_fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=rf"lens.safetensors.*{lens.fingerprint}.*{language_model_fingerprint(model)}"):
        ContextualLens.load(path, model)
    save_file({"states": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: holds no contextual lens"):
        ContextualLens.load(tmp_path / "other.safetensors", model)


def test_language_model_fingerprint_does_not_depend_on_the_vision_tower() -> None:
    model: LlavaForConditionalGeneration = tiny_llava()
    before = language_model_fingerprint(model)
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).add_(1)
    assert language_model_fingerprint(model) == before


def test_read_with_bad_arguments_names_them() -> None:
    lens = contextual_lens(tiny_llama(), word_tokenizer(), CORPUS, depths=[1, 2])
    states = torch.ones(3, 32)
    with pytest.raises(ValueError, match=r"shape \[3, 31\]"):
        lens.read(states[:, :31])
    with pytest.raises(ValueError, match="depths: 3 is not in the lens, which has 1, 2"):
        lens.read(states, depths=[3])
    for top in (0, 19):
        with pytest.raises(ValueError, match=f"top is {top}: it must be 1 to 18"):
            lens.read(states, top=top)
    states[1, 0] = torch.nan
    with pytest.raises(ValueError, match="row 1 is not finite"):
        lens.read(states)
    assert lens.read(states[:0]).words == []


def test_contextual_lens_with_bad_arguments_names_them() -> None:
    model = tiny_llama()
    for depths in ([0], [4], []):
        with pytest.raises(ValueError, match=r"depths: .* must be 1 to 3"):
            contextual_lens(model, word_tokenizer(), CORPUS, depths=depths)
    with pytest.raises(TypeError, match=r"^depths: 1 "):
        contextual_lens(model, word_tokenizer(), CORPUS, depths=1)
    with pytest.raises(TypeError, match=r"^corpus: .* str"):
        contextual_lens(model, word_tokenizer(), "the red ring")
    with pytest.raises(ValueError, match="corpus: 2 texts hold no word"):
        contextual_lens(model, word_tokenizer(), ["a", "two"])
    with pytest.raises(ValueError, match=r"tokenizer: object"):
        contextual_lens(model, object(), CORPUS)


def test_shipped_captions_are_short_and_differ() -> None:
    captions = shipped_captions()
    assert len(set(captions)) == len(captions) > 200
    assert all(3 <= len(caption.split()) <= 14 for caption in captions)
