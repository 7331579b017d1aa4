"""Every row of every table runs: builds its model, trains a step, is scored and recorded."""

from pathlib import Path

import pytest
import yaml

from experiments.sweeps.plan import identify
from experiments.sweeps.runner import attempt

FAST = ("train.steps=1", "train.batch_size=2", "data.train=8", "data.test=6", "device=cpu")
CELLS = [
    (path.stem, row)
    for path in sorted((Path(__file__).resolve().parents[3] / "conf" / "experiment").glob("*.yaml"))
    for row in range(len(yaml.safe_load(path.read_text()).get("rows", ())))
]


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "row"), CELLS)
def test_a_row_runs(composed, tmp_path, photos, experiment, row):
    # the parts of the smol study's model do not ship, and the tiny one has as many layers as its rows need
    smol = ["model=tiny", f"data.photos={photos}"] if experiment.startswith("smol_") else []
    cell = identify(composed(f"experiment={experiment}", f"row={row}", *FAST, *smol, f"results={tmp_path}"))
    config, record = cell.config, attempt(cell, record_all=False).record
    assert record["status"] == "finished"
    assert len(record["accuracy"]["image"]) == 6
    tokens = record["model"]["patches"] if config.compressor.name == "none" else config.compressor.size**2
    if config.prefusion.place == "inside":  # the language model's first layers see the patches too
        tokens += record["model"]["patches"]
    assert record["model"]["visual_tokens"] % max(tokens, 1) == 0
    assert record["model"]["visual_tokens"] == tokens or config.data.name == "shapes_video"
    assert record["model"]["prefusion_layers"] == config.prefusion.layers
