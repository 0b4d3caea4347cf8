"""GGUF files: which file is meant, whether it is whole and of a known architecture, and its model, dequantised."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._util.text import some_of
from ..errors import KtError, UnknownModel, need, said_by
from .hub import require_whole

if TYPE_CHECKING:
    from torch import nn

SUFFIX = ".gguf"
MAGIC = b"GGUF"
LFS = b"version https://git-lfs"
VERSIONS = (2, 3)
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a metadata value, by the format's number of its type; strings and arrays hold their own length."""
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
TOKENS = "tokenizer.ggml.tokens"
GGUF_NAMES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss", "minimax_m2": "minimax-m2"}
"""Architectures that transformers' table names otherwise than GGUF files do."""
NOT_CAUSAL = {"general", "tokenizer", "t5", "umt5"}
"""Keys of that table which are no architecture, or no decoder-only one."""
OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class TensorEntry(NamedTuple):
    """A row of the file's table: the offset counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class Header(NamedTuple):
    """All but the weights; of metadata arrays only their length is kept."""

    metadata: Mapping[str, Any]
    tensors: tuple[TensorEntry, ...]
    end: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def find_gguf(source: str | Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder without other weights.

    Raises:
        UnknownModel: a name that ends in .gguf with no file there.
        KtError: a folder that holds several.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() == SUFFIX)
        if not files or any(next(path.glob(pattern), None) for pattern in OTHER_WEIGHTS):
            return None
        if len(files) > 1:
            shown = some_of([f.name for f in files], 6, ", ...")
            raise KtError(f"{path} holds {len(files)} GGUF files ({shown}); give one of them, as {files[0]}")
        return files[0]
    if path.suffix.lower() != SUFFIX:
        return None
    if not path.is_file():
        raise UnknownModel(f"{path}: no such file; give a GGUF file, a folder with one, or a Hub id")
    return path


def read_header(path: Path) -> Header:
    """Read the metadata and the table of tensors; no weight is read.

    Source: the description of GGUF in the documentation of ggml (github.com/ggml-org/ggml).

    Raises:
        UnknownModel: the file is empty, no GGUF file, or ends within its header.
    """
    with path.open("rb") as file:
        start = file.read(len(LFS))
        if not start:
            raise UnknownModel(f"{path} is empty; download it again")
        if start == LFS:
            raise UnknownModel(f"{path} is a Git LFS pointer, not the weights; fetch them with git lfs pull")
        if not start.startswith(MAGIC):
            raise UnknownModel(
                f"{path} is no GGUF file (it starts with {start[:4]!r}, not {MAGIC!r}); download it again"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, data)
            except (struct.error, OverflowError, IndexError, UnicodeDecodeError) as error:
                raise UnknownModel(f"{path} ends or breaks within its header; download it again") from error


def _parse(path: Path, data: mmap.mmap) -> Header:
    version, tensor_count, value_count = struct.unpack_from("<IQQ", data, len(MAGIC))
    if version not in VERSIONS:
        raise UnknownModel(f"{path} is GGUF of version {version}; kt reads {VERSIONS[0]} and {VERSIONS[1]}")
    at, metadata = 24, {}
    for _ in range(value_count):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        metadata[key], at = _value(data, at + 4, kind)
    tensors = []
    for _ in range(tensor_count):
        name, at = _string(data, at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        shape = struct.unpack_from(f"<{dimensions}Q", data, at + 4)
        tensor_kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * dimensions)
        at += 16 + 8 * dimensions
        tensors.append(TensorEntry(name, shape, tensor_kind, offset))
    return Header(metadata, tuple(tensors), at)


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data):
        raise IndexError("a string ends behind the file")
    return data[at + 8 : end].decode(), end


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """A value and where the next one starts; of an array its length."""
    if kind == STRING:
        return _string(data, at)
    if kind != ARRAY:
        if kind not in WIDTHS:
            raise IndexError(f"no metadata type has the number {kind}")
        return struct.unpack_from(FORMATS[kind], data, at)[0], at + WIDTHS[kind]
    item, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if item in WIDTHS:
        return count, at + count * WIDTHS[item]
    for _ in range(count):
        if item == STRING:  # only its length is read: a vocabulary has many
            at += 8 + struct.unpack_from("<Q", data, at)[0]
        else:
            _, at = _value(data, at, item)
    return count, at


def supported_architectures() -> tuple[str, ...]:
    """The decoder-only architectures, by their GGUF names, that this version of transformers reads."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = {GGUF_NAMES.get(name, name) for name in GGUF_SUPPORTED_ARCHITECTURES if name not in NOT_CAUSAL}
    try:
        from transformers.integrations.gguf import GGUF_ARCHS
    except ImportError:  # versions with one table only
        return tuple(sorted(known))
    return tuple(sorted(known | set(GGUF_ARCHS)))


def check_gguf(path: Path, needs_tokenizer: bool = True) -> Header:
    """Find out in a second whether a file can be loaded, before minutes of dequantising.

    Raises:
        UnknownModel: broken, cut short, one part of several, without a tokenizer, or of an architecture or a kind of
            quantisation that is not read.
        KtError: the `gguf` package is missing.
    """
    header = check_whole(path, needs_tokenizer)
    architecture, supported = header.architecture, supported_architectures()
    if architecture not in supported:
        raise UnknownModel(
            f"{path}: a GGUF file of architecture {architecture or 'unknown'!r}, which transformers does not read; "
            f"supported are {', '.join(supported)}"
        )
    need("gguf", f"{path}: a GGUF file")
    return header


def check_whole(path: Path, needs_tokenizer: bool = True) -> Header:
    """The part of `check_gguf` that needs no import of transformers: all but the architecture."""
    header = read_header(path)
    architecture = header.architecture
    if header.metadata.get("split.count", 0) > 1:
        raise UnknownModel(
            f"{path} is one of {header.metadata['split.count']} parts of a model ({architecture}); join them with "
            "llama-gguf-split --merge"
        )
    if needs_tokenizer and TOKENS not in header.metadata:
        raise UnknownModel(f"{path} ({architecture}) holds no tokenizer; pass one: kt.load(path, tokenizer=tokenizer)")
    if find_spec("gguf") is None:
        return header
    expected, held = _expected_size(path, header), path.stat().st_size
    if held < expected:
        raise UnknownModel(f"{path} is cut short: {held:,} bytes of at least {expected:,}; download it again")
    return header


PLAIN_KINDS = (0, 1, 28, 30)
"""Numbers of the kinds F32, F16, F64 and BF16."""


def packed_weights(path: Path, module: nn.Module) -> dict[str, str]:
    """How the file stores each weight of its model that is quantised in it, by the module's name: "GGUF, Q8_0".

    Of a weight that gguf's table of names lacks (stacked experts), only "GGUF" where the file holds any such.
    """
    from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

    header = read_header(path)
    kinds = {tensor.name: tensor.kind for tensor in header.tensors}
    if all(kind in PLAIN_KINDS for kind in kinds.values()):
        return {}
    arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == header.architecture), None)
    n_blocks = int(header.metadata.get(f"{header.architecture}.block_count", 0))
    table = None if arch is None else get_tensor_name_map(arch, n_blocks)
    packed = {}
    for name, _ in module.named_parameters():
        own, _, part = name.rpartition(".")
        kind = kinds.get(f"{table.get_name(own)}.{part}") if table is not None else None
        if kind is None:
            packed[name] = "GGUF"
        elif kind not in PLAIN_KINDS:
            packed[name] = f"GGUF, {GGMLQuantizationType(kind).name}"
    return packed


def _expected_size(path: Path, header: Header) -> int:
    """The least number of bytes that the file has by its own table of tensors."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kinds = {int(kind): kind for kind in GGMLQuantizationType}
    ends = [0]
    for tensor in header.tensors:
        if tensor.kind not in kinds:
            raise UnknownModel(
                f"{path} ({header.architecture}): {tensor.name} is quantised as type {tensor.kind}, which the "
                "installed gguf package does not know; update it, or take the model in another quantisation"
            )
        block, size = GGML_QUANT_SIZES[kinds[tensor.kind]]
        ends.append(tensor.offset + prod(tensor.shape) // block * size)
    alignment = int(header.metadata.get("general.alignment", 32)) or 32
    return -(-header.end // alignment) * alignment + max(ends)


def load_gguf(path: Path, options: Mapping[str, Any], tokenizer: Any = None) -> tuple[nn.Module, Any]:
    """The model in a GGUF file, dequantised, and its tokenizer.

    The module is an ordinary one: nothing in it or in its config says that it was quantised, so it is saved, cast and
    loaded again as any other.

    Args:
        path: a file, not a folder.
        options: passed to `from_pretrained`.
        tokenizer: taken instead of the file's own.

    Raises:
        UnknownModel: the file cannot be read; see `check_gguf`.
        KtError: the `gguf` package is missing.
    """
    header = check_gguf(path, needs_tokenizer=tokenizer is None)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _no_bar():
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **_begins(header))
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **_dequantise(path),
                **options,
            )
    except (OSError, ValueError, LookupError, AttributeError, TypeError, ImportError, RuntimeError) as error:
        reason = said_by(error)
        raise UnknownModel(
            f"cannot load {path}: transformers does not read this GGUF file ({header.architecture}): {reason}"
        ) from error
    module, about = loaded
    require_whole(f"{path} ({header.architecture})", module, about)
    return _as_ordinary(module, path), tokenizer


def _begins(header: Header) -> dict[str, bool]:
    """Whether a text begins with BOS, which old versions of transformers do not read: they always add it for Llama."""
    key = "add_bos_token"
    value = header.metadata.get(f"tokenizer.ggml.{key}")
    return {} if value is None else {key: bool(value)}


def _dequantise(path: Path) -> dict[str, Any]:
    """Some versions of transformers keep the weights in blocks where they can; this asks them not to."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(gguf_file=path.name, dequantize=True)}


def _as_ordinary(module: nn.Module, path: Path) -> nn.Module:
    """Take off the marks of quantisation, for which `save_pretrained` refuses a model and `to` a dtype."""
    config: Any = module.config
    for owner, names in (
        (module, ("hf_quantizer", "is_quantized", "quantization_method")),
        (config, ("quantization_config", "_model_name_or_path")),
    ):
        for name in names:
            vars(owner).pop(name, None)
    config.name_or_path = str(path.parent)
    return module


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without the bar of dequantising, which no setting of transformers turns off."""
    from transformers import modeling_gguf_pytorch_utils as reader

    shown = reader.tqdm
    reader.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        reader.tqdm = shown
