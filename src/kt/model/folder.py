"""A model's folder, checked before anything in it is loaded.

What it names must lie inside it, and its JSON files may not ask for what would take hours or all memory: transformers
and tokenizers trust their numbers.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .._util.data import complete_file, disguise, read_json, tensor_header
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
    if path.is_file():
        refuse_adapter(path.parent)
    elif (folder := checkpoint_folder(source, revision)) is not None:
        check_folder(folder, trust_remote_code)


def checkpoint_folder(source: str | Path, revision: str | None) -> Path | None:
    """The folder that a model was loaded from: its own, or the Hub cache's."""
    if Path(source).is_dir():
        return Path(source)
    cached = cached_file(str(source), "config.json", revision)
    return None if cached is None else cached.parent


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
    for name, limit in JSON_FILES.items():
        _bounded(folder / name, limit)
    _check_config(folder)
    _check_tokenizer(folder / "tokenizer.json")
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not inside(path, folder):
            raise UnknownModel(f"{path} is a link that leads out of the folder; copy the file there instead")
        if ".index." in path.name and path.suffix == ".json":
            _refuse_huge(path, INDEX)
            if "weight_map" in read_json(path):
                check_index(path)
    check_weights(folder)
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


def check_weights(folder: Path) -> None:
    """Refuse a folder of which a file of weights is cut short, a pointer, or no safetensors, by the headers alone.

    Raises:
        UnknownModel, BadFile: one is.
    """
    for path in sorted(folder.glob("*.safetensors")):
        if path.is_file():
            _refuse_long_header(path)
            tensor_header(path, "download it again")


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


class Quantisation(NamedTuple):
    """What runs a kind of quantised checkpoint: the module to import, its name for pip, whether only on a GPU."""

    module: str | None = None
    package: str | None = None
    gpu: bool = False


QUANTISATIONS = {
    **dict.fromkeys(("fp8", "mxfp4", "mxfp8"), Quantisation()),
    "compressed-tensors": Quantisation("compressed_tensors", "compressed-tensors"),
    "bitsandbytes": Quantisation("bitsandbytes", "bitsandbytes"),
    "torchao": Quantisation("torchao", "torchao"),
    "gptq": Quantisation("gptqmodel", "gptqmodel"),
    "awq": Quantisation("gptqmodel", "gptqmodel"),
    "quanto": Quantisation("optimum.quanto", "optimum-quanto"),
    "hqq": Quantisation("hqq", "hqq"),
    "aqlm": Quantisation("aqlm", "aqlm"),
    "auto-round": Quantisation("auto_round", "auto-round"),
    "quark": Quantisation("quark", "amd-quark"),
    "sinq": Quantisation("sinq", "sinq"),
    "bitnet": Quantisation(),
    "eetq": Quantisation("kernels", "kernels", gpu=True),
    "fbgemm_fp8": Quantisation("fbgemm_gpu", "fbgemm-gpu", gpu=True),
    "fp_quant": Quantisation("fp_quant", "fp_quant", gpu=True),
    "higgs": Quantisation("flute", "flute-kernel", gpu=True),
    "nvfp4": Quantisation("kernels", "kernels", gpu=True),
    "spqr": Quantisation("spqr_quant", "spqr_quant", gpu=True),
    "vptq": Quantisation("vptq", "vptq", gpu=True),
}
"""By transformers' `quant_method`, with what transformers asks of each."""


def quantisation_of(config: Mapping[str, Any]) -> str | None:
    """The `quant_method` of a checkpoint's config; None if its weights are plain."""
    about = config.get("quantization_config")
    if not isinstance(about, dict):
        return None
    old = about.get("load_in_8bit") or about.get("load_in_4bit")  # of bitsandbytes, before it said its name
    kind = about.get("quant_method") or ("bitsandbytes" if old else "no method")
    return visible(str(kind))[:40]


def refuse_quantised(folder: Path | str, config: dict[str, Any]) -> None:
    """Refuse a quantised checkpoint that cannot run here, before its weights are read.

    Raises:
        UnknownModel: its format is unknown, its library is not installed, or it runs on a GPU only and there is none.
    """
    kind = quantisation_of(config)
    if kind is None:
        return
    quantised, otherwise = QUANTISATIONS.get(kind), "load the checkpoint that it was made from"
    if quantised is None:
        known = ", ".join(QUANTISATIONS)
        raise UnknownModel(f"{folder}: its weights are quantised ({kind}), and kt knows {known}; {otherwise}")
    what = f"{folder}: its weights are quantised ({kind})"
    if quantised.gpu and not _has_gpu():
        raise UnknownModel(f"{what}, which {quantised.package} runs on a GPU only, and there is none here; {otherwise}")
    if quantised.module is not None and not _is_installed(quantised.module):
        missing = f"{quantised.package}, which runs them, is not installed; pip install {quantised.package}"
        raise UnknownModel(f"{what}, and {missing}, or {otherwise}")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a part, where the whole is missing
        return False


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


# Bounds -------------------------------------------------------------------------------------------------------------
JSON_FILES = {
    "config.json": 100_000,
    "generation_config.json": 10_000,
    "tokenizer_config.json": 300_000,
    "special_tokens_map.json": 100_000,
    "added_tokens.json": 100_000,
}
"""The most values that each file may hold, of 100 bytes each; the largest real ones hold a third of it."""
TOKENS = 20_000
"""The most special tokens: adding them takes the square of their number."""
TOKENIZER, INDEX, HEADER = 200 << 20, 20 << 20, 8 << 20
"""The most bytes of a tokenizer, an index of weights, and the header of a file of weights."""
LAYERS, LABELS, NUMBERS = 2_000, 100_000, 1 << 28
"""The most layers, the most labels, and what a model may have beyond eight numbers a byte of its files."""
POSITIVE = re.compile(
    r"num_(hidden_layers|layers|attention_heads|heads)|n_(layers?|heads?|embd)|(hidden|vocab)_size|d_model"
    r"|(max_position_embedding|n_position)s"
)
A_LAYER_COUNT = re.compile(r"(^|_)(layers?|blocks|depth)$")
GROWTH = 1_000
"""How much longer a tokenizer may make its text."""


def _bounded(path: Path, limit: int) -> None:
    """Read a JSON file, and refuse one that is larger than any real one."""
    if not path.is_file():
        return
    _refuse_huge(path, 100 * limit)
    number, left = 0, [read_json(path)]
    while left and number <= limit:
        value: Any = left.pop()
        number += 1
        if isinstance(value, dict | list):
            if path.name != "config.json" and len(value) > TOKENS:
                raise UnknownModel(f"{path} lists {len(value):,} tokens; kt takes at most {TOKENS:,}")
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, float) and math.isnan(value):
            raise UnknownModel(f"{path} holds a NaN; write a number there")
    if number > limit:
        raise UnknownModel(f"{path} holds more than {limit:,} values, more than any real one; download it again")


def _refuse_huge(path: Path, limit: int) -> None:
    if (size := path.stat().st_size) > limit:
        raise UnknownModel(f"{path} has {size:,} bytes, more than any real one; download it again")


def _refuse_long_header(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(64)
    length = int.from_bytes(start[:8], "little")
    if length > HEADER and disguise(start) is None:
        raise UnknownModel(f"{path} has a header of {length:,} bytes, more than any real one; download it again")


def _check_config(folder: Path) -> None:
    """Refuse sizes below one, and counts of layers and labels that would be made one by one."""
    path, config = folder / "config.json", _read(folder / "config.json")
    refuse_quantised(folder, config)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name, value in part.items():
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            if POSITIVE.fullmatch(name) and value < 1:
                raise UnknownModel(f"{path}: {name} is {value}; a model has at least one")
            limit = LAYERS if A_LAYER_COUNT.search(name) else LABELS if name == "num_labels" else None
            if limit is not None and value > limit:
                raise UnknownModel(f"{path}: {name} is {str(value)[:30]}; kt reads models of at most {limit:,}")


def require_sizes(folder: Path) -> None:
    """Refuse a config that asks for a model of more numbers than its folder's files can hold.

    transformers makes weights of these sizes before it finds out that the files hold others.

    Raises:
        UnknownModel: it does.
    """
    held = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") and p.is_file())
    if not held:
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in kind._model_mapping:
            with torch.device("meta"):
                module = kind.from_config(config)
            wanted = sum(t.numel() for t in (*module.parameters(), *module.buffers()))
            if wanted > 8 * held + NUMBERS:
                raise UnknownModel(
                    f"{folder / 'config.json'} asks for a model of {wanted:,} numbers, and the folder's weights are "
                    f"{held:,} bytes; download the model again"
                )
            return


def _check_tokenizer(path: Path) -> None:
    """Refuse a tokenizer whose normalizer, post-processor or padding multiplies its text.

    Raises:
        UnknownModel: it does.
        BadFile: no JSON object.
    """
    if not path.is_file():
        return
    _refuse_huge(path, TOKENIZER)
    tokenizer = read_json(path)
    with complete_file(path, "tokenizer", "download it again"):
        _check_growth(path, tokenizer)


def _check_growth(path: Path, tokenizer: dict[str, Any]) -> None:
    padding = tokenizer.get("padding")
    lengths = [padding.get("pad_to_multiple_of"), padding.get("strategy")] if isinstance(padding, dict) else []
    lengths = [n for each in lengths for n in (each.values() if isinstance(each, dict) else [each])]
    if any(isinstance(n, int) and n > 1 << 20 for n in lengths):
        longest = max(n for n in lengths if isinstance(n, int))
        raise UnknownModel(f"{path}: pads every text to {longest:,} tokens; take `padding` out, or download it again")
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (growth := _growth(tokenizer.get(name))) > GROWTH:
            raise UnknownModel(
                f"{path}: its {name} makes a text up to {growth:.3g} times as long, where real ones stay below "
                f"{GROWTH}; take the tokenizer from the model's own source"
            )


def _growth(step: Any) -> float:
    """How many times longer a step of a tokenizer can make its text, at most."""
    if isinstance(step, list):
        return math.prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1.0
    match step.get("type"):
        case "Sequence":
            return math.prod(_growth(value) for value in step.values())
        case "Replace":
            pattern = step.get("pattern")
            old = pattern.get("String") if isinstance(pattern, dict) else None
            new = len(str(step.get("content") or "").encode())
            # An empty text is found between all letters, and what a regular expression finds may be short.
            return 1.0 + new if not old else max(1.0, new / len(str(old).encode()))
        case "Prepend" | "Strip" | "Metaspace":
            return 1.0 + len(str(step.get("prepend") or "")) / 8  # once a text
        case "Precompiled":
            return max(1.0, _longest(step.get("precompiled_charsmap")))
        case "TemplateProcessing":
            pieces = [piece for each in ("single", "pair") for piece in step.get(each) or ()]
            return max(1.0, sum("Sequence" in piece for piece in pieces if isinstance(piece, dict)) / 3)
        case _:
            return 1.0


def _longest(charsmap: Any) -> float:
    """The most bytes that SentencePiece's map of letters gives for one: a trie, then texts that a zero byte ends."""
    try:
        data = base64.b64decode(str(charsmap))
        (size,) = struct.unpack_from("<I", data)
    except (ValueError, struct.error):
        return 1.0
    return max(map(len, data[4 + size :].split(b"\0")))


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
