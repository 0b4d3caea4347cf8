"""An edit as a file: safetensors with the manifest inside, and a digest over both.

    metadata "kt"        JSON: schema_version, kind "edit", digest, weights, report, and the manifest's own fields
    left/W, right/W      the factors of an update, where they are smaller than their product
    dense/W              the product elsewhere
    target/AIM, key/W    what was solved for, (fact, d)

The digest is SHA-256 over the metadata without it and over every tensor's name, dtype, shape and bytes. The metadata is
in one form only (sorted keys, ASCII), so that any bit flipped in the file is found. Reading runs no code, and a file
whose digest somebody made anew is still held to its fields' types and its tensors' shapes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._util.data import SCHEMA_VERSION, header_text, read_arrays, save_arrays
from ..errors import BadFile, KtError, WorkFailed
from ..model.update import Dense, LowRank, Update
from .request_report import RequestReport

# The fields of an edit's manifest and their types: what a file that somebody else made is held to.
#
# Fields that are not named here may be anything (a method's own notes), and nothing reads them.

Check = Callable[[Any], bool]


def text(value: Any) -> bool:
    return isinstance(value, str)


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def number(value: Any) -> bool:
    return whole(value) or (isinstance(value, float) and math.isfinite(value))


def maybe(check: Check) -> Check:
    """Null too: NaN is null in JSON."""
    return lambda value: value is None or check(value)


def either(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def each(check: Check, length: int | None = None) -> Check:
    """A list of it."""
    return lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(check, value))


def table(check: Check) -> Check:
    """It by name."""
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def record(only: bool = False, **checks: Check) -> Check:
    """These fields, of which those that may be null may be missing; with `only`, no others."""

    def check(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and not (only and value.keys() - checks.keys())
            and all(holds(value.get(name)) for name, holds in checks.items())
        )

    return check


def anything(value: Any) -> bool:
    return True


def shallow(value: Any, levels: int = 32) -> bool:
    """Nested at most that deep: what can be read can also be written."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(shallow(item, levels - 1) for item in inside)


MEAN = record(mean=maybe(number), ci95=maybe(each(number, 2)), n=whole)
ANSWER = record(str=text)
REQUEST = record(id=text, prompt=text, subject=text, target_new=ANSWER, target_true=maybe(ANSWER))
REPORT = record(
    only=True,
    id=text,
    prompt=text,
    subject=text,
    target=text,
    answer=maybe(text),
    target_prob=each(maybe(number), 2),
    target_rank=each(whole, 2),
    answer_prob=maybe(each(maybe(number), 2)),
    answer_rank=maybe(each(whole, 2)),
    control_prob=maybe(number),
)

REQUIRED: dict[str, tuple[Check, str]] = {
    "weights": (each(text), "a list of names"),
    "report": (each(REPORT), "a list of requests before and after"),
}
FIELDS: dict[str, tuple[Check, str]] = REQUIRED | {
    "method": (text, "a text"),
    "model": (text, "a text"),
    "revision": (maybe(text), "a text or null"),
    "dtype": (text, "a text"),
    "control": (text, "a text"),
    "forced": (text, "a text"),
    "seed": (whole, "a whole number"),
    "past_keys": (whole, "a whole number"),
    "norm_guard": (flag, "true or false"),
    "alpha": (maybe(number), "a number or null"),
    "alphas": (maybe(each(number)), "a list of numbers or null"),
    "steps": (either(whole, each(whole)), "a whole number or a list of them"),
    "aims": (each(text), "a list of texts"),
    "attention_weights": (each(text), "a list of names"),
    "stands_on": (each(text), "a list of digests"),
    "context_templates": (each(each(text)), "lists of templates"),
    "hyper_parameters": (table(anything), "an object"),
    "statistics": (
        record(
            corpus=maybe(text), n_tokens=maybe(whole), cache_keys=maybe(table(text)), sha256=maybe(table(text))
        ),
        "corpus, n_tokens, cache_keys and sha256",
    ),
    "versions": (table(text), "texts by name"),
    "fingerprints": (table(text), "texts by weight"),
    "fingerprints_after": (table(text), "texts by weight"),
    "weight_norms": (table(maybe(number)), "numbers by weight"),
    "norm_ratios": (table(maybe(number)), "numbers by weight"),
    "conditions": (table(maybe(number)), "numbers by weight"),
    "rounding": (
        table(record(survived=maybe(number), error=maybe(number))),
        "survived and error by weight",
    ),
    "lost_to_rounding": (maybe(each(text)), "a list of requests' ids or null"),
    "requests": (each(REQUEST), "a list of requests"),
    "value_change": (table(record(came_through=MEAN, left=MEAN)), "means by aim"),
}  # fmt: skip


def wrong_field(manifest: Mapping[str, Any]) -> str | None:
    """The first field that is missing or not of its type, in words; None where all are right."""
    if not shallow(manifest):
        return "fields are nested too deeply"
    for name, (check, what) in FIELDS.items():
        if name in manifest and not check(manifest[name]):
            return f"field {name!r} is not {what}"
        if name in REQUIRED and name not in manifest:
            return f"field {name!r} is missing"
    return None


class EditParts(NamedTuple):
    """The fields of an `Edit`, as its file holds them."""

    updates: dict[str, Update]
    manifest: dict[str, Any]
    report: tuple[RequestReport, ...]
    targets: dict[str, Tensor]
    keys: dict[str, Tensor]


KIND = "edit"
PREFIXES = ("left", "right", "dense", "target", "key")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AGAIN = "take it again from where it came, or solve it again"
MAKE = "give the edit.safetensors of a kt apply-edit run"


def save(edit: EditParts, path: str | Path) -> Path:
    """Write the edit: whole, or not at all.

    Raises:
        WorkFailed: a number is not finite; nothing was written.
        KtError: a tensor is not of floating point, or a field of the manifest has another type than it is read with.
    """
    arrays, metadata = contents(edit)
    if (wrong := wrong_field(json.loads(header_text(metadata)))) is not None:
        raise KtError(f"the edit's manifest could not be read again: {wrong}; mend it before saving")
    for name, array in arrays.items():
        if array.dtype not in DTYPES:
            raise KtError(f"{name} is {array.dtype}; an edit holds numbers of floating point; convert it first")
        if not bool(torch.isfinite(array).all()):
            raise WorkFailed(f"{name} is not finite; the edit was not saved; solve it again")
    return save_arrays(path, arrays, metadata | {"digest": digest_of(arrays, metadata)})


def contents(edit: EditParts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of an edit's file, but for the digest."""
    arrays: dict[str, Tensor] = {}
    for name, update in edit.updates.items():
        if isinstance(update, LowRank) and update.rank * sum(update.shape) < update.shape[0] * update.shape[1]:
            arrays[f"left/{name}"], arrays[f"right/{name}"] = update.left, update.right
        else:  # `delta` is what is written, so what is kept of it is the same to the bit
            arrays[f"dense/{name}"] = (
                update.matrix if isinstance(update, Dense) else update.to(torch.float64).dense().float()
            )
    arrays |= {f"target/{n}": t for n, t in edit.targets.items()} | {f"key/{n}": k for n, k in edit.keys.items()}
    about = {"kind": KIND, "weights": list(edit.updates), "report": edit.report}
    return {name: array.detach().cpu().contiguous() for name, array in arrays.items()}, edit.manifest | about


def digest(edit: EditParts) -> str:
    """The digest that the edit's file has, or would have."""
    return digest_of(*contents(edit))


def digest_of(arrays: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 over metadata and tensors, in the order of their names."""
    found = hashlib.sha256(header_text(metadata).encode())
    for name, array in sorted(arrays.items()):
        found.update(f"\n{json.dumps(name)} {array.dtype} {tuple(array.shape)}\n".encode())
        found.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def load(path: str | Path) -> EditParts:
    """Read an edit's file.

    Raises:
        BadFile: it is not there, cut short, changed since it was written, of a newer kt, or not an edit; in one line.
    """
    try:
        arrays, text = read_arrays(path, framework="pt")
    except BadFile as error:
        other = _something_else(Path(path))
        raise BadFile(f"{path}: is {other}, expected edit; {MAKE}") if other else error from None
    manifest = _manifest(path, arrays, text)
    weights, report = manifest.pop("weights"), manifest.pop("report")
    if (wrong := next(_misfits(arrays, weights), None)) is not None:
        raise BadFile(f"{path}: {wrong}; {AGAIN}")
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in PREFIXES}
    for name, array in arrays.items():
        prefix, _, rest = name.partition("/")
        parts[prefix][rest] = array
    updates: dict[str, Update] = {
        n: Dense(parts["dense"][n]) if n in parts["dense"] else LowRank(parts["left"][n], parts["right"][n])
        for n in weights
    }
    blank = dict.fromkeys(f.name for f in fields(RequestReport))  # what may be null may be missing
    said = tuple(RequestReport(**blank | {k: _pair(v) for k, v in row.items()}) for row in report)
    return EditParts(updates, manifest, said, parts["target"], parts["key"])


def _manifest(path: str | Path, arrays: Mapping[str, Tensor], text: str) -> dict[str, Any]:
    """The metadata, held to its kind, version, digest and types; without what only a file has."""
    try:
        held = json.loads(text)
        one_form = json.dumps(held, sort_keys=True, allow_nan=False) == text
        json.dumps(held, ensure_ascii=False).encode()  # a lone surrogate could be printed nowhere
    except (ValueError, RecursionError):
        raise BadFile(f"{path}: its manifest is not JSON as kt writes it; {AGAIN}") from None
    kind = held.pop("kind", None) if isinstance(held, dict) else None
    if kind != KIND:
        what = f"a {kind[:40]} of kt" if isinstance(kind, str) else "tensors of another program"
        raise BadFile(f"{path}: holds {what}, expected edit; {MAKE}")
    version = held.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        shown = version if isinstance(version, int) else "none"
        remedy = "update kt" if newer else AGAIN
        raise BadFile(f"{path}: schema_version {str(shown)[:20]}, but this kt reads {SCHEMA_VERSION}; {remedy}")
    written = held.pop("digest", None)
    if written is None:
        raise BadFile(f"{path}: has no digest (an early kt wrote it, or it was put together by hand); solve it again")
    try:
        same = one_form and digest_of(arrays, held | {"kind": KIND}) == written
    except RecursionError:
        same = False
    if not same:
        raise BadFile(f"{path}: was changed after it was written (its digest does not fit); {AGAIN}")
    if (wrong := wrong_field(held)) is not None:
        raise BadFile(f"{path}: its manifest's {wrong}; {AGAIN}")
    return held


def _misfits(arrays: Mapping[str, Tensor], weights: list[str]) -> Iterator[str]:
    """What is wrong with the tensors: missing or left over, of a wrong type or shape, not finite."""
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
        if name not in known and prefix not in ("target", "key"):
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
    whole = arrays.get(f"right/{weight}", arrays.get(f"dense/{weight}"))
    return None if whole is None or whole.dim() != 2 else whole.shape[1]


def _pair(value: Any) -> Any:
    """A list as the tuple that it was; JSON has no NaN, which is null there."""
    return tuple(float("nan") if v is None else v for v in value) if isinstance(value, list) else value


def _something_else(path: Path) -> str | None:
    """What a file that is not safetensors seems to be, by its first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:
        return None
    if not start:
        return "an empty file"
    if start[4:9] == b"\0\0\0\0{":  # the length of safetensors' header, and the header
        return None
    looks = {
        b"{": "JSON or text",
        b"[": "JSON or text",
        b"PK": "a zip archive (a checkpoint of torch? kt opens no pickle)",
        b"\x80": "a pickle, which kt does not open",
    }
    return next((what for first, what in looks.items() if start.lstrip().startswith(first)), None)
