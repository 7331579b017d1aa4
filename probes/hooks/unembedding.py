"""Unembedding: the final norm and the head that turn hidden states of the language model into logits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.decoder import MASK_FORMATS, find_decoder
from probes.tokens.token_map import TokenMap
from probes.unwrapping import require_model

# Names of the norm between the last layer and the head in the supported model families.
FINAL_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "norm_f", "ln_f")


class Unembedding:
    """Map the residual stream to logits: final norm, output head, and the soft cap of Gemma models.

    Args:
        model: A model with an output head.
        tokens: Token map of the language model.

    Raises:
        ValueError: If the model has no head or no recognized final norm, or the map describes pre-fusion layers, whose
            output enters the language model and not its head.

    Example:
        >>> unembed = Unembedding(model, tokens)
        >>> unembed(torch.zeros(2, model.config.text_config.hidden_size)).shape[0]
        2
    """

    def __init__(self, model: PreTrainedModel, tokens: TokenMap) -> None:
        if tokens.stack != "decoder":
            raise ValueError(
                f"this token map describes the {tokens.stack} stack; only states of the decoder can be unembedded"
            )
        model = require_model(model)
        decoder, head = find_decoder(model, mask_formats=MASK_FORMATS.values()), model.get_output_embeddings()
        if hasattr(decoder, "altup_unembed_projections"):
            raise ValueError(
                f"{type(decoder).__name__} has several residual streams (AltUp): they cannot be unembedded"
            )
        norms = [name for name in FINAL_NORM_NAMES if isinstance(getattr(decoder, name, None), nn.Module)]
        if head is None or not norms:
            missing = (
                f"no head ({type(model).__name__})" if head is None else f"no final norm ({type(decoder).__name__})"
            )
            raise ValueError(f"the model has {missing}, so its residual stream cannot be unembedded")
        self.norm: nn.Module = decoder.get_submodule(norms[0])
        self.head: nn.Linear = head
        # accelerate's mixed precision returns logits in float32 that were computed in half precision.
        self.rounding = torch.finfo(torch.bfloat16).eps if "_original_forward" in vars(model) else 0.0
        self.cap: float | None = getattr(decoder.config, "final_logit_softcapping", None)

    def __call__(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """Return the logits of hidden states, in float32."""
        # Calls the norm's forward directly, because hooks on the norm must fire only in the model's own call.
        logits = self.head(self.norm.forward(hidden)).float()
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    @torch.no_grad()
    def check(self, hidden: Float[Tensor, "*rows width"], logits: Float[Tensor, "*rows vocabulary"]) -> None:
        """Check that the unembedding reproduces the model's own logits.

        Some models scale or shift their logits; reading them without this step would give wrong words unnoticed.

        Args:
            hidden: Output of the last layer.
            logits: Logits that the model returned for it.

        Raises:
            ValueError: If the logits differ by more than rounding.
        """
        expected = logits.float()
        # Matrix products of other shapes round differently: by the step of bf16, or by TF32's on GPUs in float32.
        tolerance = max(4 * torch.finfo(logits.dtype).eps, 4 * self.rounding, 1e-3) * expected.abs().max()
        if not torch.allclose(self(hidden).to(expected.device), expected, rtol=0, atol=float(tolerance)):
            raise ValueError(
                "the model's logits differ from its final norm and head applied to the last layer; "
                "the lens cannot read this model"
            )
