"""Attention knock-out: edges between groups of tokens cut in chosen layers."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from probes.decoder import decoder_layers, select_layers
from probes.interventions.masks import explicit, hidden_states, hide, key_length, visible
from probes.interventions.receipt import Effect
from probes.interventions.selection import Selection, Tokens, When, check_when, describe
from probes.tokens import TokenMap

# Attention scores held at once while the blocked mass is measured (16 MiB in float32).
SCORES_PER_CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class BlockAttention:
    """Queries of `target` do not see keys of `source` in `layers` (attention knock-out, Geva et al. 2023).

    All other edges stay, and so do states, positions and cache. Tokens are of both `source` and `target` do not see
    themselves either. A query that is left with no key at all takes nothing in: the output of its attention is 0.
    Generated tokens are of the map's `generated` group, so blocking `instruction` leaves them seeing; to block them
    too, pool the groups with `tokens.merge`, or pass a second `BlockAttention`.

    Args:
        source: Group or mask of the keys.
        target: Group or mask of the queries.
        layers: Decoder layers, from 0; none is a no-op.
        when: In which calls: the prompt's ("prefill"), those of cached steps after it ("decode"), or "both".
    """

    source: Tokens
    target: Tokens
    layers: Collection[int]
    when: When = "both"

    def install(self, decoder: PreTrainedModel, tokens: TokenMap, stack: ExitStack) -> Effect:
        """Hooks the decoder until `stack` closes."""
        check_when(self.when)
        layers = select_layers(decoder, self.layers)
        name = f"BlockAttention({describe(self.source)} -> {describe(self.target)})"
        effect = Effect.of(name, layers)
        source, target = Selection(decoder, tokens, self.source), Selection(decoder, tokens, self.target)
        if layers:
            stack.enter_context(source)
            stack.enter_context(target)
        for layer in layers:
            _Blocker(layer, decoder_layers(decoder)[layer], source, target, self.when, effect).install(stack)
        return effect


class _Blocker:
    """The hooks of `BlockAttention` on one decoder layer."""

    def __init__(
        self, number: int, layer: nn.Module, source: Selection, target: Selection, when: When, effect: Effect
    ) -> None:
        self.number, self.layer, self.effect = number, layer, effect
        self.source, self.target, self.when = source, target, when
        self.blocked: Tensor | None = None
        self.blind: Tensor | None = None

    def install(self, stack: ExitStack) -> None:
        attention = self.layer.get_submodule("self_attn")
        for handle in (
            self.layer.register_forward_pre_hook(self.hide, with_kwargs=True),
            attention.register_forward_pre_hook(self.watch),
            attention.register_forward_hook(self.measure, always_call=True),
        ):
            stack.callback(handle.remove)

    def hide(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the layer: takes the edges out of the attention mask."""
        self.blocked = self.blind = None
        if not self.source.acts(self.when):
            return None
        hidden = hidden_states(args, kwargs)
        keys = key_length(layer, args, kwargs)
        mask = explicit(layer, kwargs["attention_mask"], hidden, keys)
        edges = self.target.queries[:, None, :, None] & self.source.keys(keys)[:, None, None, :]
        seen = visible(mask)
        blocked = edges & seen
        if not blocked.any():
            return None
        self.blocked = blocked
        touched = blocked.any(dim=-1)[:, 0]
        blind = touched & ~(seen & ~edges).any(dim=-1)[:, 0]
        self.blind = blind if blind.any() else None
        self.effect.add(self.number, int(touched.sum()))
        return args, kwargs | {"attention_mask": hide(mask, blocked)}

    def watch(self, attention: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the attention: follows what its kernel is given."""
        self.kernel: _Kernel | None = None
        if self.blocked is not None:
            self.kernel = _Kernel(self.blocked, self.blind)
            self.kernel.__enter__()

    def measure(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the attention, also if it raised: notes the blocked mass, and silences the queries without a key."""
        if self.kernel is None:
            return None
        self.kernel.__exit__(None, None, None)
        if output is None:  # it raised
            return None
        result, weights, *rest = output
        mass = self.kernel.mass if weights is None else _left(weights, self.blocked, self.blind)
        if mass is None or mass != 0:
            what = "could not be measured" if mass is None else f"is {mass:g}, not 0"
            raise RuntimeError(
                f"the attention on blocked keys {what} in layer {self.number} ({type(attention).__name__}): "
                "this attention does not follow its mask"
            )
        self.effect.mass[self.number] = max(mass, self.effect.mass.get(self.number, 0.0))
        if self.blind is not None:
            result = result.masked_fill(self.blind[..., None], 0.0)
        return result, weights, *rest


class _Kernel(TorchFunctionMode):
    """Measures the mass on blocked edges in each call of the sdpa kernel, from the very arguments of that call."""

    def __init__(self, blocked: Bool[Tensor, "batch 1 queries keys"], blind: Tensor | None) -> None:
        super().__init__()
        self.blocked, self.blind = blocked, blind
        self.mass: float | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            self._measure(*args, **kwargs)
        return func(*args, **kwargs)

    @torch.no_grad()
    def _measure(
        self,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch kv_heads keys width"],
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        blocked, blind = self.blocked, self.blind
        queries, keys = blocked.shape[2:]
        # A single grouped query comes packed: its heads lie on the axis of queries.
        if key.shape[2] != keys or queries not in (1, query.shape[2]):
            return
        if attn_mask is None:
            self.mass = 1.0
            return
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float()
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        bias = attn_mask
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill(~attn_mask, -torch.inf)
        rows = blocked.any(dim=-1)[:, 0].any(dim=0).nonzero()[:, 0]
        mass = 0.0
        for chunk in rows.split(max(SCORES_PER_CHUNK // (query.shape[0] * query.shape[1] * keys), 1)):
            part = chunk if queries == query.shape[2] else slice(None)
            scores = query[:, :, part].float() @ key.transpose(2, 3) * scale + bias[:, :, part].float()
            silent = None if blind is None else blind[:, chunk]
            mass = max(mass, _left(scores.softmax(dim=-1).nan_to_num(), blocked[:, :, chunk], silent))
        self.mass = max(mass, self.mass or 0.0)


def _left(weights: Tensor, blocked: Tensor | None, blind: Tensor | None) -> float:
    """The largest mass of a query on its blocked keys; a query without any key is silenced afterwards: 0."""
    assert blocked is not None
    mass = (weights * blocked).sum(dim=-1)
    if blind is not None:
        mass = mass.masked_fill(blind[:, None], 0.0)
    return float(mass.max())
