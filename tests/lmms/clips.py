"""Clips whose pixels a test knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_clip(path: Path, frames: list[np.ndarray]) -> Path:
    """Write frames as a video of one frame a second. The codec loses nothing, so that a test knows each pixel."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mov") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path
