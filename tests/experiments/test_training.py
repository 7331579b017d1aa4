import json
import shutil

import torch
from transformers import set_seed

from experiments.config import TrainConfig
from experiments.training import last_checkpoint, train

CPU = torch.device("cpu")


def test_a_cut_run_ends_with_the_same_weights(llava, processor, few, tmp_path):
    config = TrainConfig(steps=6, batch_size=4, warmup=1, save_every=2)
    start = {name: value.clone() for name, value in llava.state_dict().items()}

    def run(folder) -> dict[str, torch.Tensor]:
        llava.load_state_dict(start)
        set_seed(0)
        train(llava, processor, few.samples, config, folder, 0, CPU)
        return {name: value.clone() for name, value in llava.state_dict().items()}

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    half = tmp_path / "cut" / "checkpoint-5"  # what a kill in the middle of writing leaves
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step"')
    resumed = run(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], start[name]) for name in whole)


def test_the_tower_is_frozen_unless_it_is_asked_for(llava, processor, few, tmp_path):
    before = {n: p.clone() for n, p in llava.named_parameters()}
    train(llava, processor, few.samples, TrainConfig(steps=2, batch_size=2, warmup=1), tmp_path, 0, CPU)
    changed = {name for name, value in llava.named_parameters() if not torch.equal(before[name], value)}
    assert changed
    assert not any("vision_tower" in name for name in changed)


def test_last_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None
    for step, state in ((2, 2), (10, 10), (30, 29)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": state}))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
