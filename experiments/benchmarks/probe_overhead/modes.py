"""Ways to record attention by token group, each as one forward pass of the same language model.

Each mode returns the mean mass of the instruction's queries on every token group, (layers, heads, groups). A plain pass
returns None.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from experiments.config.benchmark_schema import BenchConfig, BenchModel
from probes import TokenMap
from probes.attention.recording import record_attention

Masses = Float[Tensor, "layers heads groups"]
Run = Callable[[], Masses | None]
LayerMass = Callable[[Tensor], Tensor]
"""From the attention weights of a layer, (1, heads, queries, keys), to its mean masses, (heads, groups)."""


def build_llama(model: BenchModel, vocabulary: int, dtype: str, device: torch.device) -> PreTrainedModel:
    """Return a Llama with random weights.

    Args:
        model: Its sizes, and how many of its layers to build.
        vocabulary: Tokens of the full vocabulary. It is cut in proportion to the layers, so the head keeps its share.
        dtype: Name of the dtype.
        device: The device to build on.
    """
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
        # Scores of a few units make attention as uneven as in a trained model.
        initializer_range=2.0 / width**0.5,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def prompt_tokens(model: PreTrainedModel, visual: int, text: int) -> tuple[Int[Tensor, "1 length"], TokenMap]:
    """Return one prompt and its token map: half of the text, the visual tokens, the other half of the text."""
    before = text // 2
    tokens = TokenMap(torch.tensor([[1] * before + [2] * visual + [3] * (text - before)]))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, visual + text), generator=generator)
    return ids.to(model.device), tokens


def prepare_mode(mode: str, model: PreTrainedModel, ids: Int[Tensor, "1 length"], tokens: TokenMap) -> Run:
    """Return a forward pass in one mode.

    It runs on a copy that shares the weights of `model`, which itself stays unchanged.

    Args:
        mode: A name of `MODES`.
        model: The language model.
        ids: The prompt.
        tokens: The token map of the prompt.
    """
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    model.set_attn_implementation("sdpa" if mode in ("plain", *_RECORDED) else "eager")
    if mode in _RECORDED:
        return _recorded(model, ids, tokens, _RECORDED[mode])
    membership = torch.nn.functional.one_hot(tokens.labels[0], len(tokens.groups)).to(ids.device, model.dtype)
    queries = int(tokens.mask("instruction").sum())

    def layer_mass(weights: Float[Tensor, "1 heads queries keys"]) -> Tensor:
        return (weights[0, :, -queries:] @ membership).float().mean(dim=1)

    return _MODE_FUNCTIONS[mode](model, ids, layer_mass)


def attention_matrices_gib(mode: str, model: BenchModel, config: BenchConfig, visual: int) -> float:
    """Estimate the GiB of (queries x keys) matrices that a mode holds at once, besides its results.

    `record_attention` holds none.
    """
    if mode in ("plain", *_RECORDED):
        return 0.0
    # Scores, weights in float32 and weights in the model's dtype; `output_attentions` also keeps the weights per layer.
    matrices = 3 + (model.layers if mode == "output_attentions" else 0)
    bytes_each = torch.finfo(getattr(torch, config.dtype)).bits / 8
    return matrices * model.heads * (visual + config.text) ** 2 * bytes_each / 2**30


def _recorded(model: PreTrainedModel, ids: Tensor, tokens: TokenMap, arguments: Mapping[str, Any]) -> Run:
    def run() -> Masses:
        with record_attention(model, tokens, **arguments) as attention:
            model(ids, use_cache=False)
        # The record also holds entropy and received attention, unless the arguments name other statistics.
        return attention.mass[:, 0, :, attention.targets.index("instruction")].nan_to_num()

    return run


def _plain(model: PreTrainedModel, ids: Tensor, layer_mass: LayerMass) -> Run:
    def run() -> None:
        model(ids, use_cache=False)

    return run


def _output_attentions(model: PreTrainedModel, ids: Tensor, layer_mass: LayerMass) -> Run:
    def run() -> Masses:
        weights = model(ids, use_cache=False, output_attentions=True).attentions
        return torch.stack([layer_mass(layer) for layer in weights])

    return run


def _hooks(model: PreTrainedModel, ids: Tensor, layer_mass: LayerMass) -> Run:
    masses: list[Tensor] = []
    for layer in model.get_decoder().layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: masses.append(layer_mass(output[1])))

    def run() -> Masses:
        masses.clear()
        model(ids, use_cache=False)
        return torch.stack(masses)

    return run


def _nnsight(model: PreTrainedModel, ids: Tensor, layer_mass: LayerMass) -> Run:
    from nnsight import NNsight, save  # type: ignore[import-untyped]

    traced = NNsight(model)

    def run() -> Masses:
        with traced.trace(ids, use_cache=False):
            masses: Any = save([])
            for layer in traced.model.layers:
                masses.append(layer_mass(layer.self_attn.source.attention_interface_1.output[1]))
        return torch.stack(list(masses))

    return run


def _bridge(model: PreTrainedModel, ids: Tensor, layer_mass: LayerMass) -> Run:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)

    def run() -> Masses:
        masses: list[Tensor] = []

        def keep(pattern: Tensor, hook: Any) -> None:
            masses.append(layer_mass(pattern))

        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.config.num_hidden_layers)]
        bridge.run_with_hooks(ids, fwd_hooks=[(name, keep) for name in names])
        return torch.stack(masses)

    return run


# Arguments of `record_attention`, by mode.
_RECORDED: dict[str, dict[str, Any]] = {
    "text": {"targets": ("system", "instruction")},
    "all": {},
    "mass": {"statistics": ("mass",)},
    "contribution": {"statistics": ("contribution",)},
}
_MODE_FUNCTIONS: dict[str, Callable[[PreTrainedModel, Tensor, LayerMass], Run]] = {
    "plain": _plain,
    "output_attentions": _output_attentions,
    "hooks": _hooks,
    "nnsight": _nnsight,
    "bridge": _bridge,
}
MODES = ("plain", *_RECORDED, *(mode for mode in _MODE_FUNCTIONS if mode != "plain"))
