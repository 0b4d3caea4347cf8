"""Which parts of a model go to which device: one of transformers' ways, or names of modules with a device each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import KtError
from ..runs import parallel as ranks
from .memory import free_on, gib

WAYS = ("auto", "balanced", "balanced_low_0", "sequential")
OFFLOADED = ("cpu", "disk")

DeviceMap = str | dict[str, int | str]


def read_device_map(given: str | Path | Mapping[str, Any] | None) -> DeviceMap | None:
    """What `from_pretrained` takes: a way, or a mapping {module path: device}, which may come from a JSON file.

    Devices are `cpu`, `disk`, `cuda:0` or 0; they are looked for.

    Raises:
        KtError: no such way or file, no such device here, or nothing that is on a device.
    """
    if given is None or given in WAYS:
        return given  # type: ignore[return-value]
    parts = given if isinstance(given, Mapping) else _from_file(Path(given))
    wrong = [key for key, device in parts.items() if isinstance(device, bool) or not isinstance(device, int | str)]
    if not parts or wrong or not all(isinstance(key, str) for key in parts):
        raise KtError(
            'a device map is {"module path": device, ...}, such as {"model.layers.0": "cpu"}; see docs/scale.md'
        )
    found: dict[str, int | str] = {}
    for key, device in parts.items():
        found[key] = "disk" if device == "disk" else str(checked_device(device))
    if set(found.values()) == {"disk"}:
        raise KtError("the device map leaves nothing on a device; keep at least the embedding and the head on one")
    return found


def _from_file(path: Path) -> Mapping[str, Any]:
    choice = f"choose {', '.join(WAYS)}, or name a JSON file (one device: --device)"
    if path.suffix != ".json":
        raise KtError(f"device map {str(path)!r} is unknown; {choice}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KtError(f"cannot read device map {path}: {error.strerror or 'no such file'}; {choice}") from None
    except ValueError:
        raise KtError(f"device map {path} is no JSON; {choice}") from None
    if not isinstance(found, Mapping):
        raise KtError(f'device map {path} holds no {{"module path": device, ...}}; {choice}')
    return found


def checked_device(device: str | int) -> torch.device:
    """A device that is here; `auto` is CUDA or MPS where there is one.

    Raises:
        KtError: there is none of that name.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device(f"cuda:{_own_gpu()}")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except RuntimeError:
        raise KtError(f"device {device!r} is unknown; choose auto, cpu, cuda:0 or mps") from None
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        found = f"{torch.cuda.device_count()} CUDA device(s)" if torch.cuda.is_available() else "no CUDA device"
        raise KtError(f"device {device!r} was asked for, but PyTorch finds {found} here; use --device cpu or auto")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise KtError("device 'mps' was asked for, but PyTorch finds none here; use --device cpu or auto")
    return chosen


def _own_gpu() -> int:
    """One GPU a process."""
    own, there = ranks.local(), torch.cuda.device_count()
    if own >= there:
        raise KtError(
            f"there is no GPU for process {own} of this machine, which has {there}; start one process a GPU, or give "
            "--device"
        )
    return own


# Weights that accelerate keeps off the devices (`device_map`): in CPU memory, or in files.
#
# Between forwards such a parameter has no content (it is on the meta device), and a write into it is lost at the next
# one. So what is only read is read where accelerate keeps it, and a weight that is to be written comes home: its
# module
# holds it on the device that it computes on, and accelerate leaves it there.


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
