"""Option values as people type them: `4-8`, `auto`, `3s`, `mlp,attn`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from .._util.limits import MOST_NOISE
from ..errors import KtError
from .command import BadOption, as_flag

if TYPE_CHECKING:
    from ..model.chat import Chat

KINDS = ("mlp", "attn", "hidden", "hidden-no-mlp", "hidden-no-attn", "experts", "attn.second", "mlp.second")
ONE_PART = r"attn\.h\d+|mlp\.[es]\d+"
"""One head, one expert, one shared expert."""
WHOLE = ("log_prob_diff", "log_prob")
"""Metrics of the whole answer; the others are of its first token."""
METRICS = {name.replace("_", "-"): name for name in ("logit_diff", "prob", *WHOLE)}


def layers(text: str | None, flag: str) -> tuple[int, ...] | None:
    """`4-8`, `4`, `1,3,5-6`: layer indices, ascending, both ends included. `none` is no layer at all."""
    if text is None or text == "auto":
        return None
    if text == "none":
        return ()
    indices: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise BadOption(f"{flag} {text!r}: not a layer range; write 4-8, 4, or 1,3,5-6 (0 is the first layer)")
        indices.update(range(first, last + 1))
    return tuple(sorted(indices))


def alpha(text: str | None) -> float | str | None:
    """`auto` or `per-fact` (measured by tracing), or a number from 0 (MLP only) to 1 (attention only)."""
    if text is None:
        return None
    from ..editing.closed_form.config import check_alpha

    try:
        return check_alpha(text, "--alpha")
    except KtError as error:
        raise BadOption(str(error)) from None


def noise(text: str) -> float:
    """`3s`: the noise in standard deviations of the embeddings."""
    value = _number(text.strip().removesuffix("s")) if text.strip().endswith("s") else None
    if value is None or value <= 0:
        raise BadOption(f"--noise {text!r}: write a multiple of the embeddings' standard deviation, as 3s")
    if value > MOST_NOISE:
        raise BadOption(f"--noise {text}: above {MOST_NOISE:g}s nothing of the embedding is left; 3s is usual")
    return value


def batch_size(text: str) -> int | str:
    """`auto` (the library chooses) or a number of rows."""
    if text == "auto":
        return "auto"
    if not text.isdigit() or int(text) == 0:
        raise BadOption(f"--batch-size {text!r}: write auto or a number of rows (32)")
    return int(text)


def names(text: str, known: Sequence[str], flag: str, also: str = "") -> tuple[str, ...]:
    """A comma-separated choice, each once, in the order typed; `also` is a pattern of more names."""
    chosen = tuple(dict.fromkeys(_spelt(part.strip(), known) for part in text.split(",")))
    for name in chosen:
        if name not in known and not re.fullmatch(also, name or "-"):
            raise BadOption(
                f"{flag} {text!r}: {name!r} is unknown; choose among {', '.join(known)}{meant(name, known)}"
            )
    return chosen


def one(text: str, known: Sequence[str], flag: str) -> str:
    """One of the known words."""
    text = _spelt(text, known)
    if text not in known:
        raise BadOption(f"{flag} {text!r}: unknown; choose one of {', '.join(known)}{meant(text, known)}")
    return text


def _spelt(word: str, known: Sequence[str]) -> str:
    """The known word that differs at most in hyphens and underscores, else the word."""
    return next((name for name in known if name.replace("_", "-") == word.replace("_", "-")), word)


OTHER_WORDS = {
    "edit": "apply-edit", "rewrite": "apply-edit", "insert": "apply-edit", "trace": "heatmap", "tracing": "heatmap",
    "causal-trace": "heatmap", "evaluate": "eval", "score": "eval", "test": "eval", "stats": "cov", "covariance": "cov",
    "merge": "export", "save": "export", "undo": "revert", "restore": "revert", "lens": "probe",
    "train": "train-editor",
    "benchmark": "abilities", "recipe": "run", "models": "ls", "list": "ls", "version": "env", "half": "float16",
    "float": "float32", "single": "float32", "double": "float64", "gpu": "cuda", "finetune": "ft", "fine-tune": "ft",
    "probability": "prob", "p": "prob", "logits": "logit-diff", "logit": "logit-diff", "attention": "attn",
    "residual": "hidden", "resid": "hidden", "ffn": "mlp", "huggingface": "hf", "merged": "hf", "lora": "peft",
    "adapter": "peft", "lambda": "alpha", "layer": "layers",
}  # fmt: skip
"""Words of other tools, or of papers, for ours: people type them, and no spelling leads from one to the other."""


def meant(text: str, known: Sequence[str]) -> str:
    """The end of a refusal: the known word that was probably meant."""
    word = text.lower().replace("_", "-").removeprefix("torch.")
    other = OTHER_WORDS.get(word)
    near = [other] if other in known else get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def settings(text: str | None) -> dict[str, Any]:
    """`v_lr=0.1,clamp_norm_factor=0.75,layers_high=5-6`: hyper-parameters by name, in the order typed.

    Raises:
        BadOption: no name and value, or a name that is given twice.
    """
    values: dict[str, Any] = {}
    typed: dict[str, str] = {}
    for part in re.split(r",(?=\s*\w+\s*=)", text or ""):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not part.strip():
            continue
        if not equals or not name.isidentifier() or not value:
            raise BadOption(f"--set {part.strip()!r}: write name=value, as v_lr=0.1,clamp_norm_factor=0.75")
        if name in typed:
            raise BadOption(f"--set gives {name} twice, {typed[name]} and {value}; give it once")
        typed[name] = value
        number = _number(value)
        if name.startswith("layers_"):
            values[name] = layers(value, f"--set {name}")
        elif value.lower() in ("true", "false"):
            values[name] = value.lower() == "true"
        elif number is not None:
            values[name] = int(number) if value.lstrip("+-").isdigit() else number
        else:
            values[name] = value
    return values


def solve_settings(options: Any) -> dict[str, Any]:
    """The hyper-parameters of `--set` and of their own flags, as far as they are given."""
    given = settings(getattr(options, "set", None)) | {
        name: layers(getattr(options, name, None), as_flag(name)) for name in ("layers_mlp", "layers_attn")
    }
    return {name: value for name, value in given.items() if value is not None}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def chat(options: Any) -> Chat:
    """How prompts are asked, of `--chat`, `--system`, `--thinking` and `--chat-turn`.

    Raises:
        BadOption: a value is none of its option's.
    """
    from ..model.chat import MODES, TURNS
    from ..model.chat import Chat as Settings

    thinking = {None: None, "on": True, "off": False}
    if options.thinking not in thinking:
        one(options.thinking, ("on", "off"), "--thinking")
    mode = one(options.chat or "auto", MODES, "--chat")
    turn = one(options.chat_turn or "auto", TURNS, "--chat-turn")
    return Settings(mode, options.system, thinking[options.thinking], turn)
