"""Redirection of attention modules to another attention function.

This is the only file that changes transformers' attention settings. It registers one name with the attention interface,
and dispatches calls by module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

AttentionFunction = Callable[..., tuple[Tensor, "Tensor | None"]]

SWITCHED = "probes_recording"
"""Name of the attention implementation of a redirected module."""


class _Dispatch:
    """Calls the function that an attention module is redirected to.

    Attributes:
        functions: The function of each redirected module.
    """

    def __init__(self, functions: WeakKeyDictionary[nn.Module, AttentionFunction]) -> None:
        self.functions = functions

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if module not in self.functions:
            raise RuntimeError(
                f"this {type(module).__name__} was copied from a model while its attention was recorded: copy the model "
                "outside the block of record_attention"
            )
        return self.functions[module](module, *args, **kwargs)


# A second import of this file in one process, such as a reload, replaces the registered dispatcher. Modules that the
# first import has redirected stay in the table, so the new dispatcher shares it.
_FUNCTIONS: WeakKeyDictionary[nn.Module, AttentionFunction] = getattr(
    AttentionInterface().get(SWITCHED), "functions", WeakKeyDictionary()
)
AttentionInterface.register(SWITCHED, _Dispatch(_FUNCTIONS))


def is_switched(module: nn.Module) -> bool:
    """Return whether an attention module is redirected to another function already."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == SWITCHED


class AttentionSwitch:
    """Make attention modules call a function instead of the model's own, until `restore`.

    Each module gets a copy of its configuration, so other modules that share the configuration are unchanged.

    Args:
        modules: The attention modules. Each has the `config` that names its implementation.
        function: Called with the arguments of an attention function: the module, query, key, value, mask, and options.
    """

    def __init__(self, modules: Iterable[nn.Module], function: AttentionFunction) -> None:
        self.own_configs: dict[nn.Module, PretrainedConfig] = {
            module: module.config  # type: ignore[misc]
            for module in modules
        }
        self._switched_configs: dict[nn.Module, PretrainedConfig] = {}
        for module, config in self.own_configs.items():
            switched = copy.copy(config)
            # The public setter would reject the name, since the model's class does not list it.
            switched._attn_implementation_internal = SWITCHED
            self._switched_configs[module] = switched
            _FUNCTIONS[module] = function
            module.config = switched  # type: ignore[assignment]

    def call_own(self, module: nn.Module, function: AttentionFunction, *args: Any, **kwargs: Any) -> Any:
        """Call a function for a module that has its own configuration back during the call.

        Flash attention chooses its kernel by that configuration.

        Args:
            module: One of the modules.
            function: The attention function.
            args: Further positional arguments of the function.
            kwargs: Keyword arguments of the function.

        Returns:
            The function's output.
        """
        module.config = self.own_configs[module]  # type: ignore[assignment]
        try:
            return function(module, *args, **kwargs)
        finally:
            module.config = self._switched_configs[module]  # type: ignore[assignment]

    def restore(self) -> None:
        """Give every module its own configuration back."""
        for module, config in self.own_configs.items():
            module.config = config  # type: ignore[assignment]
            _FUNCTIONS.pop(module, None)
