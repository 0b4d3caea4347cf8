"""The fields of an edit's manifest and their types: what a file that somebody else made is held to.

Fields that are not named here may be anything (a method's own notes), and nothing reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

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
