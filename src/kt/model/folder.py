"""A model's folder, checked before anything in it is loaded: what it names must lie inside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._util.data import read_json
from .._util.text import visible
from ..errors import BadFile, UnknownModel


def inside(path: Path, folder: Path) -> bool:
    """Whether a path, its links followed, lies in a folder, or in the blobs of the Hub snapshot that the folder is."""
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError):  # a link that leads to itself, a name that is none
        return False
    repository = root.parent.parent
    snapshot = root.parent.name == "snapshots" and repository.name.startswith("models--")
    return real.is_relative_to(root) or (snapshot and real.is_relative_to(repository / "blobs"))


def regular_files(folder: Path, root: Path | None = None) -> Iterator[Path]:
    """Every file below a folder, for copying.

    Raises:
        BadFile: an entry is a link out of the folder or to a folder, a pipe or a device.
    """
    root = root or folder
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and (not inside(path, root) or path.is_dir()):
            raise BadFile(
                f"{path} is a link that leads out of {root}, or to a folder; copy what you need, then delete it"
            )
        if path.is_dir():
            yield from regular_files(path, root)
        elif path.is_file():
            yield path
        else:
            raise BadFile(f"{path} is no regular file; delete it")


def check_source(source: str | Path, revision: str | None, trust_remote_code: bool) -> None:
    """`check_folder` for what `kt.load` takes: a folder, a GGUF file, or a Hub id as far as the cache has it."""
    path = Path(source)
    if path.is_dir():
        check_folder(path, trust_remote_code)
    elif path.is_file():
        refuse_adapter(path.parent)
    elif (cached := cached_file(str(source), "config.json", revision)) is not None:
        check_folder(cached.parent, trust_remote_code)


def cached_file(repository: str, name: str, revision: str | None) -> Path | None:
    """A file of a Hub repository in the cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(repository, name, revision=revision)
    except HFValidationError:  # not a valid name of a repository
        return None
    return Path(cached) if isinstance(cached, str) else None


def check_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """Refuse a model's folder that would have files from elsewhere read.

    Raises:
        UnknownModel: it is a PEFT adapter; a link, an index, a tokenizer's configuration or, where code may run, an
            `auto_map` leads out of it.
        BadFile: one of these files is no JSON object.
    """
    refuse_adapter(folder)
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not inside(path, folder):
            raise UnknownModel(f"{path} is a link that leads out of the folder; copy the file there instead")
        if ".index." in path.name and path.suffix == ".json" and "weight_map" in read_json(path):
            check_index(path)
    tokenizer = _read(folder / "tokenizer_config.json")
    for name, value in tokenizer.items():
        files = value if isinstance(value, list) else [value]
        for file in files if name.endswith(("_file", "_files")) else ():
            # Old tokenizers hold the paths of other machines; only a file that is there could be read.
            if isinstance(file, str) and _exists(folder / file) and not inside(folder / file, folder):
                raise UnknownModel(_outside(folder / "tokenizer_config.json", file))
    if trust_remote_code:
        for path, config in ((folder / "config.json", _read(folder / "config.json")), (folder, tokenizer)):
            for code in _texts(config.get("auto_map")):
                if "--" in code or "/" in code or "\\" in code or ".." in code:
                    raise UnknownModel(
                        _outside(path, code) + ", and --trust-remote-code runs the folder's own code only"
                    )


def check_index(path: Path) -> dict[str, str]:
    """The index's map from weights to files beside it.

    Raises:
        BadFile: there is none, or a file is not in the index's folder.
    """
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise BadFile(f"{path}: no weight_map in it; write the folder again")
    for file in files.values():
        if not isinstance(file, str) or not file or Path(file).name != file or file == ".." or "\\" in file:
            raise BadFile(f"{path}: {json.dumps(file)[:80]} is no file of this folder; write the folder again")
    for file in set(files.values()):
        if not inside(path.parent / file, path.parent):
            raise BadFile(
                f"{path}: {visible(file)} is a link that leads out of the folder; copy the file there instead"
            )
    return files


def refuse_adapter(folder: Path) -> None:
    """Refuse a PEFT folder: an adapter stands beside the weights, and what kt writes would miss it.

    Raises:
        UnknownModel: the folder holds an adapter_config.json.
    """
    config = folder / "adapter_config.json"
    if config.is_file():
        base = read_json(config).get("base_model_name_or_path") or "the base model"
        raise UnknownModel(
            f"{folder} is a PEFT adapter for {visible(str(base))[:200]}: merge it first (PeftModel.from_pretrained("
            "base, folder).merge_and_unload().save_pretrained(...)) and load that folder, or load the base model"
        )


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def _texts(value: Any) -> list[str]:
    """Every text in a value of JSON's types."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in _texts(item)]


def _outside(path: Path, what: str) -> str:
    return f"{path}: {visible(what)[:120]} is not in the folder"
