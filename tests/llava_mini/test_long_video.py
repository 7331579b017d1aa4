"""Peak memory by the length of a video, measured in separate processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
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
# ru_maxrss would include the memory of the parent process
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_generate_from_a_stream_needs_no_memory_for_more_frames():
    """512 frames would have 690 MB of pixels, and 75 MB of patch features in each layer (576 patches a frame)."""
    peak_64, peak_512 = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, str(n)], check=True, capture_output=True, text=True).stdout)
        for n in (64, 512)
    )
    assert peak_512 < 1.3 * peak_64
