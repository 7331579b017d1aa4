"""What interventions did: where each fired, on how many tokens, and what attention is left on blocked edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

from jaxtyping import Bool
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Effect:
    """What one intervention did, by decoder layer.

    Attributes:
        name: The intervention in short, such as `BlockAttention(vision -> instruction)`.
        calls: In how many forward calls of the layer the intervention changed something.
        tokens: How many tokens it changed there, over all samples and calls.
        mass: The most attention, over heads, queries and calls, that a changed query still put on its blocked keys;
            measured on what the kernel was given. Empty where nothing is blocked.
        chosen: Of a removal: which positions of the map were taken out; None before the first call.
    """

    name: str
    calls: dict[int, int]
    tokens: dict[int, int]
    mass: dict[int, float] = field(default_factory=dict)
    chosen: Bool[Tensor, "batch positions"] | None = None

    @classmethod
    def of(cls, name: str, layers: Sequence[int]) -> Effect:
        """Of an intervention that has not fired yet."""
        return cls(name, dict.fromkeys(layers, 0), dict.fromkeys(layers, 0))

    def add(self, layer: int, tokens: int) -> None:
        """One more call in which `tokens` tokens changed."""
        self.calls[layer] += 1
        self.tokens[layer] += tokens

    @property
    def unfired(self) -> list[int]:
        """Layers in which nothing happened."""
        return [layer for layer, calls in self.calls.items() if not calls]

    def __str__(self) -> str:
        layers = list(self.calls)
        if not layers:
            return f"{self.name}: no layers"
        calls, tokens = sum(self.calls.values()), sum(self.tokens.values())
        blocked = f", blocked mass {max(self.mass.values()):g}" if self.mass else ""
        return f"{self.name}: {calls} calls of layers {layers}, {tokens} tokens{blocked}"


class Receipt(Sequence[Effect]):
    """The effects of the interventions of one `intervene`, in their order."""

    def __init__(self, effects: Sequence[Effect]) -> None:
        self._effects = tuple(effects)

    @overload
    def __getitem__(self, index: int) -> Effect: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Effect]: ...
    def __getitem__(self, index: int | slice) -> Effect | Sequence[Effect]:
        return self._effects[index]

    def __len__(self) -> int:
        return len(self._effects)

    def __iter__(self) -> Iterator[Effect]:
        return iter(self._effects)

    def frame(self) -> pd.DataFrame:
        """One row for each intervention and layer: intervention, layer, calls, tokens, mass (NaN: nothing to block)."""
        import pandas as pd

        rows = [
            (effect.name, layer, effect.calls[layer], effect.tokens[layer], effect.mass.get(layer, float("nan")))
            for effect in self
            for layer in effect.calls
        ]
        return pd.DataFrame(rows, columns=["intervention", "layer", "calls", "tokens", "mass"])

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no interventions"
