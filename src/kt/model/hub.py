"""Names on the Hugging Face Hub: revisions, tokenizers, and one-line errors of failed loads."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UnknownModel


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
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)


@contextmanager
def one_line(name: str) -> Any:
    """Turn the errors of a checkpoint that fails to load into a one-line UnknownModel."""
    from safetensors import SafetensorError

    expected = (OSError, ValueError, KeyError, ImportError, SafetensorError)
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split())
        if "trust_remote_code" in message:
            reason = "it comes with code of its own, which is not run; read it, then give --trust-remote-code"
        elif type(error).__name__ == "UnpicklingError":  # compared by name, since kt never imports pickle
            reason = "its weights are a pickle that holds more than tensors; convert them to safetensors elsewhere"
        elif isinstance(error, expected):
            reason = f"{message[:300] or type(error).__name__}; give demo, a local folder or a Hub id"
        else:
            raise
        where = "folder" if Path(name).exists() else "model"
        raise UnknownModel(f"cannot load {where} {name!r}: {reason}") from error
