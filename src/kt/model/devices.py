"""Devices, device maps, and weights that accelerate offloads to CPU memory or files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._util.text import count
from ..errors import KtError, UnknownModel
from ..runs import parallel
from .memory import free_on, gib
from .packed import PLAIN, is_packed, is_plain

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

DeviceMap = str | dict[str, int | str]


def read_device_map(source: str | Path | Mapping[str, Any] | None) -> DeviceMap | None:
    """The `device_map` for `from_pretrained`: a strategy, or a mapping {module path: device}, also from a JSON file.

    Devices are `cpu`, `disk`, `cuda:0` or 0.

    Raises:
        KtError: an unknown strategy or file, a device that is not available, or a map with everything on disk.
    """
    if source is None or source in STRATEGIES:
        return source  # type: ignore[return-value]
    parts = source if isinstance(source, Mapping) else _from_file(Path(source))
    wrong = [key for key, device in parts.items() if isinstance(device, bool) or not isinstance(device, int | str)]
    if not parts or wrong or not all(isinstance(key, str) for key in parts):
        raise KtError(
            'a device map is {"module path": device, ...}, such as {"model.layers.0": "cpu"}; see docs/scale.md'
        )
    devices: dict[str, int | str] = {
        key: "disk" if device == "disk" else str(checked_device(device)) for key, device in parts.items()
    }
    if set(devices.values()) == {"disk"}:
        raise KtError("the device map leaves nothing on a device; keep at least the embedding and the head on one")
    return devices


def _from_file(path: Path) -> Mapping[str, Any]:
    choice = f"choose {', '.join(STRATEGIES)}, or name a JSON file (one device: --device)"
    if path.suffix != ".json":
        raise KtError(f"device map {str(path)!r} is unknown; {choice}")
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KtError(f"cannot read device map {path}: {error.strerror or 'no such file'}; {choice}") from None
    except ValueError:
        raise KtError(f"device map {path} is no JSON; {choice}") from None
    if not isinstance(parts, Mapping):
        raise KtError(f'device map {path} holds no {{"module path": device, ...}}; {choice}')
    return parts


def checked_device(device: str | int | torch.device) -> torch.device:
    """The torch device of a name; `auto` is CUDA or MPS if available, else the CPU.

    Raises:
        KtError: the device is not available.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device(f"cuda:{_gpu_of_process()}")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except RuntimeError:
        raise KtError(f"device {device!r} is unknown; choose auto, cpu, cuda:0 or mps") from None
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        available = count(torch.cuda.device_count(), "CUDA device") if torch.cuda.is_available() else "no CUDA device"
        raise KtError(f"device {device!r} was asked for, but PyTorch finds {available} here; use --device cpu or auto")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise KtError("device 'mps' was asked for, but PyTorch finds none here; use --device cpu or auto")
    return chosen


def _gpu_of_process() -> int:
    """The GPU of this process: each process of a machine takes one."""
    rank, n_gpus = parallel.local(), torch.cuda.device_count()
    if rank >= n_gpus:
        raise KtError(
            f"there is no GPU for process {rank} of this machine, which has {n_gpus}; start one process a GPU, or give "
            "--device"
        )
    return rank


# Offloaded weights, which accelerate keeps in CPU memory or files (`device_map`). Between forwards such a parameter is
# on the meta device, without content, and a write into it is lost at the next forward. So reads go to accelerate's
# copy, and a weight to be written is first loaded for good onto the device on which its module computes.


def contents(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the state dict sorted by name; an offloaded tensor is in memory only while its turn lasts.

    Raises:
        KtError: a tensor's content is nowhere.
    """
    for name, tensor in sorted(module.state_dict().items()):
        yield name, content(module, name, tensor)


def content(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the module, or accelerate's copy of an offloaded one (read only)."""
    if not tensor.is_meta:
        return tensor
    hook, parameter = _hook(module, name)
    return hook.weights_map[parameter]


def bring_home(module: nn.Module, name: str) -> Tensor:
    """Load an offloaded parameter and its siblings in the same module onto that module's device, for good.

    Raises:
        KtError: its content is nowhere, it is tied to another weight, or the device has no room for it.
    """
    from accelerate.utils import set_module_tensor_to_device

    hook, parameter = _hook(module, name)
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
        # A copy, since accelerate may share this CPU memory with other modules.
        set_module_tensor_to_device(owner, n, device, value=hook.weights_map[n].clone())
    hook.offload = False
    return owner.get_parameter(parameter).requires_grad_(False)


def require_start(module: nn.Module) -> None:
    """Require a first parameter with content, since nnsight sends inputs to its device.

    Raises:
        KtError: it is offloaded.
    """
    name, first = next(module.named_parameters())
    if first.is_meta:
        raise KtError(
            f"{name} comes first and has no content here; keep it on a device (device_map), the rest may be off"
        )


def require_gradients(what: str) -> None:
    """Refuse, before any work, what needs gradients where torch takes none.

    Raises:
        KtError: inside `torch.inference_mode()`.
    """
    if torch.is_inference_mode_enabled():
        raise KtError(f"{what} takes gradients, and torch.inference_mode() has none; use torch.no_grad() instead")


def refuse_wrapped(module: nn.Module) -> None:
    """Refuse weights that are not the whole of what a layer computes: adapters inside, quantised ones that no packed
    linear map holds (see packed.py).

    Raises:
        UnknownModel: there are some; the message says what to do.
    """
    if any(weight.is_inference() for weight in module.parameters()):
        raise UnknownModel(
            f"{type(module).__name__} was made inside torch.inference_mode(), and such weights cannot be edited; make "
            "it outside, or inside torch.no_grad()"
        )
    inner = next((name for name in ("_orig_mod", "module") if isinstance(getattr(module, name, None), nn.Module)), None)
    if inner is not None:  # torch.compile, DataParallel
        raise UnknownModel(f"{type(module).__name__} wraps a model; give the model itself (model.{inner})")
    adapted = next((name for name, child in module.named_modules() if isinstance(_base_layer(child), nn.Module)), None)
    if adapted is not None or hasattr(module, "get_base_model"):
        where = f" (at {adapted})" if adapted else ""
        raise UnknownModel(
            f"{type(module).__name__} has a PEFT adapter inside{where}: merge it first (model.merge_and_unload(), or "
            "unload() to leave it out) and load what that returns"
        )
    packed = next((name for name, child in module.named_modules() if hasattr(child, "_packed_params")), None)
    if packed is not None:
        raise UnknownModel(
            f"{type(module).__name__} has quantised weights ({packed}); load the model without quantising"
        )
    for name, weight in [*module.named_parameters(), *module.named_buffers()]:
        path, _, own = name.rpartition(".")
        inside = is_plain(weight) and weight.dim() > 1 and weight.dtype not in PLAIN and own in QUANTISED
        if inside and not is_packed(module.get_submodule(path)):
            kind = str(weight.dtype).removeprefix("torch.")
            raise UnknownModel(
                f"{type(module).__name__} has quantised weights ({name} is {kind}); load the model's 16-bit or 32-bit "
                "checkpoint, or dequantise it first (model.dequantize() in transformers)"
            )


QUANTISED = ("weight", "qweight", "weight_packed")
"""Names of a quantised layer's numbers (bitsandbytes and FP8; GPTQ and AWQ; compressed-tensors)."""


def _base_layer(module: nn.Module) -> object:
    """The layer that an adapter wraps, in peft's own name for it."""
    return getattr(module, "base_layer", None)


def require_none(module: nn.Module, what: str) -> None:
    """Require all weights on devices, for libraries that move or rewrite offloaded weights (peft writes into the
    checkpoint's files).

    Raises:
        KtError: a weight is offloaded.
    """
    offloaded = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if offloaded:
        raise KtError(
            f"{what} needs all weights on a device, and {len(offloaded)} are offloaded ({offloaded[0]}); use --device"
        )


def execution_device(module: nn.Module) -> torch.device:
    """The device on which a module computes, also if its weights are offloaded."""
    weight: Any = module.weight
    if not weight.is_meta:
        return weight.device
    devices = (getattr(hook, "execution_device", None) for hook in _hooks(module))
    return torch.device(next((device for device in devices if device is not None), weight.device))


def _hook(module: nn.Module, name: str) -> tuple[Any, str]:
    """Accelerate's hook that loads an offloaded parameter for each forward, and the parameter's name in it."""
    path, _, parameter = name.rpartition(".")
    for hook in _hooks(module.get_submodule(path)):
        if getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None:
            return hook, parameter
    raise KtError(f"{name} is offloaded and has no content (it is on the meta device); load the model with its weights")


def _hooks(module: nn.Module) -> Sequence[Any]:
    """Accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else getattr(hook, "hooks", (hook,))
