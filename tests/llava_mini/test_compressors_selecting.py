"""Test compressors that keep some patches unchanged, against brute force in float64 numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.llava_mini.compress import SIDE, TEXT_WIDTH, build, random_inputs

SELECTING = ("cdpruner", "divprune", "fastervlm", "vispruner")


def cosines(vectors: torch.Tensor) -> np.ndarray:
    """Return the cosine of every two vectors, one pair at a time."""
    rows = vectors.double().numpy()
    return np.array([[a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for b in rows] for a in rows])


def kept_patches(name: str, size: int, arguments: dict[str, torch.Tensor], image: int) -> list[int]:
    """Return the indices of the patches that a compressor keeps of one image, after checks that it keeps them unchanged."""
    tokens, weights = build(name, size)(**arguments)
    rows = weights[image]
    indices = rows.argmax(dim=1)
    assert torch.equal(rows, torch.eye(rows.shape[1])[indices])
    assert torch.equal(tokens[image], arguments["features"][image, indices])
    assert indices.tolist() == sorted(set(indices.tolist()))
    return indices.tolist()


def max_min_greedy(distance: np.ndarray, count: int) -> list[int]:
    """Return the greedy max-min subset by evaluating every candidate set in each step.

    The first patch maximises the least distance to all others.
    """
    everything = range(len(distance))
    chosen = [max(everything, key=lambda i: min(distance[i, j] for j in everything if j != i))]
    while len(chosen) < count:
        rest = [i for i in everything if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance[i, j] for j in chosen)))
    return sorted(chosen)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_divprune_equals_brute_force(size):
    arguments = random_inputs(build("divprune"))
    for image in range(3):
        expected = max_min_greedy(1 - cosines(arguments["features"][image]), size**2)
        assert kept_patches("divprune", size, arguments, image) == expected


def test_divprune_least_distance_is_at_least_half_of_the_best_subset():
    """The greedy rule for a metric is a 2-approximation; angles are a metric and order patches as cosines do."""
    features = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(3))
    for image in range(4):
        angles = np.arccos(cosines(features[image]).clip(-1, 1))

        def least(subset, angles=angles):
            return min(angles[i, j] for i, j in itertools.combinations(subset, 2))

        best = max(least(subset) for subset in itertools.combinations(range(9), 4))
        padded = torch.nn.functional.pad(features, (0, 27))
        kept = build("divprune", 2)(padded)[1][image].argmax(dim=1).tolist()
        assert best / 2 <= least(kept) <= best + 1e-6


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_fastervlm_keeps_most_salient_patches(size):
    arguments = random_inputs(build("fastervlm"))
    for image in range(3):
        saliency = arguments["saliency"][image].tolist()
        expected = sorted(sorted(range(36), key=lambda i: -saliency[i])[: size**2])
        assert kept_patches("fastervlm", size, arguments, image) == expected


def vispruner_by_loops(saliency: list[float], cosine: np.ndarray, count: int, per_round: int) -> list[int]:
    order = sorted(range(len(saliency)), key=lambda i: -saliency[i])
    diverse_count = count // 2
    important, rest = order[: count - diverse_count], order[count - diverse_count :]
    while len(rest) > diverse_count:
        if not diverse_count:
            rest = []
            break
        a, b = rest[0::2], rest[1::2]
        drops = min(per_round, len(rest) - diverse_count, len(a))
        duplicates = sorted(a, key=lambda i: -max(cosine[i, j] for j in b))[:drops]
        rest = [i for i in rest if i not in duplicates]
    return sorted(important + rest)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_vispruner_equals_loops(size):
    arguments = random_inputs(build("vispruner"))
    for image in range(3):
        features, saliency = arguments["features"][image], arguments["saliency"][image].tolist()
        expected = vispruner_by_loops(saliency, cosines(features), size**2, per_round=1)  # 8 of 576 are 1 of 36
        assert kept_patches("vispruner", size, arguments, image) == expected


def test_vispruner_of_576_patches_drops_eight_a_round():
    generator = torch.Generator().manual_seed(4)
    features, saliency = torch.randn(1, 576, 32, generator=generator), torch.rand(1, 576, generator=generator)
    weights = build("vispruner", 8)(features, saliency=saliency)[1][0]
    expected = vispruner_by_loops(saliency[0].tolist(), cosines(features[0]), 64, per_round=8)
    assert weights.argmax(dim=1).tolist() == expected


def test_vispruner_drops_the_duplicate():
    """Of four equally salient others, the one that equals another goes."""
    features = torch.eye(9, 32)
    features[3] = features[4]
    saliency = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2, 1]])
    kept = build("vispruner", 2)(features[None], saliency=saliency)[1][0].argmax(dim=1).tolist()
    assert kept[:2] == [0, 1]
    assert not {3, 4} <= set(kept)


def cdpruner_by_determinants(
    features: torch.Tensor, projected: torch.Tensor, text: torch.Tensor, count: int
) -> list[int]:
    """Return the greedy MAP subset by the log-determinant of every candidate kernel."""
    patches, words = projected.double().numpy(), text.double().numpy()
    relevance = np.array([np.mean([p @ t / (np.linalg.norm(p) * np.linalg.norm(t)) for t in words]) for p in patches])
    relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    kernel = np.diag(relevance) @ cosines(features) @ np.diag(relevance)
    chosen: list[int] = []
    while len(chosen) < count:
        rest = [i for i in range(len(kernel)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1]))
    return sorted(chosen)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_cdpruner_equals_greedy_log_determinants(size):
    arguments = random_inputs(build("cdpruner"))
    for image in range(3):
        words = arguments["text"][image][arguments["text_mask"][image]]
        expected = cdpruner_by_determinants(arguments["features"][image], arguments["projected"][image], words, size**2)
        assert kept_patches("cdpruner", size, arguments, image) == expected


def test_cdpruner_without_text_keeps_the_most_diverse_volume():
    """With one relevance for all, every patch alone has determinant 1: the first one wins."""
    arguments = random_inputs(build("cdpruner")) | {"text_mask": torch.zeros(3, 5, dtype=torch.bool)}
    for image in range(3):
        kernel, chosen = cosines(arguments["features"][image]), [0]
        while len(chosen) < 9:
            rest = [i for i in range(36) if i not in chosen]
            chosen.append(max(rest, key=lambda i: np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1]))
        expected = sorted(chosen)
        assert kept_patches("cdpruner", 3, arguments, image) == expected


def test_cdpruner_beyond_the_rank_keeps_relevant_patches():
    """Two directions span all features: the other two tokens are the most relevant of the rest."""
    features = torch.zeros(1, 9, 32)
    features[0, :5, 0] = features[0, 5:, 1] = 1
    projected = torch.zeros(1, 9, TEXT_WIDTH)
    angles = torch.tensor([0.9, 0.3, 0.8, 0.1, 0.2, 0.5, 0.4, 0.7, 0.6])
    projected[0, :, 0], projected[0, :, 1] = angles, (1 - angles.square()).sqrt()
    text = torch.zeros(1, 1, TEXT_WIDTH)
    text[..., 0] = 1
    mask = torch.ones(1, 1, dtype=torch.bool)
    weights = build("cdpruner", 2)(features, projected=projected, text=text, text_mask=mask)[1]
    assert weights[0].argmax(dim=1).tolist() == [0, 2, 7, 8]


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 6), seed=st.integers(0, 99), name=st.sampled_from(SELECTING))
def test_compressor_tied_patches_keeps_distinct_ones_alike_in_any_batch(size, seed, name):
    """Equal patches and saliencies, and features of length zero, change neither the number nor the batch's rows."""
    generator = torch.Generator().manual_seed(seed)
    compressor = build(name, size)
    arguments = random_inputs(compressor) | {
        "features": torch.randint(-1, 2, (3, SIDE**2, 4), generator=generator).float().repeat(1, 1, 8)
    }
    if "saliency" in arguments:
        arguments["saliency"] = torch.randint(3, (3, SIDE**2), generator=generator).float()
    weights = compressor(**arguments)[1]
    assert all(len(set(row.argmax(dim=1).tolist())) == size**2 for row in weights)
    alone = compressor(**{key: value[1:2] for key, value in arguments.items()})[1]
    assert torch.equal(alone[0], weights[1])


@pytest.mark.parametrize("name", [*SELECTING, "downsample"])
def test_compressor_more_tokens_than_patches_raises(name):
    with pytest.raises(ValueError, match="compressor_size=7 exceeds the 6 x 6 grid"):
        build(name, 7)(**random_inputs(build(name)))


@torch.no_grad()
@pytest.mark.parametrize("before_projection", [True, False])
def test_cdpruner_in_a_model_compares_projected_patches_with_the_question(tiny_mini, sample, before_projection):
    """The projected patches are those of the projector, also where compression comes before it."""
    model = tiny_mini(
        compressor="cdpruner",
        compressor_size=1,
        prefusion_layers=0,
        compress_before_projection=before_projection,
    )
    ids, pixels = sample(1, 5)
    tokens = model(input_ids=ids[None], pixel_values=pixels[None]).image_hidden_states
    features = model.model.look_at(pixels[None]).features[0]
    projected = model.model.multi_modal_projector(features)
    words = model.get_input_embeddings()(ids[ids != model.config.image_token_id])
    expected = cdpruner_by_determinants(features, projected, words, 1)
    torch.testing.assert_close(tokens[0], projected[expected[0]])


@torch.no_grad()
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("size", [1, 2])
def test_downsample_in_a_model_encodes_a_small_image(tiny_mini, sample, vision, size):
    """The tokens are the patches of the resized image, encoded by the vision tower with interpolated positions."""
    model = tiny_mini(vision=vision, compressor="downsample", compressor_size=size, prefusion_layers=0)
    ids, pixels = sample(size**2, 5)
    sizes = []
    tower = model.model.vision_tower
    hook = tower.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    tokens = model(input_ids=ids[None], pixel_values=pixels[None]).image_hidden_states
    hook.remove()
    side = size * model.config.vision_config.patch_size
    assert sizes == [(1, 3, side, side)]
    small = torch.nn.functional.interpolate(pixels[None], size=(side, side), mode="bicubic", antialias=True)
    options = {} if vision == "dinov2" else {"interpolate_pos_encoding": True}
    features = tower(small, output_hidden_states=True, **options).hidden_states[-2]
    patches = features if vision == "siglip" else features[:, 1:]
    torch.testing.assert_close(tokens, model.model.multi_modal_projector(patches[0]))


@torch.no_grad()
def test_downsample_at_full_size_equals_the_vision_tower(tiny_mini, sample):
    model = tiny_mini(compressor="downsample", compressor_size=1, prefusion_layers=0)
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    full = tiny_mini(compressor="downsample", compressor_size=side, prefusion_layers=0)
    plain = tiny_mini(compressor="none", prefusion_layers=0)
    ids, pixels = sample(side**2, 5)
    inputs = {"input_ids": ids[None], "pixel_values": pixels[None]}
    torch.testing.assert_close(full(**inputs).logits, plain(**inputs).logits, atol=1e-5, rtol=1e-4)


def test_downsample_with_kept_patches_raises(tiny_mini):
    with pytest.raises(ValueError, match=r"keep_patches=True .*compressor='downsample'"):
        tiny_mini(compressor="downsample", compressor_size=1, prefusion_layers=0, keep_patches=True)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*SELECTING, "downsample"])
def test_compressor_in_a_padded_batch_of_several_images_equals_rows_alone(tiny_mini, sample, name, side):
    """The first row has two images, the second one image and less text."""
    model = tiny_mini(compressor=name, compressor_size=2, prefusion_layers=0)
    (first, first_pixels), (second, second_pixels), (third, third_pixels) = sample(4, 5), sample(4, 3), sample(4, 2)
    rows = [torch.cat([first, second]), third]
    pixels = [torch.stack([first_pixels, second_pixels]), third_pixels[None]]
    missing = len(rows[0]) - len(rows[1])
    padding = (missing, 0) if side == "left" else (0, missing)
    ids = torch.stack([rows[0], torch.nn.functional.pad(rows[1], padding)])
    mask = torch.stack([torch.ones_like(rows[0]), torch.nn.functional.pad(torch.ones_like(rows[1]), padding)])
    layout = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 1]])
    together = model(input_ids=ids, pixel_values=torch.cat(pixels), attention_mask=mask, visual_layout=layout).logits
    for row in range(2):
        alone = model(
            input_ids=rows[row][None], pixel_values=pixels[row], visual_layout=layout[:2] if row == 0 else None
        )
        torch.testing.assert_close(together[row, mask[row].bool()], alone.logits[0], atol=1e-5, rtol=1e-4)
