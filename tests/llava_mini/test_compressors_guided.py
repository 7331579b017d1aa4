"""Test compressors that read the vision tower's attention or the text, against loops over patches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.llava_mini.compress import build, perturb_parameters, random_inputs

ATTENTION_GUIDED = ("prumerge", "prumerge_plus", "visionzip")
GUIDED = (*ATTENTION_GUIDED, "llama_vid")


def prumerge_by_loops(features, saliency, keys, kept, neighbours):
    """Return the saliency-weighted means of each kept patch of one image and its nearest others."""
    tokens = []
    for i in kept:
        cosine = [float(torch.nn.functional.cosine_similarity(keys[i], keys[j], dim=0)) for j in range(len(keys))]
        near = sorted((j for j in range(len(keys)) if j != i), key=lambda j: -cosine[j])[:neighbours]
        total = sum(saliency[j] for j in [i, *near])
        tokens.append(sum(saliency[j] * features[j] for j in [i, *near]) / total)
    return torch.stack(tokens)


def most_salient(saliency, count):
    """Return the indices of the highest saliencies, in ascending order."""
    return sorted(sorted(range(len(saliency)), key=lambda i: -float(saliency[i]))[:count])


def salient_and_spaced(saliency, count):
    """Return the patches that PruMerge+ keeps: half by saliency, the others evenly spaced."""
    spaced = count // 2
    kept = most_salient(saliency, count - spaced)
    remaining = [i for i in range(len(saliency)) if i not in kept]
    return sorted(kept + [remaining[math.floor((i + 0.5) * len(remaining) / spaced)] for i in range(spaced)])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("name", "choose"), [("prumerge", most_salient), ("prumerge_plus", salient_and_spaced)])
def test_prumerge_equals_loops(name, choose, size):
    compressor = build(name, size)
    arguments = random_inputs(compressor)
    tokens, weights = compressor(**arguments)
    for image in range(3):
        features, saliency, keys = (arguments[key][image] for key in ("features", "saliency", "keys"))
        kept = choose(saliency, size**2)
        expected = prumerge_by_loops(features, saliency, keys, kept, neighbours=2)  # 32 of 576 are 2 of 36
        torch.testing.assert_close(tokens[image], expected)
        assert (weights[image] > 0).sum(dim=1).tolist() == [3] * size**2
    torch.testing.assert_close(weights @ arguments["features"], tokens)


def test_prumerge_of_576_patches_merges_32_neighbours():
    compressor = build("prumerge", 2)
    features, saliency, keys = torch.randn(1, 576, 32), torch.rand(1, 576), torch.randn(1, 576, 32)
    weights = compressor(features, saliency=saliency, keys=keys)[1]
    assert (weights > 0).sum(dim=-1).tolist() == [[33] * 4]


def test_prumerge_equal_keys_keep_own_patch():
    """Each token holds its own patch, and no patch twice, although every cosine is one."""
    compressor = build("prumerge", 3)
    saliency = torch.arange(36.0)[None] + 1
    weights = compressor(torch.randn(1, 36, 32), saliency=saliency, keys=torch.ones(1, 36, 32))[1][0]
    assert (weights > 0).sum(dim=1).tolist() == [3] * 9
    assert (weights[range(9), range(27, 36)] > 0).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_visionzip_equals_loops(size):
    compressor = build("visionzip", size)
    arguments = random_inputs(compressor)
    tokens, weights = compressor(**arguments)
    contextual = {1: 0, 2: 1, 3: 1, 4: 2, 6: 6}[size]  # 10 of 64; 2.5 and 5.625 for 16 and 36
    for image in range(3):
        features, saliency, keys = (arguments[key][image] for key in ("features", "saliency", "keys"))
        dominant = most_salient(saliency, size**2 - contextual)
        expected = [features[i] for i in dominant]
        remaining = [i for i in range(36) if i not in dominant]
        targets = [remaining[i * (len(remaining) // contextual)] for i in range(contextual)]
        groups = {target: [features[target]] for target in targets}
        mean_keys = (keys[:, :16] + keys[:, 16:]) / 2  # two heads
        for i in remaining:
            if contextual and i not in targets:
                cosine = torch.nn.functional.cosine_similarity(mean_keys[i], mean_keys[targets], dim=1)
                groups[targets[int(cosine.argmax())]].append(features[i])
        expected += [torch.stack(group).mean(dim=0) for group in groups.values()]
        torch.testing.assert_close(tokens[image], torch.stack(expected))
    torch.testing.assert_close(weights @ arguments["features"], tokens)


@pytest.mark.parametrize(("size", "dominant"), [(8, 54), (12, 122)])
def test_visionzip_splits_dominant_and_contextual_tokens_as_published(size, dominant):
    """54 of 64 tokens are dominant, as published; the others hold every remaining patch once."""
    compressor = build("visionzip", size)
    weights = compressor(torch.randn(1, 576, 32), saliency=torch.rand(1, 576), keys=torch.randn(1, 576, 32))[1][0]
    members = weights > 0
    assert members.sum(dim=0).tolist() == [1] * 576
    assert members[:dominant].sum(dim=1).tolist() == [1] * dominant
    assert int(members[dominant:].sum()) == 576 - dominant


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 6), levels=st.integers(1, 40), seed=st.integers(0, 99), name=st.sampled_from(ATTENTION_GUIDED)
)
def test_compressor_tied_saliency_and_keys_gives_valid_tokens(size, levels, seed, name):
    """Ties must not change the number of tokens, keep a patch twice, or break the sum of the weights."""
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.randint(levels, (2, 36), generator=generator) / levels  # some are zero
    keys = torch.randint(-1, 2, (2, 36, 32), generator=generator).float()  # some keys have length zero
    features = torch.randn(2, 36, 32, generator=generator)
    tokens, weights = build(name, size)(features, saliency=saliency, keys=keys)
    assert tokens.shape == (2, size**2, 32)
    assert tokens.isfinite().all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, size**2))
    assert all(len(rows.unique(dim=0)) == size**2 for rows in weights) or "prumerge" in name


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 6), seed=st.integers(0, 99))
def test_prumerge_plus_kept_patches_are_distinct_and_sorted(size, seed):
    saliency = torch.randint(4, (3, 36), generator=torch.Generator().manual_seed(seed)).float()
    kept = build("prumerge_plus", size).kept_patches(saliency)
    assert all(len(set(indices)) == size**2 for indices in kept.tolist())
    assert torch.equal(kept, kept.sort(dim=1).values)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("prumerge", [[0, 1], [0, 3], [0, 4], [0, 7]]),
        ("prumerge_plus", [[0, 1], [0, 4], [0, 6], [0, 7]]),
        ("visionzip", [[3], [4], [7], [0, 1, 2, 5, 6, 8]]),
    ],
)
def test_compressor_equal_similarity_merges_first_patches(name, groups):
    """Of patches that are equally similar, the first is merged."""
    saliency = torch.tensor([[0.1, 0.5, 0.0, 0.6, 0.9, 0.2, 0.3, 0.7, 0.4]])
    keys = torch.eye(9, 16)[None].repeat(1, 1, 2)  # two equal heads; all patches are orthogonal
    tokens, weights = build(name)(torch.eye(9, 32)[None], saliency=saliency, keys=keys)
    assert torch.equal(tokens[0, :, :9], weights[0])
    assert [row.nonzero().flatten().tolist() for row in weights[0]] == groups


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_llama_vid_equals_loops(size):
    compressor = perturb_parameters(build("llama_vid", size))
    arguments = random_inputs(compressor) | {"text_mask": torch.arange(5) <= torch.arange(3)[:, None]}
    tokens, weights = compressor(**arguments)
    for image in range(3):
        features = arguments["features"][image]
        maps = []
        for embedding, is_text in zip(arguments["text"][image], arguments["text_mask"][image], strict=True):
            if is_text:
                query = compressor.text.weight @ embedding + compressor.text.bias
                scores = torch.stack([query @ (compressor.key.weight @ patch) for patch in features]) / 32**0.5
                maps.append(scores.exp() / scores.exp().sum())
        attention = torch.stack(maps).mean(dim=0)
        context = compressor.value.weight @ (attention @ features) + compressor.value.bias
        torch.testing.assert_close(tokens[image, 0], context)
        torch.testing.assert_close(weights[image, 0], attention)
    grid = arguments["features"].transpose(1, 2).unflatten(2, (6, 6))
    pooled = torch.nn.functional.adaptive_avg_pool2d(grid, (size - 1, size + 1)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[:, 1:], pooled)


def test_llama_vid_masked_text_is_ignored():
    """Masked embeddings and their number have no effect; without text the context token is the mean."""
    compressor = perturb_parameters(build("llama_vid"))
    arguments = random_inputs(compressor)
    tokens = compressor(**arguments)[0]
    noise = torch.where(arguments["text_mask"][..., None], arguments["text"], 1e3 * torch.randn_like(arguments["text"]))
    assert torch.equal(compressor(**arguments | {"text": noise})[0], tokens)
    padded = {
        "text": torch.nn.functional.pad(noise, (0, 0, 0, 4)),
        "text_mask": torch.nn.functional.pad(arguments["text_mask"], (0, 4)),
    }
    torch.testing.assert_close(compressor(**arguments | padded)[0], tokens)
    for empty in (
        {"text_mask": torch.zeros(3, 5, dtype=torch.bool)},
        {"text": arguments["text"][:, :0], "text_mask": torch.zeros(3, 0, dtype=torch.bool)},
    ):
        tokens, weights = compressor(**arguments | empty)
        torch.testing.assert_close(weights[:, 0], torch.full((3, 36), 1 / 36))
        torch.testing.assert_close(tokens[:, 0], compressor.value(arguments["features"].mean(dim=1)))


@pytest.mark.parametrize("name", GUIDED)
def test_compressor_more_tokens_than_patches_raises(name):
    compressor = build(name, 7)
    with pytest.raises(ValueError, match="compressor_size=7 exceeds the 6 x 6 grid"):
        compressor(**random_inputs(compressor))


@torch.no_grad()
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("name", ["prumerge", "visionzip"])
def test_model_saliency_comes_from_vision_tower_attention(tiny_mini, sample, vision, name):
    """Compression precedes the projector and uses the selected layer.

    The expected saliency is the class token's row of eager attention, or the mean row where there is no class token.
    """
    model = tiny_mini(vision=vision, compressor=name, compressor_size=1, prefusion_layers=0, attention="sdpa")
    ids, pixels = sample(1, 5)
    tokens = model(input_ids=ids[None], pixel_values=pixels[None]).image_hidden_states
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    out = tower(pixels[None], output_hidden_states=True, output_attentions=True)
    attention = out.attentions[-2][0].mean(dim=0)
    features = out.hidden_states[-2][0]
    if vision != "siglip":
        attention, features = attention[:1, 1:], features[1:]
    saliency = attention.mean(dim=0)
    token = features[saliency.argmax()]
    if name == "prumerge":
        neighbours = (
            model.model.compressor(
                features[None], saliency=saliency[None], keys=model.model.look_at(pixels[None]).keys
            )[1][0, 0]
            .nonzero()
            .flatten()
        )
        assert saliency.argmax() in neighbours
        token = (saliency[neighbours, None] * features[neighbours]).sum(dim=0) / saliency[neighbours].sum()
    torch.testing.assert_close(tokens[0], model.model.multi_modal_projector(token))


def test_llama_vid_other_question_changes_context_token_only(tiny_mini, sample):
    model = tiny_mini(compressor="llama_vid", prefusion_layers=0)
    ids, pixels = sample(4, 5)
    other = torch.where(ids == ids[-1], 50, ids)
    tokens = [model(input_ids=x[None], pixel_values=pixels[None]).image_hidden_states for x in (ids, other)]
    changed = (tokens[0] - tokens[1]).abs().amax(dim=1) > 0
    assert changed.tolist() == [True, False, False, False]
