"""Outputs of LLaVA-Mini's forward calls."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class LlavaMiniModelOutputWithPast(BaseModelOutputWithPast):
    """Hold the output of [`LlavaMiniModel`].

    Keys and values have the field name that the installed transformers gives them.

    Args:
        image_hidden_states (`torch.FloatTensor` of shape `(tokens, width)`, *optional*):
            Visual tokens that the language model received, in the order of the text.
    """

    image_hidden_states: Float[Tensor, "tokens width"] | None = None


@dataclass
class LlavaMiniCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Hold the output of [`LlavaMiniForConditionalGeneration`]: loss, logits and visual tokens.

    Args:
        image_hidden_states (`torch.FloatTensor` of shape `(tokens, width)`, *optional*):
            Visual tokens that the language model received, in the order of the text.
    """

    image_hidden_states: Float[Tensor, "tokens width"] | None = None


__all__ = ["LlavaMiniCausalLMOutputWithPast", "LlavaMiniModelOutputWithPast"]
