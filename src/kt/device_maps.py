"""Which parts of a model go to which device: one of transformers' ways, or names of modules with a device each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import ranks
from .errors import KtError

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
