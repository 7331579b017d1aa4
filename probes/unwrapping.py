"""The transformers model inside wrappers such as PEFT's, `torch.compile`'s or those for several devices."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Name of the wrapped module in OptimizedModule, in DataParallel, DistributedDataParallel, DeepSpeed's engine and
# AveragedModel, and in torch's checkpoints of layers. All of these run its hooks.
_MODULE_NAMES = ("_orig_mod", "module", "_checkpoint_wrapped_module")
# The same in PEFT's models and in the tuner inside them.
_MODEL_NAMES = (*_MODULE_NAMES, "base_model", "model")
# Name of the model inside TransformerLens' bridge and nnsight's NNsight, which change how it is called.
_INNER_MODEL_NAMES = ("original_model", "_module")


def unwrap_module(module: Any) -> Any:
    """Return the module that `torch.compile` or a wrapper for several devices calls.

    Args:
        module: Any module, such as a decoder layer.

    Returns:
        The wrapped module, or `module` itself if it is no wrapper.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> unwrap_module(torch.nn.DataParallel(torch.compile(layer))) is layer
        True
    """
    return _unwrap(module, _MODULE_NAMES)


def unwrap_model(model: Any) -> Any:
    """Return the transformers model inside any nesting of wrappers.

    Known are PEFT's models, `torch.compile`'s OptimizedModule, DataParallel, DistributedDataParallel, DeepSpeed's engine
    (not tested), and what accelerate's `prepare` returns. A probe on the inner model also acts in calls of the wrapper.
    `fully_shard` needs no unwrapping.

    Args:
        model: A transformers model, or a wrapped one.

    Returns:
        The transformers model. An object that holds none is returned as it is unwrapped so far.

    Raises:
        ValueError: If the active PEFT adapter adds tokens to the prompt, which no token map describes, or the wrapper is
            FullyShardedDataParallel, whose parameters exist only inside its own calls.

    Example:
        >>> unwrap_model(torch.compile(model)) is model
        True
    """
    return _unwrap(model, _MODEL_NAMES)


def require_model(model: Any) -> PreTrainedModel:
    """Return `unwrap_model(model)`.

    Raises:
        ValueError: If it is no transformers model.
    """
    inner = unwrap_model(model)
    if not isinstance(inner, PreTrainedModel):
        names = [name for name in _INNER_MODEL_NAMES if isinstance(getattr(inner, name, None), PreTrainedModel)]
        advice = f"its {names[0]}" if names else "the one inside it"
        raise ValueError(f"a {type(inner).__name__} cannot be probed: pass a transformers model, or {advice}")
    return inner


def require_eval_mode(model: Any) -> PreTrainedModel:
    """Return `unwrap_model(model)`.

    Raises:
        ValueError: If it is no transformers model, or is in training mode, where dropout makes each pass another one.
    """
    inner = require_model(model)
    if inner.training:
        raise ValueError("the model is in training mode, where dropout changes each pass: call model.eval() first")
    return inner


def _unwrap(module: Any, names: tuple[str, ...]) -> Any:
    """Return the innermost module of a chain in which each module has one child, of one of these names."""
    while isinstance(module, nn.Module) and not isinstance(module, PreTrainedModel):
        _refuse_prompt_learning(module)
        if type(module).__name__ == "FullyShardedDataParallel":  # by name: its import is slow
            raise ValueError(
                "a model in FullyShardedDataParallel cannot be probed, since its parameters exist only inside its calls: "
                "use torch.distributed.fsdp.fully_shard, or probe the model without the wrapper"
            )
        name, *others = module._modules or (None,)
        if others or name not in names:
            break
        module = module._modules[name]
    return module


def _refuse_prompt_learning(module: nn.Module) -> None:
    adapter = vars(module).get("_peft_config") or vars(module).get("peft_config")
    active = vars(module).get("active_adapter")
    config = adapter.get(active) if isinstance(adapter, dict) and isinstance(active, str) else None
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"PEFT adapter {active!r} ({type(config).__name__}) adds tokens that the token map lacks: "
            "probe model.get_base_model(), and call that"
        )
