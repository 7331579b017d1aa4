"""The ways to attention by token group that are compared, each as one forward pass of the same language model.

Each gives the mean mass of the instruction's queries on every group, `[layers, heads, groups]`; a plain pass gives none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from experiments.config.schema import BenchConfig, BenchModel
from probes import TokenMap
from probes.attention.recording import record_attention

Masses = Float[Tensor, "layers heads groups"]
Run = Callable[[], Masses | None]


def build(model: BenchModel, vocabulary: int, dtype: str, device: torch.device) -> PreTrainedModel:
    """A Llama with random weights; the vocabulary is cut as the layers are, so that the head keeps its share."""
    torch.manual_seed(0)
    width = model.heads * model.head_width
    config = LlamaConfig(
        vocab_size=max(vocabulary * model.layers // model.of_layers, 8),
        hidden_size=width,
        intermediate_size=model.mlp,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        max_position_embeddings=2**16,
        # attention as uneven as in a trained model, scores of a few units
        initializer_range=2.0 / width**0.5,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def inputs(model: PreTrainedModel, visual: int, text: int) -> tuple[Int[Tensor, "1 length"], TokenMap]:
    """One prompt: half of the text, the visual tokens, the other half."""
    before = text // 2
    tokens = TokenMap(torch.tensor([[1] * before + [2] * visual + [3] * (text - before)]))
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, visual + text), generator=draw)
    return ids.to(model.device), tokens


def prepare(mode: str, model: PreTrainedModel, ids: Int[Tensor, "1 length"], tokens: TokenMap) -> Run:
    """A forward pass in this mode. The weights are shared with `model`, which itself stays as it is."""
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    model.set_attn_implementation("sdpa" if mode in ("plain", *_RECORDED) else "eager")
    if mode in _RECORDED:
        return _recorded(model, ids, tokens, _RECORDED[mode])
    member = torch.nn.functional.one_hot(tokens.labels[0], len(tokens.groups)).to(ids.device, model.dtype)
    asked = int(tokens.mask("instruction").sum())

    def masses(weights: Float[Tensor, "1 heads queries keys"]) -> Tensor:
        return (weights[0, :, -asked:] @ member).float().mean(dim=1)

    return _WAYS[mode](model, ids, masses)


_RECORDED = {"text": ("system", "instruction"), "all": None}


def _recorded(model: PreTrainedModel, ids: Tensor, tokens: TokenMap, targets: tuple[str, ...] | None) -> Run:
    def run() -> Masses:
        with record_attention(model, tokens, targets=targets) as attention:
            model(ids, use_cache=False)
        # entropy and received attention are there too
        return attention.mass[:, 0, :, attention.targets.index("instruction")].nan_to_num()

    return run


def _plain(model: PreTrainedModel, ids: Tensor, masses: Callable[[Tensor], Tensor]) -> Run:
    def run() -> None:
        model(ids, use_cache=False)

    return run


def _output_attentions(model: PreTrainedModel, ids: Tensor, masses: Callable[[Tensor], Tensor]) -> Run:
    def run() -> Masses:
        weights = model(ids, use_cache=False, output_attentions=True).attentions
        return torch.stack([masses(layer) for layer in weights])

    return run


def _hooks(model: PreTrainedModel, ids: Tensor, masses: Callable[[Tensor], Tensor]) -> Run:
    found: list[Tensor] = []
    for layer in model.get_decoder().layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: found.append(masses(output[1])))

    def run() -> Masses:
        found.clear()
        model(ids, use_cache=False)
        return torch.stack(found)

    return run


def _nnsight(model: PreTrainedModel, ids: Tensor, masses: Callable[[Tensor], Tensor]) -> Run:
    from nnsight import NNsight, save  # type: ignore[import-untyped]

    traced = NNsight(model)

    def run() -> Masses:
        with traced.trace(ids, use_cache=False):
            found: Any = save([])
            for layer in traced.model.layers:
                found.append(masses(layer.self_attn.source.attention_interface_1.output[1]))
        return torch.stack(list(found))

    return run


def _bridge(model: PreTrainedModel, ids: Tensor, masses: Callable[[Tensor], Tensor]) -> Run:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)

    def run() -> Masses:
        found: list[Tensor] = []

        def keep(pattern: Tensor, hook: Any) -> None:
            found.append(masses(pattern))

        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.config.num_hidden_layers)]
        bridge.run_with_hooks(ids, fwd_hooks=[(name, keep) for name in names])
        return torch.stack(found)

    return run


_WAYS: dict[str, Callable[[PreTrainedModel, Tensor, Callable[[Tensor], Tensor]], Run]] = {
    "plain": _plain,
    "output_attentions": _output_attentions,
    "hooks": _hooks,
    "nnsight": _nnsight,
    "bridge": _bridge,
}
MODES = ("plain", *_RECORDED, *(mode for mode in _WAYS if mode != "plain"))


def matrices(mode: str, model: BenchModel, config: BenchConfig, visual: int) -> float:
    """About how many GiB of [queries x keys] matrices a mode holds at once; its results apart, ours hold none."""
    if mode in ("plain", *_RECORDED):
        return 0.0
    # scores, weights in float32 and weights in the model's type, or all layers' weights
    held = 3 + (model.layers if mode == "output_attentions" else 0)
    bytes_each = torch.finfo(getattr(torch, config.dtype)).bits / 8
    return held * model.heads * (visual + config.text) ** 2 * bytes_each / 2**30
