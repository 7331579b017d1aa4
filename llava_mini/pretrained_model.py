"""Base class of the LLaVA-Mini models: weight initialisation and checkpoint loading."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlavaPreTrainedModel, PreTrainedModel

from .checkpoint_files import MODEL_FILES, name_damaged_file
from .compressors import COMPRESSORS, Compressor
from .compressors.attention import MultiHeadAttention
from .configuration import COPYING_INITS, LlavaMiniConfig

# Parameters of LLaVA-Mini that an ordinary LLaVA checkpoint lacks.
NEW_MODULE_NAMES = re.compile(r"(^|\.)(compressor|prefusion)\.")


class LlavaMiniPreTrainedModel(LlavaPreTrainedModel):
    """Initialise weights and load checkpoints, for all LLaVA-Mini models."""

    config: LlavaMiniConfig
    config_class = LlavaMiniConfig
    # Queries and linear maps of a compressor must be on one device.
    _no_split_modules = sorted({compressor.__name__ for compressor in COMPRESSORS.values()})

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Compressor | MultiHeadAttention):
            module.reset_parameters()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise weights that were not loaded, as in transformers, and pre-fusion as `prefusion_init` states."""
        super().initialize_weights()
        # Transformers also calls this while it builds LlavaModel, before pre-fusion exists.
        model: Any = self.base_model
        prefusion = getattr(model, "prefusion", None)
        if prefusion is None or self.config.prefusion_init == "fresh":
            return
        if self.config.prefusion_init in COPYING_INITS:
            prefusion.copy_layers(model.language_model.layers)
            if self.config.prefusion_init == "identity":
                prefusion.zero_outputs()
        elif not all(getattr(p, "_is_hf_initialized", False) for p in prefusion.parameters()):
            prefusion.load_file(self.config.prefusion_init)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """Load a model, as in transformers, from a LLaVA-Mini checkpoint or an ordinary LLaVA checkpoint.

        With the latter, compressor and pre-fusion layers are newly initialised. In 8 and 4 bits, these modules and the
        projector are not quantised.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder, or a name on the model hub.
            model_args, kwargs:
                As in [`PreTrainedModel.from_pretrained`], among them fields of [`LlavaMiniConfig`].
            output_loading_info (`bool`, *optional*, defaults to `False`):
                Whether to return a dictionary with missing, unexpected and mismatched keys as well.

        Raises:
            ValueError: If the checkpoint lacks weights of the vision tower, the projector or the language model, or one
                of its files is damaged.

        Example:
            >>> mini.save_pretrained("mini")
            >>> type(mini).from_pretrained("mini").config.compressor
            'query'
        """
        quantization = kwargs.get("quantization_config")
        if isinstance(quantization, dict) and (quantization.get("load_in_8bit") or quantization.get("load_in_4bit")):
            quantization = BitsAndBytesConfig(**quantization)
            kwargs["quantization_config"] = quantization
        if isinstance(quantization, BitsAndBytesConfig) and quantization.llm_int8_skip_modules is None:
            kwargs["quantization_config"] = quantization = copy.copy(quantization)
            unquantised = ["model.compressor", "model.prefusion", "model.multi_modal_projector", "lm_head"]
            quantization.llm_int8_skip_modules = unquantised
        name, subfolder = pretrained_model_name_or_path, kwargs.get("subfolder") or ""
        with name_damaged_file(name, MODEL_FILES, subfolder):
            loaded: Any = super().from_pretrained(name, *model_args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = sorted(key for key in info["missing_keys"] if not NEW_MODULE_NAMES.search(key))
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} is not a complete LLaVA checkpoint: it lacks {len(missing)} weights of "
                f"LLaVA itself, the first of them {missing[0]}"
            )
        return (model, info) if output_loading_info else model


def check_plain_weights(model: PreTrainedModel) -> None:
    """Check that a model's weights can be copied into another: in memory, not quantised, and without adapters.

    Raises:
        ValueError: If they cannot.
    """
    reasons = {
        "has adapters; merge them first (merge_and_unload of peft)": getattr(model, "_hf_peft_config_loaded", False),
        "is quantised; load it without quantization_config": any(
            not parameter.is_floating_point() for parameter in model.parameters()
        ),
        "is offloaded in part; load it without device_map": any(parameter.is_meta for parameter in model.parameters()),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"the {type(model).__name__} {reason}")


__all__ = ["LlavaMiniPreTrainedModel", "check_plain_weights"]
