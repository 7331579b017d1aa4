"""Changes to the input or output of some decoder layers, with a receipt of every change."""

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
from probes.interventions.swapping import Swaps, swap_images
from probes.tokens.token_map import TokenMap

__all__ = [
    "BlockAttention",
    "Effect",
    "PatchActivations",
    "Receipt",
    "RemoveTokens",
    "Swaps",
    "intervene",
    "swap_images",
]

Intervention = BlockAttention | RemoveTokens | PatchActivations


@contextmanager
def intervene(model: PreTrainedModel, tokens: TokenMap, *interventions: Intervention) -> Iterator[Receipt]:
    """Intervene in all forward calls of the model inside the block.

    The calls may be those of a prompt, or of a prompt and its cached decoding. Interventions compose, also in nested
    blocks. An edge counts as blocked even if another intervention drops one of its tokens.

    Interventions compose with `record_attention` and `record_states` in either order. Recorded queries cannot attend to
    a removed or blocked source, so their mass on it is NaN in these layers. Removed tokens are no queries there.

    Args:
        model: A transformers model whose decoder runs sdpa or eager attention.
        tokens: Map of the inputs that the model will be called with.
        interventions: `BlockAttention`, `RemoveTokens` or `PatchActivations`, each with its tokens and layers.

    Yields:
        The receipt, with one `Effect` for each intervention.

    Raises:
        TypeError: Something that is no intervention, such as a list of them.
        ValueError: An unknown layer or group, a model that cannot be probed, or a call that does not fit `tokens`.
        RuntimeError: A layer whose attention does not follow its mask. On leaving the block: a layer in which an
            intervention changed nothing, unless another exception is being raised.

    Example:
        >>> from probes import RemoveTokens, intervene
        >>> with torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", layers=range(2, 4))) as receipt:
        ...     logits = model(**inputs).logits
        >>> print(receipt)
        RemoveTokens(vision): 2 calls of layers [2, 3], 72 tokens
    """
    for given in interventions:
        if not hasattr(given, "install"):
            raise TypeError(
                f"interventions: found a {type(given).__name__}; pass each intervention as an argument of its own"
            )
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
                "the model did not run inside the block, it has no such token there, or another intervention had already "
                "cut these edges"
            )
