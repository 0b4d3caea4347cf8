"""Names on the Hugging Face Hub: revisions, tokenizers, and one-line errors of failed loads."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._util.data import read_json, tensor_header
from .._util.text import count, some_of, visible
from ..errors import KtError, UnknownModel, install_hint, warn_user


def split_revision(model: str | Path, revision: str | None) -> tuple[str, str | None]:
    """Split `name@revision`, except for an existing path; `revision` takes precedence."""
    name, _, suffix = str(model).partition("@") if not Path(model).exists() else (str(model), "", "")
    return name, revision or suffix or None


def load_tokenizer(source: str | Path, name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder or Hub id.

    Raises:
        UnknownModel: there is none, or it fails to load.
    """
    from transformers import AutoTokenizer

    folder = Path(source)
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
    if folder.is_dir() and not any((folder / f).exists() for f in files):
        raise UnknownModel(
            f"{name}: the folder holds no tokenizer ({', '.join(files[:3])}); save it there beside the model"
        )
    with one_line(name):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        tokenizer("The")  # some settings are believed until they are used
        return tokenizer


@contextmanager
def one_line(name: str) -> Any:
    """Turn the errors of a checkpoint that fails to load into a one-line UnknownModel.

    A stranger's files make transformers fail in any way, so no kind of error is left out but those of the machine.
    """
    try:
        yield
    except KtError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of tokenizers, in Rust
            raise
        message = " ".join(str(error).split())
        if "trust_remote_code" in message:
            reason = "it comes with code of its own, which is not run; read it, then give --trust-remote-code"
        elif type(error).__name__ == "UnpicklingError":  # compared by name, since kt never imports pickle
            reason = "its weights are a pickle that holds more than tensors; convert them to safetensors elsewhere"
        elif type(error).__name__ == "OutOfMemoryError":  # a GPU's: its own line says more
            raise
        elif any(name in message.lower() for name in ("sentencepiece", "tiktoken", "protobuf")):
            reason = f"its tokenizer is of a kind that takes more packages to read; {install_hint('tokenizers')}"
        elif isinstance(error, ModuleNotFoundError) and error.name:
            package = visible(error.name.partition(".")[0])
            reason = f"reading it takes the package {package!r}, which is not here; install it, or a newer transformers"
        elif isinstance(error, (OSError, ValueError, ImportError)):
            reason = f"{message[:300] or type(error).__name__}; give demo, a local folder or a Hub id"
        else:
            reason = f"its files are not those of a model ({type(error).__name__}: {message[:300]}); download it again"
        where = "folder" if Path(name).exists() else "model"
        raise UnknownModel(f"cannot load {where} {name!r}: {reason}") from error


def require_whole(name: str, module: Any, about: Mapping[str, Any]) -> None:
    """Refuse a module of which `from_pretrained` made up weights; name in a warning what of the checkpoint it left out.

    Args:
        about: its loading info. Tied weights, and buffers that it computes, are not missing there.

    Raises:
        UnknownModel: the checkpoint lacks weights, or has them in other shapes.
    """
    weights = {key for key, _ in module.named_parameters(remove_duplicate=False)}
    missing, kind = sorted(about["missing_keys"]), type(module).__name__
    if mismatched := sorted(about["mismatched_keys"]):
        key, held, wanted = mismatched[0]
        raise UnknownModel(
            f"{name}: {len(mismatched)} of the checkpoint's weights have another shape than its config asks for "
            f"({visible(key)} is {tuple(held)}, not {tuple(wanted)}); bring back the config that belongs to them"
        )
    if lacking := [key for key in missing if key in weights]:
        raise UnknownModel(
            f"{name}: the checkpoint lacks {len(lacking)} of the {len(weights)} weights of a {kind} "
            f"({_first(lacking)}), which would be random numbers; give the whole checkpoint of a causal language "
            "model, with the config that belongs to it"
        )
    if unused := sorted(about["unexpected_keys"]):
        what = f"{count(len(unused), 'weight')} of the checkpoint not used, in no part of a {kind}: {_first(unused)}"
        warn_user(f"{name}: {what}")
    if missing:
        what = f"{count(len(missing), 'buffer')} not in the checkpoint, taken as a {kind} begins: {_first(missing)}"
        warn_user(f"{name}: {what}")


FLOATS = ("F64", "F32", "F16", "BF16")


def require_numbers(name: str, module: Any, folder: Path | None) -> dict[str, str]:
    """Refuse weights whose file holds other than floating-point numbers, and weights that are not finite.

    transformers would cast whole, complex and 8-bit numbers without a word. One sum reads each weight once.

    Returns:
        The weights of a quantised checkpoint that were dequantised: how each is stored, by name.

    Args:
        folder: the checkpoint's, if it is known; only the headers of its safetensors files are read.

    Raises:
        UnknownModel: the first such weight, by name.
    """
    import torch

    from .packed import is_packed, is_plain

    kept = tuple(f"{path}." for path, each in module.named_modules() if is_packed(each))
    named = module.named_parameters(remove_duplicate=False)
    plain = {key: weight for key, weight in named if is_plain(weight) and weight.is_floating_point()}
    weights = {key: weight for key, weight in plain.items() if not key.startswith(kept)}
    config = None if folder is None else folder / "config.json"  # the module's own forgets what was dequantised
    about = read_json(config).get("quantization_config") if config is not None and config.is_file() else None
    packed: dict[str, str] = {}
    for path in () if folder is None else sorted(folder.glob("*.safetensors")):
        for key, stored in tensor_header(path).items():
            if key == "__metadata__" or stored["dtype"] in FLOATS:
                continue
            own = key.removesuffix("_blocks").removesuffix("_packed")
            if about is not None:
                packed |= {w: f"{about.get('quant_method')}, {stored['dtype']}" for w in weights if _same_name(w, own)}
            elif any(_same_name(weight, key) for weight in weights):  # not a mask or positions
                raise UnknownModel(
                    f"{name}: {visible(key)} is stored as {stored['dtype']}, and a weight is 16-, 32- or 64-bit "
                    "floating point; download the model again, or its version in one of these"
                )
    for key, weight in weights.items():
        if weight.is_meta or bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))):
            continue
        if not bool(torch.isfinite(weight).all()):  # a sum of finite numbers may overflow
            raise UnknownModel(f"{name}: {visible(key)} holds NaN or infinity; download the model again")
    return packed


def _same_name(weight: str, key: str) -> bool:
    """Whether a checkpoint's key is the weight's name, or its end (of a part of a wrapper)."""
    return weight == key or weight.endswith(f".{key}")


def _first(keys: list[str]) -> str:
    return visible(some_of(keys, 4))
