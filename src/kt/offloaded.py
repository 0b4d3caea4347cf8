"""Weights that accelerate keeps off the devices (`device_map`): in CPU memory, or in files.

Between forwards such a parameter has no content (it is on the meta device), and a write into it is lost at the next
one. So what is only read is read where accelerate keeps it, and a weight that is to be written comes home: its module
holds it on the device that it computes on, and accelerate leaves it there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import KtError
from .memory import free_on, gib


def contents(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state dict in the order of its names, an offloaded tensor only while it is looked at.

    Raises:
        KtError: nobody keeps a tensor's content.
    """
    for name, tensor in sorted(module.state_dict().items()):
        yield name, content(module, name, tensor)


def content(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the module, or what accelerate keeps of it, which is not to be written."""
    if not tensor.is_meta:
        return tensor
    hook, own_name = _hook(module, name)
    return hook.weights_map[own_name]


def bring_home(module: nn.Module, name: str) -> Tensor:
    """Put an offloaded parameter, and the others of its own module, where that module computes, to stay there.

    Raises:
        KtError: nobody keeps its content, it is tied to another weight, or the device has no room for it.
    """
    from accelerate.utils import set_module_tensor_to_device

    hook, own_name = _hook(module, name)
    owner = module.get_submodule(name.rpartition(".")[0])
    if hook.tied_params_names:
        raise KtError(
            f"{name} is offloaded and tied to another weight; load with a device_map that keeps it on a device"
        )
    device = torch.device(hook.execution_device)
    names = [n for n, p in owner.named_parameters(recurse=False) if p.is_meta]
    need, free = sum(hook.weights_map[n].nbytes for n in names), free_on(device)
    if need > free:
        raise KtError(
            f"{name} is offloaded, and to be written it needs {gib(need)} on {device}, where {gib(free)} are free; "
            "load with a device_map that keeps it on a device"
        )
    for n in names:
        # A copy: CPU memory that accelerate shares between modules must not change with this one.
        set_module_tensor_to_device(owner, n, device, value=hook.weights_map[n].clone())
    hook.offload = False
    return owner.get_parameter(own_name).requires_grad_(False)


def require_start(module: nn.Module) -> None:
    """nnsight sends inputs to where the first parameter is, which offloaded is nowhere.

    Raises:
        KtError: it is offloaded.
    """
    name, first = next(module.named_parameters())
    if first.is_meta:
        raise KtError(
            f"{name} comes first and has no content here; keep it on a device (device_map), the rest may be off"
        )


def require_none(module: nn.Module, what: str) -> None:
    """For libraries that move or rewrite what is offloaded (peft writes into the checkpoint's own files).

    Raises:
        KtError: a weight is offloaded.
    """
    off = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if off:
        raise KtError(f"{what} needs all weights on a device, and {len(off)} are offloaded ({off[0]}); use --device")


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes, also when its weights are elsewhere in between."""
    weight: Any = module.weight
    if not weight.is_meta:
        return weight.device
    found = (getattr(hook, "execution_device", None) for hook in _chain(getattr(module, "_hf_hook", None)))
    return torch.device(next((device for device in found if device is not None), weight.device))


def _hook(module: nn.Module, name: str) -> tuple[Any, str]:
    """Accelerate's hook that brings a meta parameter for each forward, and the parameter's name there."""
    path, _, own_name = name.rpartition(".")
    for hook in _chain(getattr(module.get_submodule(path), "_hf_hook", None)):
        kept = getattr(hook, "weights_map", None)
        if getattr(hook, "offload", False) and kept is not None:
            return hook, own_name
    raise KtError(f"{name} is offloaded and has no content (it is on the meta device); load the model with its weights")


def _chain(hook: Any) -> Iterator[Any]:
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
