"""What the layers of one `RemoveTokens` share: the chosen tokens and their new positions."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

from probes.hooks.token_window import TokenWindow
from probes.interventions.effects import Effect
from probes.interventions.position_ids import Renumbering
from probes.interventions.selection import LateTokens, OncePerCall, Selection, When, acts


class RemovalState:
    """What the layers of a `RemoveTokens` have in common."""

    def __init__(
        self,
        decoder: PreTrainedModel,
        window: TokenWindow,
        group: LateTokens,
        when: When,
        positions: Literal["keep", "renumber"],
        effect: Effect,
    ) -> None:
        self.window, self.when, self.effect = window, when, effect
        self.selection = Selection(window, group)
        self.once = OncePerCall(window)
        self.renumbering = Renumbering(decoder, self.selection, self.once) if positions == "renumber" else None

    @property
    def acts(self) -> bool:
        """Whether tokens are taken out in this call."""
        return acts(self.window, self.when)

    def begin(self) -> None:
        """At each layer's call: the tokens are chosen, if they have not been yet."""
        self.once("begin", self.selection.begin)
        self.effect.chosen = self.selection.chosen
