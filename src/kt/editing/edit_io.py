"""An edit as a file: safetensors with the manifest inside, and a digest over both.

    metadata "kt"        JSON: schema_version, kind "edit", digest, weights, report, and the manifest's own fields
    left/W, right/W      the factors of a weight's update, where they are smaller than their product
    dense/W              their product elsewhere
    target/SITE, key/W   the targets and keys that were solved for, (fact, d)
    entry/NAME           the tensors of an effect (see adapter_edit.py); the kind is then "adapter" or "context", and
                         "effect" in the metadata has its other fields

The digest is SHA-256 over the other metadata and over every tensor's name, dtype, shape and bytes. The metadata has
one form only (sorted keys, ASCII), so every flipped bit is found. Reading runs no code. Field types and tensor shapes
are checked too, since anybody can compute a digest that fits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._util.data import SCHEMA_VERSION, header_text, read_arrays, save_arrays
from ..errors import BadFile, KtError, WorkFailed
from ..model.effects import Effect
from ..model.update import Dense, LowRank, Update
from .file_kind import EDIT, KINDS, MAKE, not_an_edit, other_format
from .request_report import LOG_PROBS, RequestReport

# The fields of an edit's manifest and their forms. Other fields may hold anything (a method's own notes); nothing reads
# them.
#
# A form is a type (`int`: within 64 bits; `float`: any finite number), None, a tuple of alternatives, `[form]` for a
# list of any length, `[form, form]` for a pair, or `{name: form}` for an object. A field that an object lacks counts as
# null. The key `...` gives the form of all fields without a name; without that key they may hold anything. NaN is null
# in JSON.

NUMBER = (float, None)
TEXT = (str, None)
TEXTS = {...: str}
NUMBERS = {...: NUMBER}
MEAN = {"mean": NUMBER, "ci95": ([float, float], None), "n": int}
ANSWER = {"str": str}
CHOSEN = (
    {"lambda": float, "x": float, "share": float, ...: float},
    {"lr": float, ...: float},
    {"norm_constraint": float, ...: float},
)
REQUEST = {"id": str, "prompt": str, "subject": str, "target_new": ANSWER, "target_true": (ANSWER, None)}
REPORT = {
    "id": str,
    "prompt": str,
    "subject": str,
    "target": str,
    "answer": TEXT,
    "target_prob": [NUMBER, NUMBER],
    "target_rank": [int, int],
    "answer_prob": ([NUMBER, NUMBER], None),
    "answer_rank": ([int, int], None),
    "control_prob": NUMBER,
    ...: (),
}

SEEN = {"subjects": int, "train": int, "held_out": int, ...: (int, None)}
"""Of an edit by a trained editor: its subjects, and how many of them the editor knew (`Editor.seen`)."""

REQUIRED: dict[str, tuple[Any, str]] = {
    "weights": ([str], "a list of names"),
    "report": ([REPORT], "a list of requests before and after"),
}
FIELDS: dict[str, tuple[Any, str]] = REQUIRED | {
    "method": (str, "a text"),
    "model": (str, "a text"),
    "revision": (TEXT, "a text or null"),
    "dtype": (str, "a text"),
    "control": (str, "a text"),
    "forced": (str, "a text"),
    "seed": (int, "a whole number"),
    "past_keys": (int, "a whole number"),
    "norm_guard": ((bool, str), "true, false or a guard's name"),
    "update_guard": (str, "a text"),
    "norm_anchors": (NUMBERS, "numbers by target site"),
    "skipped": ([str], "a list of subjects"),
    "unwritten": ([str], "a list of subjects"),
    "not_found": ([str], "a list of requests' ids"),
    "alpha": (NUMBER, "a number or null"),
    "alphas": (([float], None), "a list of numbers or null"),
    "steps": ((int, [int]), "a whole number or a list of them"),
    "aims": ([str], "a list of texts"),
    "written_aims": ([str], "a list of texts"),
    "attention_weights": ([str], "a list of names"),
    "stands_on": ([str], "a list of digests"),
    "context_templates": ([[str]], "lists of templates"),
    "hyper_parameters": ({}, "an object"),
    "statistics": (
        {"corpus": TEXT, "n_tokens": (int, None), "cache_keys": (TEXTS, None), "sha256": (TEXTS, None)},
        "corpus, n_tokens, cache_keys and sha256",
    ),
    "versions": (TEXTS, "texts by name"),
    "identity": ({"config": {}, "tokenizer": str}, "config and tokenizer"),
    "editor": (str, "a digest"),
    "editor_seen": ((SEEN, None), "numbers of subjects or null"),
    "dequantised": (TEXTS, "texts by weight"),
    "packed": (TEXTS, "texts by weight"),
    "fingerprints": (TEXTS, "texts by weight"),
    "fingerprints_after": (TEXTS, "texts by weight"),
    "weight_norms": (NUMBERS, "numbers by weight"),
    "norm_ratios": (NUMBERS, "numbers by weight"),
    "conditions": (NUMBERS, "numbers by weight"),
    "chosen": ({...: CHOSEN}, "lambda, x and share, lr or norm_constraint by weight"),
    "neighbours": ({"kept": int, "n": int}, "kept and n"),
    "perplexity": (
        {"before": NUMBER, "after": NUMBER, "text": str, "tokens": int},
        "before, after, text and tokens",
    ),
    "rounding": ({...: {"survived": NUMBER, "error": NUMBER}}, "survived and error by weight"),
    "lost_to_rounding": (([str], None), "a list of requests' ids or null"),
    LOG_PROBS: ([{...: [float, float]}], "by request, pairs of numbers by answer"),
    "requests": ([REQUEST], "a list of requests"),
    "value_change": ({...: {"came_through": MEAN, "left": MEAN}}, "means by aim"),
}


def read_by_checks(seen: Mapping[str, Any]) -> int:
    """Of `editor_seen`, the subjects that the editor's checks read; an older one names all that were held out."""
    checked = seen.get("checked")
    return int(seen["held_out"] if checked is None else checked)


def fits(value: Any, form: Any) -> bool:
    """Whether a JSON value has the form; loops instead of `any`, since large edits call this 100,000 times."""
    if isinstance(form, type):
        if form is float and isinstance(value, float):
            return math.isfinite(value)
        if form is int or form is float:
            return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        return isinstance(value, form)
    if isinstance(form, tuple):
        for one in form:  # noqa: SIM110
            if fits(value, one):
                return True
        return False
    if isinstance(form, list):
        forms = form * len(value) if isinstance(value, list) and len(form) == 1 else form
        return isinstance(value, list) and len(value) == len(forms) and all(map(fits, value, forms))
    if isinstance(form, dict) and isinstance(value, dict):
        for name, one in form.items():
            if name is not ... and not fits(value.get(name), one):
                return False
        return ... not in form or all(fits(value[name], form[...]) for name in value.keys() - form.keys())
    return form is None and value is None


def shallow(value: Any, levels: int = 32) -> bool:
    """Whether a JSON value has at most so many levels (a number has one), so that it can be written again."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    nested = (item for item in inside if isinstance(item, (dict, list)))
    return levels > bool(inside) and all(shallow(item, levels - 1) for item in nested)


def wrong_field(manifest: Mapping[str, Any]) -> str | None:
    """The first field that is missing or lacks its form, in words; None if all are right."""
    if not shallow(manifest):
        return "fields are nested too deeply"
    for name, (form, words) in FIELDS.items():
        if name in manifest and not fits(manifest[name], form):
            return f"field {name!r} is not {words}"
        if name in REQUIRED and name not in manifest:
            return f"field {name!r} is missing"
    return None


class EditParts(NamedTuple):
    """The fields of an `Edit`, as its file holds them; targets and keys are (fact, d)."""

    updates: dict[str, Update]
    manifest: dict[str, Any]
    report: tuple[RequestReport, ...]
    targets: dict[str, Tensor]
    keys: dict[str, Tensor]
    effect: Effect | None = None


PREFIXES = ("left", "right", "dense", "target", "key", "entry")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AGAIN = "take it again from where it came, or solve it again"


def save(edit: EditParts, path: str | Path) -> Path:
    """Write an edit's file, whole or not at all.

    Returns:
        The file's path.

    Raises:
        WorkFailed: a number is not finite; nothing was written.
        KtError: a tensor is not floating-point, or `load` would refuse a field of the manifest.
    """
    arrays, metadata = contents(edit)
    if (problem := wrong_field(json.loads(header_text(metadata)))) is not None:
        raise KtError(f"the edit's manifest could not be read again: {problem}; mend it before saving")
    for name, array in arrays.items():
        if array.dtype not in DTYPES:
            raise KtError(f"{name} is {array.dtype}; an edit holds numbers of floating point; convert it first")
        if not bool(torch.isfinite(array).all()):
            raise WorkFailed(f"{name} is not finite; the edit was not saved; solve it again")
    return save_arrays(path, arrays, metadata | {"digest": digest_of(arrays, metadata)})


def contents(edit: EditParts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of an edit's file, without the digest."""
    arrays: dict[str, Tensor] = {}
    for name, update in edit.updates.items():
        if isinstance(update, LowRank) and update.rank * sum(update.shape) < update.shape[0] * update.shape[1]:
            arrays[f"left/{name}"], arrays[f"right/{name}"] = update.left, update.right
        else:  # `Edit.delta`, to the bit
            arrays[f"dense/{name}"] = (
                update.matrix if isinstance(update, Dense) else update.to(torch.float64).dense().float()
            )
    arrays |= {f"target/{n}": t for n, t in edit.targets.items()} | {f"key/{n}": k for n, k in edit.keys.items()}
    metadata: dict[str, Any] = {"kind": EDIT, "weights": list(edit.updates), "report": edit.report}
    if edit.effect is not None:
        arrays |= {f"entry/{name}": array for name, array in edit.effect.arrays().items()}
        metadata |= {"kind": edit.effect.kind, "effect": edit.effect.fields()}
    return {name: array.detach().cpu().contiguous() for name, array in arrays.items()}, edit.manifest | metadata


def digest(edit: EditParts) -> str:
    """The digest that an edit has in a file."""
    return digest_of(*contents(edit))


def digest_of(arrays: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 over the metadata and the tensors (contiguous, on the CPU), sorted by name; 64 hexadecimal digits."""
    sha256 = hashlib.sha256(header_text(metadata).encode())
    for name, array in sorted(arrays.items()):
        sha256.update(f"\n{json.dumps(name)} {array.dtype} {tuple(array.shape)}\n".encode())
        sha256.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def load(path: str | Path) -> EditParts:
    """Read an edit's file.

    Raises:
        BadFile: the file is missing, cut short, changed since it was written, of a newer kt, or not an edit.
    """
    try:
        arrays, text = read_arrays(path, framework="pt")
    except BadFile as error:
        other = other_format(Path(path))
        raise BadFile(f"{path}: is {other}, expected edit; {MAKE}") if other else error from None
    kind, manifest = _manifest(path, arrays, text)
    weights, report = manifest.pop("weights"), manifest.pop("report")
    if (problem := next(_misfits(arrays, weights), None)) is not None:
        raise BadFile(f"{path}: {problem}; {AGAIN}")
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in PREFIXES}
    for name, array in arrays.items():
        prefix, _, rest = name.partition("/")
        parts[prefix][rest] = array
    updates: dict[str, Update] = {
        n: Dense(parts["dense"][n]) if n in parts["dense"] else LowRank(parts["left"][n], parts["right"][n])
        for n in weights
    }
    blank = dict.fromkeys(f.name for f in fields(RequestReport))  # fields that may be null may be missing
    rows = tuple(RequestReport(**blank | {k: _pair(v) for k, v in row.items()}) for row in report)
    effect = None if kind == EDIT else _effect(path, kind, manifest.pop("effect", None), parts["entry"])
    return EditParts(updates, manifest, rows, parts["target"], parts["key"], effect)


def _effect(path: str | Path, kind: str, fields: Any, arrays: dict[str, Tensor]) -> Effect:
    """The effect that a file holds."""
    from .adapter_edit import Adapter
    from .context_edit import Context

    effects: dict[str, Any] = {each.kind: each for each in (Context, Adapter)}
    try:
        if not fits(fields, effects[kind].FORM):
            raise KtError(f"its entries are not those of a {kind}")
        effect: Effect = effects[kind].of(fields, arrays)
    except KtError as error:
        raise BadFile(f"{path}: {error}; {AGAIN}") from None
    return effect


def _manifest(path: str | Path, arrays: Mapping[str, Tensor], text: str) -> tuple[str, dict[str, Any]]:
    """The kind, and the metadata without kind, version and digest, after these and the fields' forms were checked."""
    try:
        metadata = json.loads(text)
        one_form = json.dumps(metadata, sort_keys=True, allow_nan=False) == text
        json.dumps(metadata, ensure_ascii=False).encode()  # a lone surrogate cannot be printed
    except (ValueError, RecursionError):
        raise BadFile(f"{path}: its manifest is not JSON as kt writes it; {AGAIN}") from None
    kind = metadata.pop("kind", None) if isinstance(metadata, dict) else None
    if kind not in KINDS:
        raise not_an_edit(path, kind)
    version = metadata.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        shown = version if isinstance(version, int) else "none"
        remedy = "update kt" if newer else AGAIN
        raise BadFile(f"{path}: schema_version {str(shown)[:20]}, but this kt reads {SCHEMA_VERSION}; {remedy}")
    expected = metadata.pop("digest", None)
    if expected is None:
        raise BadFile(f"{path}: has no digest (an early kt wrote it, or it was put together by hand); solve it again")
    try:
        same = one_form and digest_of(arrays, metadata | {"kind": kind}) == expected
    except RecursionError:
        same = False
    if not same:
        raise BadFile(f"{path}: was changed after it was written (its digest does not fit); {AGAIN}")
    if (problem := wrong_field(metadata)) is not None:
        raise BadFile(f"{path}: its manifest's {problem}; {AGAIN}")
    return kind, metadata


def _misfits(arrays: Mapping[str, Tensor], weights: list[str]) -> Iterator[str]:
    """Problems of the tensors: missing, not named, of a wrong type or shape, not finite."""
    if len(set(weights)) != len(weights):
        yield "it names a weight twice"
    known = set()
    for name in weights:
        forms = [form for form in ((f"dense/{name}",), (f"left/{name}", f"right/{name}")) if {*form} <= {*arrays}]
        if len(forms) != 1:
            yield f"it holds {'no update' if not forms else 'two updates'} of {name!r}"
            return
        known |= {*forms[0]}
        if len(forms[0]) == 2:
            left, right = (arrays[part].shape for part in forms[0])
            if not len(left) == len(right) == 2 or left[1] != right[0]:
                yield f"the factors of {name!r}, {tuple(left)} and {tuple(right)}, do not fit each other"
                return
    for name, array in arrays.items():
        prefix, _, rest = name.partition("/")
        if name not in known and prefix not in ("target", "key", "entry"):
            yield f"its tensor {name!r} belongs to no weight"
        elif prefix in ("target", "key") and array.dim() != 2:
            yield f"its tensor {name!r} is {tuple(array.shape)}, not (fact, d)"
        elif prefix == "key" and rest not in weights:
            yield f"its keys {name!r} belong to no weight"
        elif prefix == "key" and array.shape[1] != _width(arrays, rest):
            yield f"its keys {name!r} have {array.shape[1]} numbers, the weight reads {_width(arrays, rest)}"
        elif array.dtype not in DTYPES:
            yield f"its tensor {name!r} is {array.dtype}, not of floating point"
        elif not bool(torch.isfinite(array).all()):
            yield f"its tensor {name!r} is not finite"


def _width(arrays: Mapping[str, Tensor], weight: str) -> int | None:
    """d_in of a weight's update; None if it is no matrix."""
    matrix = arrays.get(f"right/{weight}", arrays.get(f"dense/{weight}"))
    return None if matrix is None or matrix.dim() != 2 else matrix.shape[1]


def _pair(value: Any) -> Any:
    """A JSON list as a tuple, with NaN for null; another value as it is."""
    return tuple(float("nan") if v is None else v for v in value) if isinstance(value, list) else value
