"""Safetensors files that no program writes."""

from __future__ import annotations

import json
import struct
from typing import Any


def as_json(value: Any) -> bytes:
    """As Python writes it: NaN and halves of surrogate pairs too."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def parted(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and its data."""
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def joined(header: Any, data: bytes) -> bytes:
    text = as_json(header)
    return struct.pack("<Q", len(text)) + text + data


def absurd(raw: bytes) -> dict[str, bytes]:
    """By name, a safetensors file with what no program writes: its length, its header, its metadata, its tensors."""
    header, data = parted(raw)
    names = [name for name in header if name != "__metadata__"]
    kept = header.get("__metadata__", {}).get("kt", "{}").rstrip("}")
    comma = ", " if len(kept) > 1 else ""

    def told(text: str) -> bytes:
        return joined({**header, "__metadata__": {"kt": text}}, data)

    def every(**fields: Any) -> bytes:
        return joined({**header, **{name: {**header[name], **fields} for name in names}}, data)

    def rebuilt(shape: list[int]) -> bytes:
        entries = {name: {**header[name], "shape": shape, "data_offsets": [0, 0]} for name in names}
        return joined({**header, **entries}, b"")

    return {
        "a header of 2^60 bytes": struct.pack("<Q", 1 << 60) + raw[8:],
        "a deep header": struct.pack("<Q", 600_001) + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + data,
        "deep metadata": told(f'{kept}{comma}"z": {"[" * 100_000}{"]" * 100_000}}}'),
        "a long number": told(f'{kept}{comma}"z": {"1" * 5_000}}}'),
        "six million values": told(f'{kept}{comma}"z": [{"1," * 6_000_000}1]}}'),
        "metadata that are a list": told("[]"),
        "a shape that overflows": every(shape=[1 << 62, 4]),
        "offsets that overlap": every(data_offsets=[0, 8]),
        "whole numbers": every(dtype="I32"),
        "complex numbers": every(dtype="C64"),
        "no elements": rebuilt([0]),
        "no columns": rebuilt([1 << 60, 0]),
        "not a number": joined(header, b"\xff" * len(data)),
        "nothing but zeros": joined(header, bytes(len(data))),
        "another program's": joined({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "no bytes": b"",
    }
