"""Fixtures of the feature cache's tests: a LLaVA-Mini, and a count of vision tower runs."""

import pytest
import torch

from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor


@pytest.fixture
def mini(llava):
    torch.manual_seed(1)
    return LlavaMiniForConditionalGeneration.from_llava(llava, compressor_size=2, prefusion_layers=1).eval()


@pytest.fixture
def mini_processor(processor, mini):
    return LlavaMiniProcessor.from_llava(processor, mini.config)


@pytest.fixture
def tower_runs(llava, mini):
    """One entry for each run of a vision tower."""
    runs = []
    for model in (llava, mini):
        model.model.vision_tower.encoder.register_forward_hook(
            lambda _, args, kwargs, out: runs.append(1), with_kwargs=True
        )
    return runs
