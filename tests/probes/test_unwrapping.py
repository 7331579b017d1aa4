"""Probes of wrapped models: each wrapper gives what the transformers model inside it gives."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import compile_regions
from nnsight import NNsight
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import LlavaForConditionalGeneration

from probes import (
    BlockAttention,
    PatchActivations,
    RemoveTokens,
    TokenMap,
    intervene,
    logit_lens,
    record_attention,
    record_states,
    relevancy,
)
from probes.attention.backends.transformer_lens import wrap
from probes.fusion.curves import (
    answer_logprob,
    attention_curve,
    knockout_curve,
    removal_curve,
    text_states,
)
from probes.pruning import fastv, vtw
from probes.replay import replay
from probes.unwrapping import require_model, unwrap_model

Model = LlavaForConditionalGeneration
Inputs = dict[str, torch.Tensor]


@pytest.fixture
def process_group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def lora(model: Model, **options: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)).eval()


def accelerated(model: Model, **options: Any) -> Any:
    AcceleratorState._reset_state(True)
    prepared = Accelerator(cpu=True, **options).prepare(model)
    AcceleratorState._reset_state(True)
    return prepared


WRAPPERS: dict[str, Callable[[Model], Any]] = {
    "peft": lora,
    "peft causal": lambda model: lora(model, task_type="CAUSAL_LM"),
    "peft mixed": lambda model: get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), mixed=True
    ).eval(),
    "compile": lambda model: torch.compile(model, backend="eager"),
    "data parallel": DataParallel,
    "distributed": DistributedDataParallel,
    "distributed compile peft": lambda model: DistributedDataParallel(torch.compile(lora(model), backend="eager")),
    "accelerate": accelerated,
    "accelerate bf16": lambda model: accelerated(model, mixed_precision="bf16"),
    "accelerate regions": lambda model: compile_regions(model, backend="eager"),
    "averaged": AveragedModel,
}


@torch.no_grad()
def measure(model: Any, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Run every probe of a model through its own calls."""
    tokens, results = TokenMap.from_inputs(model, inputs), {}
    for cut in (
        RemoveTokens("vision", [1, 2]),
        BlockAttention("vision", "instruction", [1]),
        PatchActivations("vision", [1], "mlp", "zero"),
    ):
        with intervene(model, tokens, cut):
            results[type(cut).__name__] = model(**inputs).logits
    for backend in ("native", "nnsight", "transformer_lens"):
        with record_attention(model, tokens, backend=backend) as attention:
            model(**inputs)
        results[backend] = attention.mass
    with record_states(model, tokens, "vision") as states:
        model(**inputs)
    with logit_lens(model, tokens) as lens:
        model(**inputs)
    for name, reduction in (("fastv", fastv(model, tokens, 1, 0.5)), ("vtw", vtw(model, tokens, 1))):
        with reduction:
            results[name] = model(**inputs).logits
    with replay(model, [1]) as resume_from:
        model(**inputs, use_cache=False)
        with resume_from(1):
            results["replay"] = model(**inputs, use_cache=False).logits
    score = answer_logprob(tokens, torch.tensor([5, 6, 7]))
    curves = {
        "attention_curve": attention_curve(model, tokens, inputs),
        "removal_curve": removal_curve(model, tokens, inputs, score),
        "knockout_curve": knockout_curve(model, tokens, inputs, score),
    }
    results |= {name: torch.from_numpy(curve) for name, curve in curves.items()}
    rollout = relevancy(model, tokens, inputs).rollout
    text = text_states(model, tokens, inputs)
    return results | {"states": states[1], "lens": lens.logprobs, "relevancy": rollout, "text_states": text}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPERS)
def test_every_probe_of_wrapped_model_equals_probe_of_inner_model(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], process_group: None, name: str
) -> None:
    torch._dynamo.reset()
    wrapped, inputs = WRAPPERS[name](make_llava()), make_inputs()
    inner = unwrap_model(wrapped)
    assert isinstance(inner, LlavaForConditionalGeneration)
    expected, actual = measure(inner, inputs), measure(wrapped, inputs)
    for probe, value in expected.items():
        torch.testing.assert_close(actual[probe], value, equal_nan=True, atol=1e-5, rtol=1e-5, msg=probe)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_record_attention_nnsight_of_wrapped_model_equals_native_record(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    model, inputs = lora(make_llava()), make_inputs()
    tokens, traced = TokenMap.from_inputs(model, inputs), NNsight(model)
    with record_attention(model, tokens) as native:
        model(**inputs)
    with record_attention(traced, tokens, backend="nnsight") as theirs, traced.trace(**inputs):
        pass
    torch.testing.assert_close(theirs.mass, native.mass, equal_nan=True, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_unwrap_model_prompt_learning_adapter_raises(make_llava: Callable[..., Model]) -> None:
    model = get_peft_model(make_llava(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"PrefixTuningConfig.*get_base_model"):
        unwrap_model(model)


@torch.no_grad()
def test_replay_and_curves_of_model_in_bridge_equal_those_of_eager_model(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """Layers of a TransformerLens bridge pass attributes that are set on them to the modules inside."""
    eager, inner, inputs = make_llava("eager"), wrap(make_llava("eager")).original_model, make_inputs()
    tokens = TokenMap.from_inputs(eager, inputs)
    score = answer_logprob(tokens, torch.tensor([5, 6, 7]))
    for curve in (removal_curve, knockout_curve):
        actual, expected = curve(inner, tokens, inputs, score), curve(eager, tokens, inputs, score)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    with replay(inner, [1]) as resume_from:
        first = inner(**inputs, use_cache=False).logits
        with resume_from(1):
            torch.testing.assert_close(inner(**inputs, use_cache=False).logits, first)
    torch.testing.assert_close(inner(**inputs).logits, eager(**inputs).logits)


def test_unwrap_model_in_fully_sharded_data_parallel_raises(
    make_llava: Callable[..., Model], process_group: None
) -> None:
    wrapped = FullyShardedDataParallel(make_llava(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel cannot be probed.*fully_shard"):
        unwrap_model(wrapped)


@torch.no_grad()
def test_probes_of_fully_sharded_model_equal_those_of_plain_model(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], process_group: None
) -> None:
    plain, sharded, inputs = make_llava(), make_llava(), make_inputs()
    for layer in sharded.model.language_model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    tokens = TokenMap.from_inputs(plain, inputs)
    for cut in (
        RemoveTokens("vision", [1, 2]),
        RemoveTokens("vision", [1, 2], how="drop"),
        BlockAttention("vision", "instruction", [1]),
        PatchActivations("vision", [1], "mlp", "zero"),
    ):
        with intervene(plain, tokens, cut), intervene(sharded, tokens, cut):
            torch.testing.assert_close(sharded(**inputs).logits, plain(**inputs).logits)
    with record_attention(plain, tokens) as expected, record_attention(sharded, tokens) as actual:
        plain(**inputs), sharded(**inputs)
    torch.testing.assert_close(actual.mass, expected.mass, equal_nan=True)
    with pytest.raises(ValueError, match="under fully_shard cannot be copied: use backend='native'"):
        record_attention(sharded, tokens, backend="nnsight").__enter__()


def test_require_model_without_transformers_model_raises(make_llava: Callable[..., Model]) -> None:
    for other in (torch.nn.Linear(2, 2), DataParallel(torch.nn.Linear(2, 2)), "model"):
        with pytest.raises(ValueError, match="cannot be probed: pass a transformers model, or the one inside it"):
            require_model(other)


def test_require_model_of_bridge_or_nnsight_names_the_model_inside(make_llava: Callable[..., Model]) -> None:
    for other, name in ((wrap(make_llava()), "original_model"), (NNsight(make_llava()), "_module")):
        with pytest.raises(ValueError, match=rf"^a {type(other).__name__} cannot be probed: .* or its {name}$"):
            require_model(other)
        require_model(getattr(other, name))
