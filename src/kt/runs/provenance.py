"""What is installed, and what the machine is: for manifests and for `kt env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import __version__

PACKAGES = ("torch", "nnsight", "transformers", "safetensors", "accelerate", "numpy", "scipy", "plotly")
OPTIONAL = ("kaleido", "datasets", "peft", "lm_eval")


def version(package: str) -> str | None:
    """The installed version, read from the package's metadata: nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python, kt and the packages that a result can depend on."""
    found = {name: version(name) for name in PACKAGES}
    own = {"python": platform.python_version(), "kt": __version__}
    return own | {name: v for name, v in found.items() if v is not None}


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


# `results.json` in lm-eval's spirit: what came out, together with all that a reader needs to believe it.
#
# The manifest of a run says how it ran; `envelope` puts what bears on the figures beside them, under lm-eval's names
# where it has one, so that a `results.json` that was copied away from its folder still says what it is about.

PACKAGE = Path(__file__).parents[1]
_INTERVAL = frozenset({"mean", "ci95", "n"})
_SECONDS = 5.0


def envelope(manifest: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """The command's results as they are, and beside them:

    - `results`: every {mean, ci95, n} by the group it stands in: `results.metrics.<name>`, `results.before.<name>`,
      `results.rows.<row's label>.<name>`; what the command itself calls `results` stays as it is;
    - `n-samples`: by group, the records there were (`original`) and the most that a metric is about (`effective`);
    - `config`: the command's options; `versions`; `seed`; `date` (UTC, ISO 8601);
    - `model`: name, revision, fingerprint of the weights, dtype;
    - `data`: source, SHA-256, n, and what was skipped, by reason;
    - `git`: `git describe` of kt's own checkout, where it runs from one.
    """
    model, data = dict(manifest.get("model", {})), dict(manifest.get("data", {}))
    groups = dict(results["results"]) if "results" in results else dict(_groups(results))
    found = {**results, "results": groups}
    if "n-samples" not in results:
        found["n-samples"] = {name: _counts(group, data.get("n")) for name, group in groups.items()}
    found["config"] = {"command": manifest.get("command"), **manifest.get("config", {}), **results.get("config", {})}
    found["versions"] = {**manifest.get("versions", {}), **results.get("versions", {})}
    if model:
        known = ("revision", "fingerprint")
        found["model"] = {"name": model.get("id"), **{n: model.get(n) for n in known}, "dtype": manifest.get("dtype")}
    if data:
        found["data"] = {"source": None, "sha256": None, "n": None, "skipped": {}} | data
    if (described := manifest.get("git")) is not None:
        found["git"] = described
    return found | {"seed": manifest.get("seed"), "date": manifest.get("start")}


def _groups(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Mappings that hold intervals, with the dotted path that leads there; lists of labelled rows count as mappings."""
    here = {str(name): dict(item) for name, item in value.items() if _is_interval(item)}
    if here:
        yield path or "all", here
    for name, item in value.items():
        below = f"{path}.{name}" if path else str(name)
        if isinstance(item, Mapping) and not _is_interval(item):
            yield from _groups(item, below)
        elif isinstance(item, list | tuple):
            rows = [row for row in item if isinstance(row, Mapping) and "label" in row]
            for row in rows if len(rows) == len(item) else ():
                yield from _groups(row, f"{below}.{row['label']}")


def _is_interval(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() >= _INTERVAL


def _counts(group: Mapping[str, Any], original: int | None) -> dict[str, int | None]:
    sizes = [item["n"] for item in group.values() if _is_interval(item)]
    return {"original": original, "effective": max(sizes, default=None)}


def git_describe(folder: Path = PACKAGE) -> str | None:
    """`git describe --always --dirty` of the checkout that holds kt's sources; None without one.

    A package installed into another project's folder lies in that project's checkout, but git does not track it there.
    """
    # A hook's GIT_DIR would point at another repository; without optional locks nothing is written to this one.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment = clean | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment)
        except (OSError, subprocess.SubprocessError):
            return None  # no git here, or one that does not answer
        return done.stdout.strip() or None if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return git("describe", "--always", "--dirty", "--tags")
