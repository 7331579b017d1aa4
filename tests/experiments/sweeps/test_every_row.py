"""Every row of every shipped table runs: it builds its model, trains a step, is evaluated and recorded."""

from pathlib import Path

import pytest
import yaml

from experiments.sweeps.plan import identify_cell
from experiments.sweeps.runner import run_if_needed

FAST = ("train.max_steps=1", "train.batch_size=2", "data.train_samples=8", "data.test_samples=6", "device=cpu")
ROWS = [
    (path.stem, row)
    for path in sorted((Path(__file__).resolve().parents[3] / "conf" / "experiment").glob("*.yaml"))
    for row in range(len(yaml.safe_load(path.read_text()).get("rows", ())))
]


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "row"), ROWS)
def test_row_of_shipped_table_runs_and_records_its_tokens(compose_config, tmp_path, photos, experiment, row):
    # The parts of the smol study's model do not ship. The tiny model has as many layers as that study's rows need.
    smol = ["model=tiny", f"data.photos={photos}"] if experiment.startswith("smol_") else []
    overrides = [f"experiment={experiment}", f"row={row}", *FAST, *smol, f"results={tmp_path}"]
    cell = identify_cell(compose_config(*overrides), overrides)
    config, record = cell.config, run_if_needed(cell, record_input_errors=False).record
    assert record["status"] == "finished"
    assert len(record["accuracy"]["image"]) == 6
    tokens = record["model"]["patches"] if config.compressor.name == "none" else config.compressor.size**2
    if config.prefusion.location == "inside":  # the language model's first layers read the patches too
        tokens += record["model"]["patches"]
    assert record["model"]["visual_tokens"] % max(tokens, 1) == 0
    assert record["model"]["visual_tokens"] == tokens or config.data.name == "shapes_video"
    assert record["model"]["prefusion_layers"] == config.prefusion.layers
