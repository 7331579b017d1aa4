"""Compressors that look at the tower's attention or at the text, each against loops over patches by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.llava_mini.compress import build, inputs, shake

CHOOSERS = ("prumerge", "prumerge_plus", "visionzip")
SEEN = (*CHOOSERS, "llama_vid")


def prumerge_by_hand(features, saliency, keys, kept, neighbours):
    """One picture: each kept patch and its nearest others, the saliency-weighted mean."""
    tokens = []
    for i in kept:
        cosine = [float(torch.nn.functional.cosine_similarity(keys[i], keys[j], dim=0)) for j in range(len(keys))]
        near = sorted((j for j in range(len(keys)) if j != i), key=lambda j: -cosine[j])[:neighbours]
        total = sum(saliency[j] for j in [i, *near])
        tokens.append(sum(saliency[j] * features[j] for j in [i, *near]) / total)
    return torch.stack(tokens)


def highest(saliency, count):
    return sorted(sorted(range(len(saliency)), key=lambda i: -float(saliency[i]))[:count])


def evenly(saliency, count):
    """PruMerge+: half by saliency, the rest spaced over what is left."""
    spaced = count // 2
    kept = highest(saliency, count - spaced)
    left = [i for i in range(len(saliency)) if i not in kept]
    return sorted(kept + [left[math.floor((i + 0.5) * len(left) / spaced)] for i in range(spaced)])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("name", "choose"), [("prumerge", highest), ("prumerge_plus", evenly)])
def test_prumerge_by_hand(name, choose, size):
    compressor = build(name, size)
    given = inputs(compressor)
    tokens, weights = compressor(**given)
    for picture in range(3):
        features, saliency, keys = (given[key][picture] for key in ("features", "saliency", "keys"))
        kept = choose(saliency, size**2)
        expected = prumerge_by_hand(features, saliency, keys, kept, neighbours=2)  # 32 of 576 are 2 of 36
        torch.testing.assert_close(tokens[picture], expected)
        assert (weights[picture] > 0).sum(dim=1).tolist() == [3] * size**2
    torch.testing.assert_close(weights @ given["features"], tokens)


def test_prumerge_takes_32_neighbours_of_576():
    compressor = build("prumerge", 2)
    features, saliency, keys = torch.randn(1, 576, 32), torch.rand(1, 576), torch.randn(1, 576, 32)
    weights = compressor(features, saliency=saliency, keys=keys)[1]
    assert (weights > 0).sum(dim=-1).tolist() == [[33] * 4]


def test_prumerge_keeps_itself_where_keys_are_alike():
    """Each token is of its own patch, and of no patch twice, though every cosine is one."""
    compressor = build("prumerge", 3)
    saliency = torch.arange(36.0)[None] + 1
    weights = compressor(torch.randn(1, 36, 32), saliency=saliency, keys=torch.ones(1, 36, 32))[1][0]
    assert (weights > 0).sum(dim=1).tolist() == [3] * 9
    assert (weights[range(9), range(27, 36)] > 0).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_visionzip_by_hand(size):
    compressor = build("visionzip", size)
    given = inputs(compressor)
    tokens, weights = compressor(**given)
    contextual = {1: 0, 2: 1, 3: 1, 4: 2, 6: 6}[size]  # 10 of 64; 2.5 and 5.625 for 16 and 36
    for picture in range(3):
        features, saliency, keys = (given[key][picture] for key in ("features", "saliency", "keys"))
        dominant = highest(saliency, size**2 - contextual)
        expected = [features[i] for i in dominant]
        left = [i for i in range(36) if i not in dominant]
        targets = [left[i * (len(left) // contextual)] for i in range(contextual)]
        groups = {target: [features[target]] for target in targets}
        mean_keys = (keys[:, :16] + keys[:, 16:]) / 2  # two heads
        for i in left:
            if contextual and i not in targets:
                cosine = torch.nn.functional.cosine_similarity(mean_keys[i], mean_keys[targets], dim=1)
                groups[targets[int(cosine.argmax())]].append(features[i])
        expected += [torch.stack(group).mean(dim=0) for group in groups.values()]
        torch.testing.assert_close(tokens[picture], torch.stack(expected))
    torch.testing.assert_close(weights @ given["features"], tokens)


@pytest.mark.parametrize(("size", "dominant"), [(8, 54), (12, 122)])
def test_visionzip_ratio(size, dominant):
    """54 of 64 as published; the others hold every patch that is left, once."""
    compressor = build("visionzip", size)
    weights = compressor(torch.randn(1, 576, 32), saliency=torch.rand(1, 576), keys=torch.randn(1, 576, 32))[1][0]
    holds = weights > 0
    assert holds.sum(dim=0).tolist() == [1] * 576
    assert holds[:dominant].sum(dim=1).tolist() == [1] * dominant
    assert int(holds[dominant:].sum()) == 576 - dominant


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 6), levels=st.integers(1, 40), seed=st.integers(0, 99), name=st.sampled_from(CHOOSERS))
def test_ties_and_all_sizes(size, levels, seed, name):
    """Saliencies and keys with ties: as many tokens as asked, no patch kept twice, rows that sum to one."""
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.randint(levels, (2, 36), generator=generator) / levels  # zeros among them
    keys = torch.randint(-1, 2, (2, 36, 32), generator=generator).float()  # and keys of no length
    features = torch.randn(2, 36, 32, generator=generator)
    tokens, weights = build(name, size)(features, saliency=saliency, keys=keys)
    assert tokens.shape == (2, size**2, 32)
    assert tokens.isfinite().all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, size**2))
    assert all(len(rows.unique(dim=0)) == size**2 for rows in weights) or "prumerge" in name


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 6), seed=st.integers(0, 99))
def test_prumerge_plus_keeps_different_patches(size, seed):
    saliency = torch.randint(4, (3, 36), generator=torch.Generator().manual_seed(seed)).float()
    kept = build("prumerge_plus", size).keep(saliency)
    assert all(len(set(places)) == size**2 for places in kept.tolist())
    assert torch.equal(kept, kept.sort(dim=1).values)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("prumerge", [[0, 1], [0, 3], [0, 4], [0, 7]]),
        ("prumerge_plus", [[0, 1], [0, 4], [0, 6], [0, 7]]),
        ("visionzip", [[3], [4], [7], [0, 1, 2, 5, 6, 8]]),
    ],
)
def test_a_fixed_tensor_gives_a_fixed_selection(name, chosen):
    """The first of those that are equally like a patch is merged with it."""
    saliency = torch.tensor([[0.1, 0.5, 0.0, 0.6, 0.9, 0.2, 0.3, 0.7, 0.4]])
    keys = torch.eye(9, 16)[None].repeat(1, 1, 2)  # two heads that agree; nothing is like anything else
    tokens, weights = build(name)(torch.eye(9, 32)[None], saliency=saliency, keys=keys)
    assert torch.equal(tokens[0, :, :9], weights[0])
    assert [row.nonzero().flatten().tolist() for row in weights[0]] == chosen


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_llama_vid_by_hand(size):
    compressor = shake(build("llama_vid", size))
    given = inputs(compressor) | {"text_mask": torch.arange(5) <= torch.arange(3)[:, None]}
    tokens, weights = compressor(**given)
    for picture in range(3):
        features = given["features"][picture]
        maps = []
        for word, is_text in zip(given["text"][picture], given["text_mask"][picture], strict=True):
            if is_text:
                query = compressor.text.weight @ word + compressor.text.bias
                scores = torch.stack([query @ (compressor.key.weight @ patch) for patch in features]) / 32**0.5
                maps.append(scores.exp() / scores.exp().sum())
        attention = torch.stack(maps).mean(dim=0)
        context = compressor.value.weight @ (attention @ features) + compressor.value.bias
        torch.testing.assert_close(tokens[picture, 0], context)
        torch.testing.assert_close(weights[picture, 0], attention)
    grid = given["features"].transpose(1, 2).unflatten(2, (6, 6))
    pooled = torch.nn.functional.adaptive_avg_pool2d(grid, (size - 1, size + 1)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[:, 1:], pooled)


def test_llama_vid_masks_the_text():
    """What stands at masked places is nothing to it, how many there are neither; without text it takes the mean."""
    compressor = shake(build("llama_vid"))
    given = inputs(compressor)
    tokens = compressor(**given)[0]
    noise = torch.where(given["text_mask"][..., None], given["text"], 1e3 * torch.randn_like(given["text"]))
    assert torch.equal(compressor(**given | {"text": noise})[0], tokens)
    more = {
        "text": torch.nn.functional.pad(noise, (0, 0, 0, 4)),
        "text_mask": torch.nn.functional.pad(given["text_mask"], (0, 4)),
    }
    torch.testing.assert_close(compressor(**given | more)[0], tokens)
    for empty in (
        {"text_mask": torch.zeros(3, 5, dtype=torch.bool)},
        {"text": given["text"][:, :0], "text_mask": torch.zeros(3, 0, dtype=torch.bool)},
    ):
        tokens, weights = compressor(**given | empty)
        torch.testing.assert_close(weights[:, 0], torch.full((3, 36), 1 / 36))
        torch.testing.assert_close(tokens[:, 0], compressor.value(given["features"].mean(dim=1)))


@pytest.mark.parametrize("name", SEEN)
def test_more_tokens_than_patches(name):
    compressor = build(name, 7)
    with pytest.raises(ValueError, match="compressor_size=7 exceeds the 6 x 6 grid"):
        compressor(**inputs(compressor))


@torch.no_grad()
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("name", ["prumerge", "visionzip"])
def test_a_model_compresses_what_its_tower_attends_to(tiny_mini, sample, vision, name):
    """Before the projector, on the selected layer's output, with eager attention's class row or mean row."""
    model = tiny_mini(vision=vision, compressor=name, compressor_size=1, prefusion_layers=0, attention="sdpa")
    ids, pixels = sample(1, 5)
    found = model(input_ids=ids[None], pixel_values=pixels[None]).image_hidden_states
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
        near = (
            model.model.compressor(
                features[None], saliency=saliency[None], keys=model.model.look_at(pixels[None]).keys
            )[1][0, 0]
            .nonzero()
            .flatten()
        )
        assert saliency.argmax() in near
        token = (saliency[near, None] * features[near]).sum(dim=0) / saliency[near].sum()
    torch.testing.assert_close(found[0], model.model.multi_modal_projector(token))


def test_the_question_changes_llama_vids_tokens(tiny_mini, sample):
    model = tiny_mini(compressor="llama_vid", prefusion_layers=0)
    ids, pixels = sample(4, 5)
    other = torch.where(ids == ids[-1], 50, ids)
    tokens = [model(input_ids=x[None], pixel_values=pixels[None]).image_hidden_states for x in (ids, other)]
    changed = (tokens[0] - tokens[1]).abs().amax(dim=1) > 0
    assert changed.tolist() == [True, False, False, False]
