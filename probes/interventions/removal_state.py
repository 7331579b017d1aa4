"""State that the layers of one `RemoveTokens` share: the chosen tokens and their new positions."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

from probes.hooks.token_window import TokenWindow
from probes.interventions.effects import Effect
from probes.interventions.position_ids import PositionRenumbering
from probes.interventions.selection import (
    DeferredTokenSelector,
    PerCallCache,
    TokenSelection,
    When,
    acts_in_current_call,
)


class RemovalState:
    """State that the layers of a `RemoveTokens` share.

    Args:
        decoder: The stack of decoder layers.
        window: The positions of the map that the current call covers.
        group: The tokens to remove.
        when: The calls in which to act.
        positions: "keep" or "renumber".
        effect: Gets the chosen tokens.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        window: TokenWindow,
        group: DeferredTokenSelector,
        when: When,
        positions: Literal["keep", "renumber"],
        effect: Effect,
    ) -> None:
        self.window, self.when, self.effect = window, when, effect
        self.selection = TokenSelection(window, group)
        self.once_per_call = PerCallCache(window)
        self.renumbering = (
            PositionRenumbering(decoder, self.selection, self.once_per_call) if positions == "renumber" else None
        )

    @property
    def is_active(self) -> bool:
        """Return whether tokens are removed in the current call."""
        return acts_in_current_call(self.window, self.when)

    def begin(self) -> None:
        """Choose the tokens at the first layer of a call; later layers of the call find them chosen."""
        self.once_per_call("begin", self.selection.begin)
        self.effect.chosen = self.selection.chosen

    def count_empty_choice(self, layer: int) -> None:
        """Count the call of a layer if a callable chose no token for it: that is an outcome, not a mistake."""
        if self.selection.is_deferred and self.is_active and not self.selection.chosen.any():
            self.effect.add(layer, 0)
