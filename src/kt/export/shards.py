"""The weights of a Hugging Face folder: which file holds which, and how many files a model came in."""

from __future__ import annotations

import errno
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .._util.data import read_json
from .._util.files import NotWritable, atomic_write, check_writable, why_not_written, writing
from .._util.lock import FolderLock
from ..errors import BadFile, KtError
from ..model.memory import gib
from ..runs.folder import clear_leftovers, sync

if TYPE_CHECKING:
    from ..model.model import TracedModel


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
COUNTED = (INDEX, SINGLE, "pytorch_model.bin.index.json", "pytorch_model.bin")
"""Where a checkpoint's number of files is read off, in this order; of pickled ones only the index is opened."""


@dataclass(frozen=True)
class Shards:
    """A folder's safetensors files; `files` says in which of them each weight is."""

    folder: Path
    files: Mapping[str, str]

    @classmethod
    def open(cls, folder: str | Path) -> Shards:
        """Read a folder's index, or the names in its one file.

        Raises:
            BadFile: no safetensors weights there, or an index that names files outside the folder.
        """
        folder = Path(folder)
        if (folder / INDEX).is_file():
            return cls(folder, _index(folder / INDEX))
        if not (folder / SINGLE).is_file():
            raise BadFile(f"{folder} holds no {SINGLE} and no {INDEX}; name a folder of merged weights")
        with _opened(folder / SINGLE) as file:
            return cls(folder, dict.fromkeys(file.keys(), SINGLE))

    def read(self, name: str) -> Tensor:
        """One weight, as it is stored.

        Raises:
            BadFile: the folder has no such weight, or the file is cut short.
        """
        if name not in self.files:
            raise BadFile(f"{self.folder} has no weight {name}; name the folder that the edit was merged into")
        path = self.folder / self.files[name]
        with _opened(path) as file:
            if name not in file.keys():  # noqa: SIM118
                raise BadFile(f"{path}: {name} is not in it, though {INDEX} says so; write the folder again")
            return _sound(path, lambda: file.get_tensor(name))

    def write(self, file: str, replaced: Mapping[str, Tensor], into: Path) -> None:
        """The file with some of its weights replaced, whole or not at all, into that folder (may be its own)."""
        from safetensors.torch import save_file

        path = self.folder / file
        with _opened(path) as held:
            about = held.metadata()
            tensors = {name: _sound(path, lambda name=name: held.get_tensor(name)) for name in held.keys()}  # noqa: SIM118
        tensors |= {name: tensor.contiguous() for name, tensor in replaced.items()}
        atomic_write(into / file, lambda temporary: save_file(tensors, temporary, metadata=about))


class Source(NamedTuple):
    """In how many files a model's checkpoint is, and by its index (none of a single file) which weight is in which."""

    number: int
    files: Mapping[str, str]


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """The same of two names of one tied weight."""
    # Offloaded weights have no address. Two names of a tied one then count twice.
    return tensor.device, id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors; those of tied ones count once."""
    return sum({place_of(t): t.numel() * t.element_size() for t in tensors.values()}.values())


def source_of(model: TracedModel) -> Source | None:
    """The files that the model was loaded from; None where they are neither a local folder's nor in the cache."""
    source = str(getattr(model.module.config, "_name_or_path", "") or "")
    if not source:
        return None
    for name in COUNTED:
        path = _held_locally(source, name, model.revision)
        if path is not None:
            files = _index(path) if name.endswith(".json") else {}
            return Source(len(set(files.values())) or 1, files)
    return None


def shard_size(module: Any, source: Source) -> int:
    """The size of a file for which `save_pretrained` writes as many as the source has.

    It fills a file with weights in an order of its own until the next is too many. If the source was written by it,
    the size of the source's largest file gives the same files again, in another dtype too. Otherwise this is the least
    size that gives no more files than the source has: more room never makes more, but not every number can be had.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    state = _as_saved(module)

    def files(size: int) -> int:
        return len(split_torch_state_dict_into_shards(state, max_shard_size=size).filename_to_tensors)

    largest = max(_bytes_by_file(state, source.files).values(), default=0)
    if largest and files(largest) == source.number:
        return largest
    low, high = 1, max(1, sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if files(middle) <= source.number else (middle + 1, high)
    return high


def _as_saved(module: Any) -> dict[str, Tensor]:
    """The weights' names and sizes in the order in which `save_pretrained` writes them, without their content."""
    seen: set[Any] = set()
    empty = {}
    for name, tensor in module.state_dict().items():
        if (place := place_of(tensor)) not in seen:  # of tied weights one is saved
            seen.add(place)
            empty[name] = tensor.to("meta")
    try:
        # What gives loaded models' weights their old names back, sorted: transformers has no public name for it.
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return empty
    return dict(revert_weight_conversion(module, empty))


def _bytes_by_file(state: Mapping[str, Tensor], files: Mapping[str, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in files.keys() & state.keys():
        found[files[name]] = found.get(files[name], 0) + state[name].numel() * state[name].element_size()
    return found


def _held_locally(source: str, name: str, revision: str | None) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, name, revision=revision)
    except HFValidationError:  # a name that no repository can have
        return None
    return Path(found) if isinstance(found, str) else None


def _index(path: Path) -> dict[str, str]:
    """The index's map from weights to files beside it."""
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise BadFile(f"{path}: no weight_map in it; write the folder again")
    for file in found.values():
        if not isinstance(file, str) or not file or Path(file).name != file or "\\" in file:
            raise BadFile(f"{path}: {json.dumps(file)[:80]} is no file of this folder; write the folder again")
    return found


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, ValueError) as error:
        raise BadFile(f"{path}: not a whole safetensors file; write the folder again") from error
    except OSError as error:
        raise BadFile(f"cannot read {path}: {error.strerror or 'no such file'}; write the folder again") from error


def _sound(path: Path, read: Any) -> Tensor:
    from safetensors import SafetensorError

    try:
        return read()
    except SafetensorError as error:
        raise BadFile(f"{path}: not a whole safetensors file; write the folder again") from error


# A folder that is either whole or absent: filled under a temporary name beside its own, renamed when complete.
#
# As a run folder is, but for what is in it: this one is no run, and never replaces what stands there.

FULL = ("os error 28", "No space left on device")
"""How libraries that are not Python's own say that the disk is full."""


def refuse_taken(folder: str | Path) -> None:
    """Refuse a place that holds something or cannot be written, before the work and not after.

    Raises:
        NotWritable: with the reason.
    """
    folder = Path(folder)
    with writing(folder):
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken:
        raise NotWritable(f"{folder} exists and is not empty; name a new folder")
    check_writable(folder / "config.json")


def refuse_full(folder: str | Path, needed: int) -> None:
    """Refuse to write more bytes than the disk under `folder` has left."""
    place = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise NotWritable(
            f"cannot write {folder}: it needs {gib(needed, 3)}, and {gib(free, 3)} of the disk are free; "
            "free some space or name another place"
        )


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Where to write: a temporary folder that gets its name at the end, its files safe on the disk by then.

    After an exception, also Ctrl-C, nothing is left of it, nor of the parents that were made for it; what a killed
    process left is taken away by the next one that writes there.

    Raises:
        NotWritable: the place is taken, or the disk is full or read-only.
    """
    refuse_taken(folder)
    final = Path(folder).absolute()
    temporary = final.with_name(f"{final.name[:100]}.tmp-{secrets.token_hex(4)}")
    made = [parent for parent in final.parents if not parent.exists()]
    hold: FolderLock | None = None
    try:
        with writing(Path(folder)):
            final.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(final)
            temporary.mkdir()
            hold = FolderLock(temporary)
            yield temporary
            sync(temporary)
            if final.exists():
                final.rmdir()
            temporary.replace(final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        _explain(error, temporary, Path(folder))
        raise
    finally:
        if hold is not None:
            hold.release()


def _explain(error: BaseException, temporary: Path, folder: Path) -> None:
    """Say a full disk as such, whoever found it, and name the folder that the user knows."""
    if isinstance(error, KtError):
        error.args = (str(error).replace(str(temporary), str(folder)),)
    elif any(sign in str(error) for sign in FULL):
        raise why_not_written(OSError(errno.ENOSPC, ""), folder) or error from error
