"""What is installed, and what the machine is: for manifests and for `kt env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

PACKAGES = ("kt", "torch", "nnsight", "transformers", "safetensors", "accelerate", "numpy", "scipy", "plotly")
OPTIONAL = ("kaleido", "datasets", "peft", "lm_eval")


def version(package: str) -> str | None:
    """The installed version, read from the package's metadata: nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python and the packages that a result can depend on."""
    found = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **{name: v for name, v in found.items() if v is not None}}


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process so far, and of each CUDA device that it used."""
    peak = {}
    if sys.platform != "win32":
        import resource

        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak |= {f"cuda:{i}": torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())}
    return peak


def environment() -> dict[str, Any]:
    """Everything that `kt env` shows."""
    import torch

    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    optional = {name: version(name) for name in OPTIONAL}
    return {
        "versions": versions(),
        "optional": optional,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": devices,
        "image_export": _browser(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


_VARIABLES = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "NO_COLOR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def _browser() -> str | None:
    """The browser that kaleido can draw PNG and SVG with."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((name for name in names if shutil.which(name)), None)
