"""The weight files of a Hugging Face folder: reading, replacing, their number and size; folders written atomically."""

from __future__ import annotations

import errno
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._util.data import open_arrays
from .._util.files import NotWritable, atomic_write, check_writable, where_it_leads, why_not_written, writing
from .._util.lock import FolderLock
from ..errors import BadFile, KtError
from ..model.folder import cached_file, check_index, inside
from ..model.memory import gib
from ..model.mixture import slice_of
from ..runs.folder import clear_leftovers, sync_all

if TYPE_CHECKING:
    from ..model.model import TracedModel


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
COUNTED = (INDEX, SINGLE, "pytorch_model.bin.index.json", "pytorch_model.bin")
"""Files that tell a checkpoint's number of files, in this order; pickled weights are never opened."""


@dataclass(frozen=True)
class Shards:
    """A folder's safetensors files; `files` maps each weight to its file.

    `names` are of weights that the files call otherwise than the model does (`saved_names`): here the model's name
    stands for them.
    """

    folder: Path
    files: Mapping[str, str]
    names: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path, names: Mapping[str, str] | None = None) -> Shards:
        """Read a folder's index, or the names in its single file.

        Raises:
            BadFile: the folder has no safetensors weights, or its index names files outside it.
        """
        folder, names = Path(folder), names or {}
        own = {stored: name for name, stored in names.items()}
        if (folder / INDEX).is_file():
            return cls(folder, {own.get(n, n): file for n, file in check_index(folder / INDEX).items()}, names)
        if not (folder / SINGLE).is_file():
            raise BadFile(f"{folder} holds no {SINGLE} and no {INDEX}; name a folder of merged weights")
        if not inside(folder / SINGLE, folder):
            raise BadFile(f"{folder / SINGLE} is a link that leads out of the folder; copy the file there instead")
        with _opened(folder / SINGLE) as file:
            return cls(folder, dict.fromkeys((own.get(name, name) for name in file.keys()), SINGLE), names)  # noqa: SIM118

    def file_of(self, name: str) -> str | None:
        """The file that holds a weight; None without one. An expert's may be a slice of a stored weight."""
        return self.files.get(name) or self.files.get(slice_of(name)[0])

    def read(self, name: str) -> Tensor:
        """One weight in its stored dtype and layout.

        Raises:
            BadFile: the folder has no such weight, or the file is incomplete.
        """
        found = self.file_of(name)
        if found is None:
            raise BadFile(f"{self.folder} has no weight {name}; name the folder that the edit was merged into")
        stored, number = (name, None) if name in self.files else slice_of(name)
        path, stored = self.folder / found, self.names.get(stored, stored)
        with _opened(path) as file:
            if stored not in file.keys():  # noqa: SIM118
                raise BadFile(f"{path}: {stored} is not in it, though {INDEX} says so; write the folder again")
            return file.get_tensor(stored) if number is None else file.get_slice(stored)[number]

    def write(self, file: str, replaced: Mapping[str, Tensor], into: Path) -> None:
        """Write a file with some of its weights replaced into a folder (possibly its own), atomically."""
        from safetensors.torch import save_file

        with _opened(self.folder / file) as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for name, tensor in replaced.items():
            whole, number = (name, None) if name in self.files else slice_of(name)
            stored = self.names.get(whole, whole)
            if number is None:
                tensors[stored] = tensor.contiguous()
            else:
                tensors[stored][number] = tensor
        atomic_write(into / file, lambda temporary: save_file(tensors, temporary, metadata=metadata))


class Source(NamedTuple):
    """A checkpoint's number of files, and its index from weights to files (empty for a single file)."""

    number: int
    files: Mapping[str, str]


def storage_of(tensor: Tensor) -> tuple[Any, ...]:
    """A key that tied weights share."""
    # Offloaded weights have no address, so tied ones count twice.
    return tensor.device, id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors; tied ones count once."""
    return sum({storage_of(t): t.numel() * t.element_size() for t in tensors.values()}.values())


def source_of(model: TracedModel) -> Source | None:
    """The files from which the model was loaded; None if they are neither in a local folder nor in the Hub's cache."""
    source = str(getattr(model.module.config, "_name_or_path", "") or "")
    if not source:
        return None
    for name in COUNTED:
        path = _local_file(source, name, model.revision)
        if path is not None:
            files = check_index(path) if name.endswith(".json") else {}
            return Source(len(set(files.values())) or 1, files)
    return None


def shard_size(module: Any, source: Source) -> int:
    """The maximal file size (bytes) with which `save_pretrained` writes as many files as the source has.

    `save_pretrained` fills a file with weights, in its own order, until the next does not fit. If it also wrote the
    source, the size of the source's largest file gives the same files again, also in another dtype. Otherwise this is
    the least size that gives no more files than the source has: a larger size never gives more files, but not every
    number of files is possible.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    state = as_saved(module)

    def files(size: int) -> int:
        return len(split_torch_state_dict_into_shards(state, max_shard_size=size).filename_to_tensors)

    by_file: dict[str, int] = {}
    for name in source.files.keys() & state.keys():
        file = source.files[name]
        by_file[file] = by_file.get(file, 0) + state[name].numel() * state[name].element_size()
    largest = max(by_file.values(), default=0)
    if largest and files(largest) == source.number:
        return largest
    low, high = 1, max(1, sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if files(middle) <= source.number else (middle + 1, high)
    return high


def as_saved(module: Any) -> dict[str, Tensor]:
    """Meta tensors with the names and sizes, in the order in which `save_pretrained` writes the weights."""
    return _reverted(module, _empty(module))


def saved_names(module: Any) -> dict[str, str]:
    """The name in its files of each weight that `save_pretrained` writes as it is, where that is another (wrappers);
    of experts that it writes one by one, the name of each by its slice."""
    empty = _empty(module)
    own = {id(tensor): name for name, tensor in empty.items()}
    pairs = ((own.get(id(tensor)), name) for name, tensor in _reverted(module, empty).items())
    found = {name: stored for name, stored in pairs if name is not None and name != stored}
    for name, tensor in empty.items():
        if tensor.dim() == 3 and name not in found and name.rpartition(".")[2].startswith("down"):
            found |= _slices(module, name, len(tensor))
    return found


def _slices(module: Any, name: str, count: int) -> dict[str, str]:
    """The files' names of a parameter's slices along its first axis, if these are weights of their own there."""
    marks = torch.arange(count * 6.0).view(count, 2, 3)
    stored = _reverted(module, {name: marks})
    by_mark = {tuple(mark.flatten().tolist()): f"{name}[{number}]" for number, mark in enumerate(marks)}
    return {by_mark[key]: n for n, t in stored.items() if (key := tuple(t.flatten().tolist())) in by_mark}


def _empty(module: Any) -> dict[str, Tensor]:
    """Meta tensors for the weights, tied ones once."""
    seen: set[Any] = set()
    empty = {}
    for name, tensor in module.state_dict().items():
        if (storage := storage_of(tensor)) not in seen:  # one of several tied weights is saved
            seen.add(storage)
            empty[name] = tensor.to("meta")
    return empty


def _reverted(module: Any, empty: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the checkpoint's names."""
    try:
        # Restores the checkpoint's names, sorted, as saving does; transformers has no public function for it.
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return empty
    with reversible(module):
        return dict(revert_weight_conversion(module, empty))


@contextmanager
def reversible(module: Any) -> Iterator[None]:
    """Inside the block what transformers did to a quantised model's weights at loading is no part of saving them: they
    are as they were stored, and that step has no way back. Renamings have one."""
    before = vars(module).get("_weight_conversions")
    if before is not None:
        vars(module)["_weight_conversions"] = [each for each in before if _has_a_way_back(each)]
    try:
        yield
    finally:
        if before is not None:
            vars(module)["_weight_conversions"] = before


def _has_a_way_back(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def _local_file(source: str, name: str, revision: str | None) -> Path | None:
    """A checkpoint's file in its local folder or in the Hub's cache."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    return cached_file(source, name, revision)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; errors of opening and reading become BadFile."""
    try:
        with open_arrays(path) as file:
            yield file
    except BadFile as error:
        raise BadFile(f"{str(error).removesuffix('; write it again')}; write the folder again") from error


FULL = ("os error 28", "No space left on device")
"""Messages by which non-Python libraries report a full disk."""


def refuse_taken(folder: str | Path) -> None:
    """Check before the work that a folder is new or empty, and can be written.

    Raises:
        NotWritable: it is not.
    """
    folder = Path(folder)
    where_it_leads(folder)
    with writing(folder):
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken:
        raise NotWritable(f"{folder} exists and is not empty; name a new folder")
    check_writable(folder / "config.json")


def refuse_full(folder: str | Path, needed: int) -> None:
    """Raise NotWritable if the disk of `folder` has fewer free bytes than `needed`."""
    existing = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise NotWritable(
            f"cannot write {folder}: it needs {gib(needed, 3)}, and {gib(free, 3)} of the disk are free; "
            "free some space or name another place"
        )


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder to fill; at the end its files are flushed to disk and it is renamed to `folder`.

    Unlike a run folder it never replaces an existing one. After an exception, also Ctrl-C, the temporary folder and any
    new parents are deleted; leftovers of a killed process are deleted by the next one that writes there.

    Raises:
        NotWritable: the folder is not empty, or the disk is full or read-only.
    """
    refuse_taken(folder)
    final = where_it_leads(folder).absolute()
    temporary = final.with_name(f"{final.name[:100]}.tmp-{secrets.token_hex(4)}")
    new_parents = [parent for parent in final.parents if not parent.exists()]
    lock: FolderLock | None = None
    try:
        with writing(Path(folder)):
            final.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(final)
            temporary.mkdir()
            lock = FolderLock(temporary)
            yield temporary
            sync_all(temporary)
            if final.exists():
                final.rmdir()
            temporary.replace(final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, KtError):  # name the user's folder instead of the temporary one
            error.args = (str(error).replace(str(temporary), str(folder)),)
        elif any(message in str(error) for message in FULL):
            raise why_not_written(OSError(errno.ENOSPC, ""), folder) or error from error
        raise
    finally:
        if lock is not None:
            lock.release()
