"""Memory over the length of a video, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

FRAMES = """
import sys, torch
from transformers import CLIPVisionConfig, LlamaConfig
from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration

frames = int(sys.argv[1])
torch.manual_seed(0)
vision = CLIPVisionConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=336, patch_size=14
)
text = LlamaConfig(
    vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
)
model = LlavaMiniForConditionalGeneration(
    LlavaMiniConfig(vision_config=vision, text_config=text, image_token_index=999, frames_per_chunk=8)
).eval()
ids = torch.tensor([[1, *[999] * frames, *range(2, 22)]])
stream = (torch.full((1, 3, 336, 336), i / frames) for i in range(frames))
layout = torch.tensor([[0, frames, 1]])
model.generate(ids, pixel_values=stream, visual_layout=layout, max_new_tokens=2, do_sample=False)
# ru_maxrss would count what the process that started this one had taken
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_frames():
    """512 frames of 576 patches, streamed: pixels alone would be 690 MB, and their patch features 75 MB a layer."""
    few, many = (
        int(subprocess.run([sys.executable, "-c", FRAMES, str(n)], check=True, capture_output=True, text=True).stdout)
        for n in (64, 512)
    )
    assert many < 1.3 * few
