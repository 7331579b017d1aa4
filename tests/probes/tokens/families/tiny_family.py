"""The smallest form of a model family, with a byte tokenizer; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

LAYERS = 3
# Ten times the usual scale, so that attention is far from uniform.
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
# Parts of the names of modules between the vision tower and the language model.
BRIDGES = ("projector", "connector", "qformer", "query_tokens", "language_projection")
# Architectures whose own forward pass fails in a version of transformers. Tests that need no forward pass still run.
BROKEN_FORWARD = {
    ("Llama4ForConditionalGeneration", "5.24.0"): "AttributeError: 'MoeCausalLMOutputWithPast' has no 'image_outputs'",
}


@dataclass(frozen=True)
class TinyFamily:
    """A model family in its smallest form.

    Args:
        architecture: The model class.
        config: Returns the config, given the tokenizer.
        processor: The processor of the family.
        mark: Placeholder of an image in the text that the processor receives.
        vision: Substring of the names of modules that process pixels.
    """

    architecture: type[PreTrainedModel]
    config: Callable[[PreTrainedTokenizerFast], PretrainedConfig]
    processor: ProcessorMixin
    mark: str
    vision: str = "vision"

    def model(self, implementation: str = "sdpa") -> PreTrainedModel:
        """Return a model with the same random weights for every implementation, also where they initialise to zero.

        Its forward pass skips the test if that of transformers is broken in this version.
        """
        torch.manual_seed(0)
        model = self.architecture(self.config(self.processor.tokenizer)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in (self.vision, *BRIDGES)):
                    parameter.normal_(0, 0.2)
        model.set_attn_implementation(implementation)
        broken = BROKEN_FORWARD.get((self.architecture.__name__, transformers.__version__))
        if broken:
            reason = f"{self.architecture.__name__} of transformers {transformers.__version__} raises {broken}"
            model.register_forward_pre_hook(lambda *_: pytest.skip(reason))
        return model

    def __call__(self, texts: Sequence[str], images: Sequence[Sequence[Any]], side: str = "left", **kwargs: Any) -> Any:
        """Return the inputs of a batch; `#` in the texts stands for an image."""
        texts = [text.replace("#", self.mark) for text in texts]
        nested = [list(row) for row in images] or None
        kwargs |= {
            "padding": True,
            "padding_side": side,
            "return_tensors": "pt",
        }  # InternVL's processor pads left by default
        return self.processor(text=texts, images=nested, **kwargs)


def tokenizer(specials: Sequence[str] = (), **named: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte, with the special tokens of the family."""
    first = ["<pad>", "<bos>", "<eos>", *specials, *named.values()]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*first, *letters])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(first)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_specific_special_tokens=named,
    )


def attentions(output: Any) -> tuple[Tensor, ...]:
    """Return the attention weights of the language model, which BLIP-2 returns in an output of their own."""
    return getattr(output, "language_model_outputs", output).attentions  # type: ignore[no-any-return]
