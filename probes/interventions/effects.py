"""Effects of interventions: where each one fired, on how many tokens, and the attention left on blocked edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

from jaxtyping import Bool
from torch import Tensor

from probes.optional_packages import require_package

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Effect:
    """The changes that one intervention made, by decoder layer.

    Attributes:
        name: The intervention and its tokens, such as `BlockAttention(vision -> instruction)`.
        calls: Number of forward calls of each layer in which the intervention changed something, or in which the
            callable of a removal chose no token.
        tokens: Number of tokens that it changed there, over all samples and calls.
        mass: The most attention, over heads, queries and calls, that a changed query still has on its blocked keys. It
            is measured on the kernel's own arguments. Empty if nothing is blocked.
        chosen: Mask of the positions of the map that a removal took out; None before the first call, and for other
            interventions.
    """

    name: str
    calls: dict[int, int]
    tokens: dict[int, int]
    mass: dict[int, float] = field(default_factory=dict)
    chosen: Bool[Tensor, "batch positions"] | None = None

    @classmethod
    def before_calls(cls, name: str, layers: Sequence[int]) -> Effect:
        """Return the effect of an intervention that has not fired yet."""
        return cls(name, dict.fromkeys(layers, 0), dict.fromkeys(layers, 0))

    def add(self, layer: int, tokens: int) -> None:
        """Count one more call of a layer, in which `tokens` tokens changed."""
        self.calls[layer] += 1
        self.tokens[layer] += tokens

    @property
    def unfired(self) -> list[int]:
        """Return the layers in which the intervention changed nothing."""
        return [layer for layer, calls in self.calls.items() if not calls]

    def __str__(self) -> str:
        layers = list(self.calls)
        if not layers:
            return f"{self.name}: no layers"
        calls, tokens = sum(self.calls.values()), sum(self.tokens.values())
        blocked = f", blocked mass {max(self.mass.values()):g}" if self.mass else ""
        return f"{self.name}: {calls} calls of layers {layers}, {tokens} tokens{blocked}"


class Receipt(Sequence[Effect]):
    """The effects of the interventions of one `intervene`, in their order.

    Example:
        >>> from probes import BlockAttention, intervene
        >>> with torch.no_grad(), intervene(model, tokens, BlockAttention("vision", "instruction", [3])) as receipt:
        ...     output = model(**inputs)
        >>> receipt[0].calls, receipt[0].tokens, receipt[0].mass
        ({3: 1}, {3: 6}, {3: 0.0})
    """

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
        """Return the receipt as a table.

        Returns:
            A row for each intervention and layer. The columns are intervention, layer, calls, tokens, mass (NaN if
            nothing is blocked).

        Example:
            >>> from probes import RemoveTokens, intervene
            >>> with torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", [3])) as receipt:
            ...     output = model(**inputs)
            >>> receipt.frame()[["intervention", "layer", "tokens"]].values.tolist()
            [['RemoveTokens(vision)', 3, 36]]
        """
        require_package("pandas", "Receipt.frame")
        import pandas as pd

        rows = [
            (effect.name, layer, effect.calls[layer], effect.tokens[layer], effect.mass.get(layer, float("nan")))
            for effect in self
            for layer in effect.calls
        ]
        return pd.DataFrame(rows, columns=["intervention", "layer", "calls", "tokens", "mass"])

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no interventions"
