"""What LLaVA-Mini's forward calls return. Keys and values go by the name that the installed transformers has for them."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class LlavaMiniModelOutputWithPast(BaseModelOutputWithPast):
    """A decoder's output, and the visual tokens that the language model got, in the order of the text."""

    image_hidden_states: Float[Tensor, "tokens width"] | None = None


@dataclass
class LlavaMiniCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Loss and logits, and the visual tokens that the language model got, in the order of the text."""

    image_hidden_states: Float[Tensor, "tokens width"] | None = None


__all__ = ["LlavaMiniCausalLMOutputWithPast", "LlavaMiniModelOutputWithPast"]
