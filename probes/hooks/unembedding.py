"""The way from hidden states to logits: the language model's final norm and its head."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.decoder import FAMILIES, find_decoder
from probes.tokens.token_map import TokenMap

# What families call the norm between the last layer and the head.
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "norm_f", "ln_f")


class Unembedding:
    """From the language model's residual stream to logits: its final norm, the model's head, and the soft cap of Gemma.

    Raises ValueError for a model without a head, or whose final norm is not found, and for a map of pre-fusion layers:
    what leaves them goes into the language model, not to its head.
    """

    def __init__(self, model: PreTrainedModel, tokens: TokenMap) -> None:
        if tokens.stack != "decoder":
            raise ValueError(
                f"only the language model's states can be read as words; this map is of its {tokens.stack}"
            )
        decoder, head = find_decoder(model, families=FAMILIES.values()), model.get_output_embeddings()
        norms = [name for name in FINAL_NORMS if isinstance(getattr(decoder, name, None), nn.Module)]
        if head is None or not norms:
            missing = (
                f"no head ({type(model).__name__})" if head is None else f"no final norm ({type(decoder).__name__})"
            )
            raise ValueError(f"this model has {missing}: its residual stream cannot be read as words")
        self.norm: nn.Module = decoder.get_submodule(norms[0])
        self.head: nn.Linear = head
        self.cap: float | None = getattr(decoder.config, "final_logit_softcapping", None)

    def __call__(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """Logits in float32."""
        # The norm's own forward: whoever hooks the norm waits for the model's call, not for ours.
        logits = self.head(self.norm.forward(hidden)).float()
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    @torch.no_grad()
    def check(self, hidden: Float[Tensor, "*rows width"], logits: Float[Tensor, "*rows vocabulary"]) -> None:
        """Raises ValueError unless the model's own `logits` come of the last layer's `hidden` in just this way.

        Some models scale or shift their logits: read in any other way, their words would be wrong without a sign.
        """
        own = logits.float()
        # Products of other shapes round otherwise: in bf16 by the type's step, on GPUs in float32 by TF32's.
        slack = max(4 * torch.finfo(logits.dtype).eps, 1e-3) * own.abs().max()
        if not torch.allclose(self(hidden).to(own.device), own, rtol=0, atol=float(slack)):
            raise ValueError("this model's logits are not its final norm and head alone: the lens cannot read it")
