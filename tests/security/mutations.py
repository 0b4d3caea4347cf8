"""Hypothesis strategies for broken files: values, bytes and structure of a whole file changed at random."""

from __future__ import annotations

import json
from typing import Any

from absurd_files import absurd, as_json, joined, parted
from hypothesis import strategies as st

HOSTILE = (
    *("../../etc/passwd", "/etc/passwd", "C:\\x", "\x1b[31m", "{}", "a\nb"),
    *("\u202e", "\ud800", "demo", "nan", "hf:"),
)
numbers = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -0.0, 1e-320, float("inf"), float("nan")]),
    st.floats(),
)
texts = st.one_of(st.text(max_size=12), st.sampled_from(HOSTILE))
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    leaves,
    lambda below: st.one_of(st.lists(below, max_size=3), st.dictionaries(texts, below, max_size=3)),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every part of a JSON value, itself included; of long lists the first and the last parts."""
    found = [path]
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)) if len(value) <= 4 else (0, 1, len(value) - 1):
            found += places(value[index], (*path, index))
    return found


def changed(value: Any, path: tuple[Any, ...], how: str, new: Any) -> Any:
    """A copy of `value` with the part at `path` replaced, taken away, renamed, doubled or wrapped."""
    if not path:
        return {"set": new, "wrap": [value]}.get(how, new)
    key, rest = path[0], path[1:]
    copy = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copy[key] = changed(value[key], rest, how, new)
    elif how == "drop":
        del copy[key]
    elif how == "rename" and isinstance(copy, dict):
        copy[f"{new}"[:40]] = copy.pop(key)
    elif how == "double" and isinstance(copy, list):
        copy.insert(key, copy[key])
    elif how == "wrap":
        copy[key] = [copy[key]]
    else:
        copy[key] = new
    return copy


HOW = ("set", "set", "set", "drop", "drop", "rename", "double", "wrap", "swap")


@st.composite
def restructured(draw: Any, seed: Any) -> Any:
    """A JSON value with one to three of its parts changed."""
    value = seed
    for _ in range(draw(st.integers(1, 3))):
        every = places(value)
        path, how = draw(st.sampled_from(every)), draw(st.sampled_from(HOW))
        new = draw(values)
        if how == "swap":  # a part of the same value in another place
            new = value
            for key in draw(st.sampled_from(every)):
                new = new[key]
        value = changed(value, path, how, new)
    return value


@st.composite
def mangled(draw: Any, seed: bytes) -> bytes:
    """Bytes flipped, cut, doubled or put in at one to four places."""
    raw = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        at, how = draw(st.integers(0, max(len(raw) - 1, 0))), draw(st.sampled_from(("flip", "cut", "end", "insert")))
        if how == "flip" and raw:
            raw[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del raw[at : at + draw(st.integers(1, 64))]
        elif how == "end":
            del raw[at:]
        else:
            raw[at:at] = draw(st.binary(max_size=16))
    return bytes(raw)


def json_files(seed: bytes) -> st.SearchStrategy[bytes]:
    """A JSON file: restructured, mangled, or something else entirely."""
    whole = json.loads(seed)
    deep = st.integers(1, 3000).map(lambda n: b"[" * n + b"]" * n)
    return st.one_of(restructured(whole).map(as_json), mangled(seed), values.map(as_json), st.binary(max_size=64), deep)


def line_files(seed: bytes) -> st.SearchStrategy[bytes]:
    """A file with a JSON value a line, of which one is restructured."""
    lines = seed.splitlines()

    def with_line(at: int) -> st.SearchStrategy[bytes]:
        new = restructured(json.loads(lines[at])).map(as_json)
        return new.map(lambda line: b"\n".join([*lines[:at], line, *lines[at + 1 :]]))

    return st.one_of(st.integers(0, len(lines) - 1).flatmap(with_line), mangled(seed), st.binary(max_size=64))


def text_files(seed: bytes) -> st.SearchStrategy[bytes]:
    """A text file with bytes mangled, or lines taken from elsewhere in it."""
    lines = seed.splitlines(keepends=True)
    shuffled = st.lists(st.sampled_from(lines), max_size=12).map(b"".join)
    return st.one_of(mangled(seed), shuffled, st.text(max_size=64).map(lambda t: t.encode("utf-8", "replace")))


TOML = (
    *("1", "-1", "true", "[]", "[1]", '["a"]', "{}", "{a = 1}", '""', '"../../x"', "nan", "inf", "1979-05-27"),
    *("9223372036854775807", "[[1], [2]]", '"\\u001b[31m"', '"/etc/passwd"', "[{}]", "99999999999999999999"),
)


@st.composite
def toml_files(draw: Any, seed: bytes) -> bytes:
    """A TOML file with the value of a line replaced by another TOML value, or mangled."""
    if draw(st.booleans()):
        return draw(text_files(seed))
    lines = seed.decode().splitlines()
    at = draw(st.sampled_from([i for i, line in enumerate(lines) if "=" in line] or [0]))
    lines[at] = f"{lines[at].split('=')[0]}= {draw(st.sampled_from(TOML))}"
    return "\n".join(lines).encode()


@st.composite
def tensor_files(draw: Any, seed: bytes) -> bytes:
    """A safetensors file: kt's metadata restructured, the tensors' entries restructured, numbers or bytes mangled."""
    header, data = parted(seed)
    how = draw(st.sampled_from(("metadata", "metadata", "metadata", "header", "types", "data", "bytes", "absurd")))
    if how == "bytes":
        return draw(mangled(seed))
    if how == "absurd":
        return draw(st.sampled_from(list(absurd(seed).values())))
    if how == "data":
        return joined(header, draw(mangled(data)).ljust(len(data), b"\xff")[: len(data)])
    if how == "header":
        return joined(draw(restructured(header)), data)
    names = [name for name in header if name != "__metadata__"]
    if how == "types" and names:
        return joined(retyped(header, draw(st.sampled_from(names)), draw(st.sampled_from(TYPES))), data)
    metadata = dict(header.get("__metadata__", {}))
    held = draw(restructured(json.loads(metadata.get("kt", "{}"))))
    metadata["kt"] = json.dumps(held)
    return joined({**header, "__metadata__": metadata}, data)


TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "flat", "empty")
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1}


def retyped(header: dict[str, Any], name: str, dtype: str) -> dict[str, Any]:
    """A tensor under another type or shape that its bytes fit as well."""
    about = dict(header[name])
    size = about["data_offsets"][1] - about["data_offsets"][0]
    if dtype == "flat":
        about["shape"] = [size // WIDTHS.get(about["dtype"], 4)]
    elif dtype == "empty":
        about["shape"] = [*about["shape"], 0]
    else:
        about |= {"dtype": dtype, "shape": [size // WIDTHS[dtype]]}
    return {**header, name: about}
