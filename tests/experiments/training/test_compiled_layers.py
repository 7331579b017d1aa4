"""Compiled training, compared with training that is not compiled."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import set_seed

from experiments.config.schema import ScratchModel, TrainConfig
from experiments.data.encoding import Collator, SampleEncoder
from experiments.training.compiled_layers import compile_decoder_layers
from experiments.training.trainer import train_llava
from tests.experiments.training.weights import copy_weights

CPU = torch.device("cpu")


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")


@needs_compiler
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_compiled_training_gives_the_same_weights(mini, mini_processor, mixed_samples, tmp_path, lora_rank):
    """After it the layers are as before; measuring the validation split in between changes nothing."""
    start, runs = copy_weights(mini), []
    for compiled in (False, True):
        mini.load_state_dict(start)
        set_seed(0)  # of the adapters' initial weights
        config = TrainConfig(
            max_steps=4, batch_size=4, warmup_steps=0, eval_steps=2, lora_rank=lora_rank, torch_compile=compiled
        )

        def validate():
            with torch.no_grad():
                mini(**Collator(mini_processor)([SampleEncoder(mini_processor)(mixed_samples[0])]))
            return {"accuracy": 0.0, "loss": 1.0}

        folder = tmp_path / str(compiled)
        train_llava(mini, mini_processor, mixed_samples, config, folder, 0, CPU, validate=validate)
        runs.append(copy_weights(mini))
    assert all("forward" not in vars(module) for module in mini.modules())
    for name, weight in runs[0].items():
        torch.testing.assert_close(runs[1][name], weight, rtol=0, atol=2e-4, msg=name)


def test_pretraining_of_the_vision_tower_refuses_compiled_layers():
    with pytest.raises(ValueError, match=r"model\.vision_pretraining\.torch_compile: .*found true"):
        ScratchModel(name="x", vision_pretraining=TrainConfig(torch_compile=True))


def test_compiled_layers_without_a_compiler_raise_one_line(llava, monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler")
    with (
        pytest.raises(FileNotFoundError, match=r"train\.torch_compile: .*'no-compiler'"),
        compile_decoder_layers(llava),
    ):
        pass
    assert all("forward" not in vars(module) for module in llava.modules())


@needs_compiler
def test_all_decoder_layers_share_one_graph(deep_llava, processor, shapes_split):
    """Batches of another length need no other graph."""
    torch._dynamo.reset()
    counters.clear()
    encode, collate = SampleEncoder(processor), Collator(processor)
    items = sorted(map(encode, shapes_split.samples), key=lambda item: len(item["input_ids"]))
    with torch.no_grad(), compile_decoder_layers(deep_llava):
        for item in (items[0], items[-1]):
            deep_llava(**collate([item, item]), use_cache=False)
    assert len(items[0]["input_ids"]) < len(items[-1]["input_ids"])
    assert counters["stats"]["unique_graphs"] == 1
