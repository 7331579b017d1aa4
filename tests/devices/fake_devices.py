"""Two devices on a machine that has none: tensors that compute on the CPU and carry a device's name.

An operation whose tensors lie on different devices raises, as it does on GPUs. A tensor without dimensions, and indices,
may lie on the CPU. Kernels of a CPU are not used, since torch chooses them by the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

FIRST, SECOND = torch.device("maia:0"), torch.device("maia:1")  # torch names this device and ships no code for it
CPU = torch.device("cpu")
ACROSS_DEVICES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXING = (
    torch.Tensor.__getitem__,
    torch.Tensor.__setitem__,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)


class FakeDeviceTensor(torch.Tensor):
    """A tensor that carries a device's name, with its values on the CPU."""

    on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, device: torch.device) -> FakeDeviceTensor:
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.size(), **layout, device=device)  # type: ignore
        tensor.on_cpu = values
        return tensor

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"{self.on_cpu!r} on {self.device}"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            # Some methods, such as indexing, ask for the device's library before they reach the dispatch below.
            if "not linked with support" not in str(error) and func is not torch.Tensor.tolist:
                raise
        return run_on_fake_devices(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_on_fake_devices(func, args, kwargs or {})


class FakeDevices(TorchDispatchMode):
    """While entered, tensors can be made on and moved to the fake devices."""

    def __enter__(self) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # otherwise torch.tensor moves its values where no mode sees it
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_on_fake_devices(func, args, kwargs or {})


def run_on_fake_devices(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operation on the CPU, and put its result on the device of its tensors, or on the one that it names.

    Raises:
        RuntimeError: If its tensors lie on different devices.
    """
    named_device = kwargs.get("device")
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_cpu_is_allowed = func in INDEXING
    devices = [t.device for t in tensors if t.device != CPU or (t.dim() and not on_cpu_is_allowed)]
    if len(set(devices)) > 1 and func not in ACROSS_DEVICES:
        raise RuntimeError(f"{func}: tensors lie on {' and '.join(sorted({str(device) for device in devices}))}")
    device = torch.device(named_device or (devices[0] if devices else CPU))
    wrappers: dict[int, torch.Tensor] = {}

    def unwrap(leaf: Any) -> Any:
        if isinstance(leaf, FakeDeviceTensor):
            wrappers[id(leaf.on_cpu)] = leaf
            return leaf.on_cpu
        return CPU if isinstance(leaf, torch.device) else leaf

    def wrap(leaf: Any) -> Any:
        if id(leaf) in wrappers:
            # An operation in place returns its tensor; a move to another device that copies nothing is a new one.
            unmoved = wrappers[id(leaf)].device == device
            return wrappers[id(leaf)] if unmoved or func not in ACROSS_DEVICES else FakeDeviceTensor(leaf, device)
        return FakeDeviceTensor(leaf, device) if isinstance(leaf, torch.Tensor) and device != CPU else leaf

    values, named = pytree.tree_map(unwrap, (args, kwargs))
    return pytree.tree_map(wrap, func(*values, **named))
