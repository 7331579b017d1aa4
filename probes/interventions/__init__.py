"""Changes what some decoder layers see or say, and accounts for every change in a receipt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from transformers import PreTrainedModel

from probes.hooks.decoder import find_decoder
from probes.hooks.token_window import TokenWindow
from probes.interventions.effects import Effect, Receipt
from probes.interventions.knockout import BlockAttention
from probes.interventions.patching import PatchActivations
from probes.interventions.removal import RemoveTokens
from probes.tokens.token_map import TokenMap

__all__ = ["BlockAttention", "Effect", "PatchActivations", "Receipt", "RemoveTokens", "intervene"]

Intervention = BlockAttention | RemoveTokens | PatchActivations


@contextmanager
def intervene(model: PreTrainedModel, tokens: TokenMap, *interventions: Intervention) -> Iterator[Receipt]:
    """Intervenes in all forward calls of the model inside the block: a prompt, or a prompt and its cached decoding.

    Interventions compose, also in nested blocks; edges count as blocked even where another intervention drops an end of
    theirs. They compose with `record_attention` and `record_states` in either order: recorded queries do not see a
    removed or blocked source, so their mass on it is NaN in these layers, and removed tokens are no queries there.

    Args:
        model: A transformers model whose decoder runs sdpa or eager attention.
        tokens: Map of the inputs that the model will be called with.
        interventions: What to do, where.

    Yields:
        The receipt, with one `Effect` for each intervention.

    Raises:
        ValueError: An unknown layer or group, a model that cannot be probed, or a call that `tokens` do not fit.
        RuntimeError: A layer whose attention does not follow its mask; on leaving, a layer in which an intervention
            did nothing, unless an exception is on its way already.
    """
    decoder = find_decoder(model, tokens.stack)
    window = TokenWindow(decoder, tokens)
    with ExitStack() as stack:
        receipt = Receipt([intervention.install(decoder, window, stack) for intervention in interventions])
        if any(effect.calls for effect in receipt):
            stack.enter_context(window)
        yield receipt
    for effect in receipt:
        if effect.unfired:
            raise RuntimeError(
                f"{effect.name} did nothing in layers {effect.unfired}: "
                "the model did not run, or it has no such token there"
            )
