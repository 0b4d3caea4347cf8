"""What a model is: its weights alone are not enough, since another config or tokenizer gives other keys and scores."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from .._util.data import to_json

if TYPE_CHECKING:
    from .model import TracedModel

OF_A_FILE = ("_name_or_path", "transformers_version")
"""Keys of a config that say where and with what it was written."""


def identity(model: TracedModel, fingerprint: str | None = None) -> str:
    """SHA-256 over the weights, their type, the config and the rules of the tokenizer.

    Args:
        fingerprint: the weights', if it is known already; computing it reads all of them.
    """
    parts = {
        "weights": fingerprint or model.fingerprint(),
        "dtype": str(model.dtype),
        "config": _without(model.module.config.to_dict()),
        "tokenizer": _rules(model.tokenizer),
    }
    return hashlib.sha256(to_json(parts).encode()).hexdigest()


def _without(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without(item) for key, item in value.items() if key not in OF_A_FILE}


def _rules(tokenizer: Any) -> list[str]:
    """Everything that decides how a tokenizer encodes and decodes."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    rules = core.to_str() if core is not None else to_json(tokenizer.get_vocab())
    special = to_json(tokenizer.special_tokens_map)
    return [type(tokenizer).__name__, rules, special, str(getattr(tokenizer, "chat_template", None))]
