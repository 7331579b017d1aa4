"""Eager execution of compiled code, which would otherwise skip hooks."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from probes.hooks.decoder import decoder_layers, mask_format

_lock = threading.Lock()
_open_blocks = 0
_stance: Any = None


class EagerExecution:
    """Run compiled code eagerly while used as a context manager, and compile only the kernel of flex attention.

    Code from `torch.compile` has no guard on hooks: it keeps those that a module had when it was compiled. So a probe
    would have no effect on a decoding step that `generate` compiled earlier. Code compiled inside a probe's block would
    keep the probe after it. The setting, `torch.compiler.set_stance`, holds for all threads of the process.

    Args:
        decoder: The stack of decoder layers that is probed.

    Raises:
        RuntimeError: On entry, inside compiled code.

    Example:
        >>> from probes.hooks.decoder import find_decoder
        >>> compiled = torch.compile(lambda x: torch.compiler.is_compiling())
        >>> with EagerExecution(find_decoder(model)):
        ...     compiled(torch.ones(1))
        False
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        global _open_blocks, _stance
        with _lock:
            if not _open_blocks:
                _stance = torch.compiler.set_stance("force_eager")
            _open_blocks += 1
        if mask_format(self.decoder.config._attn_implementation) != "flex":  # type: ignore[union-attr, arg-type]
            return
        # Eager flex attention would hold the whole matrix of scores.
        for layer in decoder_layers(self.decoder):
            if hasattr(layer, "self_attn"):
                attention = layer.get_submodule("self_attn")
                self._handles.append(attention.register_forward_pre_hook(_before_flex_kernel))
                self._handles.append(attention.register_forward_hook(_after_flex_kernel, always_call=True))

    def __exit__(self, *exception: object) -> None:
        global _open_blocks
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        with _lock:
            _open_blocks -= 1
            # Blocks of several threads may close in any order: the last one restores the setting.
            if not _open_blocks:
                _stance.__exit__(None, None, None)


def _before_flex_kernel(attention: nn.Module, args: Any) -> None:
    _stance.__exit__(None, None, None)


def _after_flex_kernel(attention: nn.Module, args: Any, output: Any) -> None:
    _stance.__enter__()
