"""Versions, machine and the `results.json` envelope, for manifests and for `kt env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import __version__

PACKAGES = ("torch", "nnsight", "transformers", "safetensors", "accelerate", "numpy", "scipy", "plotly")
OPTIONAL = ("kaleido", "datasets", "peft", "lm_eval")


def version(package: str) -> str | None:
    """The installed version of a package (None if missing), from its metadata, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python, kt and the packages that a result can depend on."""
    found = {name: version(name) for name in PACKAGES}
    own = {"python": platform.python_version(), "kt": __version__}
    return own | {name: v for name, v in found.items() if v is not None}


_earlier: dict[str, int] = {}
"""The peaks before the last time that they began anew."""


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process so far, and of each CUDA device that it used."""
    now = _peaks()
    return {name: max(now.get(name, 0), _earlier.get(name, 0)) for name in {**_earlier, **now}}


def peaks_from_now() -> Callable[[], dict[str, int]]:
    """A function that gives the peak bytes since this call: of each CUDA device, and of the host where that can begin
    anew (Linux). `peak_memory` goes on with the peaks of the whole process."""
    _earlier.update(peak_memory())
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return lambda: {name: size for name, size in _peaks().items() if name != "host"}
    return _peaks


def _peaks() -> dict[str, int]:
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
    """The content of `kt env`."""
    import torch

    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {
        "versions": versions(),
        "optional": {name: version(name) for name in OPTIONAL},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": devices,
        "image_export": _browser(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


_VARIABLES = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "NO_COLOR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def _browser() -> str | None:
    """The browser with which kaleido can draw PNG and SVG."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((name for name in names if shutil.which(name)), None)


PACKAGE = Path(__file__).parents[1]
_INTERVAL = frozenset({"mean", "ci95", "n"})
_SECONDS = 5.0


def envelope(manifest: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `results.json`, readable without its run folder; key names follow lm-eval where it has one.

    The command's results stay unchanged. Beside them are:

    - `results`: every {mean, ci95, n} by its group: `results.metrics.<name>`, `results.before.<name>`,
      `results.rows.<row's label>.<name>`; a command's own `results` stay unchanged;
    - `n-samples`: by group, the number of records (`original`) and the largest n of a metric (`effective`);
    - `config`: the command's options; `versions`; `seed`; `date` (UTC, ISO 8601);
    - `model`: name, revision, fingerprint of the weights, dtype;
    - `data`: source, SHA-256, n, and the numbers skipped, by reason;
    - `git`: `git describe` of kt's checkout, if it runs from one.
    """
    model, data = dict(manifest.get("model", {})), dict(manifest.get("data", {}))
    groups = dict(results["results"]) if "results" in results else dict(_groups(results))
    content = {**results, "results": groups}
    if "n-samples" not in results:
        content["n-samples"] = {name: _counts(group, data.get("n")) for name, group in groups.items()}
    content["config"] = {"command": manifest.get("command"), **manifest.get("config", {}), **results.get("config", {})}
    content["versions"] = {**manifest.get("versions", {}), **results.get("versions", {})}
    if model:
        weights = {name: model.get(name) for name in ("revision", "fingerprint")}
        content["model"] = {"name": model.get("id"), **weights, "dtype": manifest.get("dtype")}
    if data:
        content["data"] = {"source": None, "sha256": None, "n": None, "skipped": {}} | data
    if manifest.get("git") is not None:
        content["git"] = manifest["git"]
    return content | {"seed": manifest.get("seed"), "date": manifest.get("start")}


def _groups(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield mappings that hold intervals, with their dotted path; lists of labelled rows count as mappings."""
    intervals = {str(name): dict(item) for name, item in value.items() if _is_interval(item)}
    if intervals:
        yield path or "all", intervals
    for name, item in value.items():
        item_path = f"{path}.{name}" if path else str(name)
        if isinstance(item, Mapping) and not _is_interval(item):
            yield from _groups(item, item_path)
        elif isinstance(item, list | tuple):
            rows = [row for row in item if isinstance(row, Mapping) and "label" in row]
            for row in rows if len(rows) == len(item) else ():
                yield from _groups(row, f"{item_path}.{row['label']}")


def _is_interval(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() >= _INTERVAL


def _counts(group: Mapping[str, Any], original: int | None) -> dict[str, int | None]:
    sizes = [item["n"] for item in group.values() if _is_interval(item)]
    return {"original": original, "effective": max(sizes, default=None)}


def git_describe(folder: Path = PACKAGE) -> str | None:
    """`git describe --always --dirty` of the checkout that tracks kt's sources; None without one.

    A package installed inside another project's checkout is not tracked there, so it gives None.
    """
    # A hook's GIT_DIR would name another repository; without optional locks git writes nothing.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment = inherited | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment)
        except (OSError, subprocess.SubprocessError):
            return None  # git is missing or does not answer
        return done.stdout.strip() or None if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return git("describe", "--always", "--dirty", "--tags")
