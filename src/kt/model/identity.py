"""What a model is: its weights alone are not enough, since another config or tokenizer gives other keys and scores."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .._util.data import plain, to_json

if TYPE_CHECKING:
    from .model import TracedModel

IGNORED = re.compile(
    r"_name_or_path|transformers_version|architectures|(torch_)?dtype|use_cache|output_\w+|return_dict|"
    r"id2label|label2id|problem_type|initializer_range|pad_token_id|gradient_checkpointing|\w*dropout\w*|\w+_pdrop"
)
"""Keys of a config that change nothing in a forward of kt's: provenance, labels, padding, training. Of the weights'
type the weights themselves tell."""
PROBE = "The  São Paulo's 1024\n東京 {}"
"""A text whose tokens tell of rules that stand in no file of the tokenizer."""


def about(model: TracedModel) -> dict[str, Any]:
    """Beside the weights, what decides on a model's numbers: its `config` by dotted key, and a hash of its `tokenizer`.

    Plain data, the same however the model was loaded; files keep it, and what differs can be named.
    """
    return {"config": _flat(model.module.config.to_dict()), "tokenizer": _tokenizer(model.tokenizer)}


def of_a_run(model: TracedModel) -> dict[str, Any]:
    """The same by the names under which a run's settings keep it, with what counts as attention and MLP, and how the
    model and its tokenizer write texts."""
    beside, rules = about(model), getattr(model.module, "generation_config", None)
    texts = _flat(rules.to_dict() if rules else {}) | {
        "chat_template": plain(getattr(model.tokenizer, "chat_template", None))
    }
    parts = {"model parts": model.layout.parts(), "model's texts": texts}
    if model.chat is not None:
        parts["model's chat"] = model.chat.frame.as_dict()
    return {"model config": beside["config"], "model tokenizer": beside["tokenizer"]} | parts


def turns_of(model: TracedModel, prompts: Iterable[str]) -> dict[str, str]:
    """A setting of runs that put texts before prompts, where one of the prompts is a question by its first word alone:
    an older kt read it behind a text as the beginning of the reply."""
    reader = model.chat
    if reader is None or all(reader.in_reply(prompt) == reader.in_reply(f"So. {prompt}") for prompt in prompts):
        return {}
    return {"texts before questions without their mark": "in the question's turn"}


def identity(model: TracedModel, fingerprint: str | None = None) -> str:
    """SHA-256 over the weights, their type, the config, the rules of the tokenizer, and what counts as which part.

    Args:
        fingerprint: the weights', if it is known already; computing it reads all of them.
    """
    parts = {"weights": fingerprint or model.fingerprint(), "dtype": str(model.dtype), "parts": model.layout.parts()}
    parts |= about(model) | ({"chat": model.chat.frame.as_dict()} if model.chat is not None else {})
    return hashlib.sha256(to_json(parts).encode()).hexdigest()


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested settings by dotted key, without those that change nothing."""
    if not isinstance(value, dict):
        return {path: str(value) if isinstance(value, float) and not math.isfinite(value) else plain(value)}
    kept = {str(key): item for key, item in value.items() if not IGNORED.fullmatch(str(key))}
    return {k: v for key, item in kept.items() for k, v in _flat(item, f"{path}.{key}" if path else key).items()}


_KNOWN: WeakKeyDictionary[Any, tuple[str, str]] = WeakKeyDictionary()
"""By tokenizer: its small rules, and the hash of all. The words of a large one take a second to write down."""


def _tokenizer(tokenizer: Any) -> str:
    """A hash of everything that decides how a tokenizer encodes and decodes; how it pads does not."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    special = {k: v for k, v in getattr(tokenizer, "special_tokens_map", {}).items() if k != "pad_token"}
    state = [plain(special), len(tokenizer), list(tokenizer(PROBE)["input_ids"])]
    state.append(getattr(tokenizer, "clean_up_tokenization_spaces", None))
    if core is not None:
        parts = (core.normalizer, core.pre_tokenizer, core.post_processor, core.decoder)
        state += [None if part is None else part.__getstate__().decode() for part in parts]
    small = json.dumps(state)
    known, digest = _KNOWN.get(tokenizer, ("", ""))
    if known != small:
        # What comes before the tokens says how the last call padded and cut.
        words = to_json(tokenizer.get_vocab()) if core is None else core.to_str().partition('"added_tokens":')[2]
        digest = hashlib.sha256(f"{small}\n{words}".encode()).hexdigest()
        _KNOWN[tokenizer] = small, digest
    return digest
