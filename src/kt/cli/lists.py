"""`kt ls` and `kt env`: what there is, and what is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from .command import BadOption, Options
from .session import screen_for, write_result


@dataclass(frozen=True)
class ListOptions(Options):
    what: Annotated[str, typer.Argument(metavar="models|methods|presets|datasets")] = "models"


def ls(options: ListOptions) -> None:
    """List models, methods, presets or datasets."""
    if options.what not in LISTS:
        raise BadOption(f"kt ls {options.what!r}: unknown; choose among {', '.join(LISTS)}")
    rows = LISTS[options.what]()
    screen_for(options).table(f"kt {options.what}", ["name", "what it is"], [[name, what] for name, what in rows])
    write_result(options, {options.what: [{"name": name, "about": what} for name, what in rows]})


def env(options: Options) -> None:
    """Show the versions, devices and settings that a result can depend on."""
    from ..environment import environment

    found = environment()
    rows = [[key, _one_cell(value)] for key, value in found.items()]
    screen_for(options).table("kt env", ["", ""], rows)
    write_result(options, found)


def _one_cell(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{k} {v if v is not None else '(not installed)'}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def models() -> list[tuple[str, str]]:
    """The embedded model, and what else is read by structure."""
    return [
        ("demo", "the embedded model: small, trained on the embedded facts, always there"),
        ("FOLDER", "a folder that save_pretrained wrote: config, weights and tokenizer"),
        ("OWNER/NAME[@REVISION]", "a causal language model on the Hugging Face Hub, by its structure: Qwen2, Qwen3, "
         "Llama, Mistral, Gemma, GPT-2, GPT-J, GPT-NeoX, Phi, OPT, OLMo and models built like them"),
    ]  # fmt: skip


def methods() -> list[tuple[str, str]]:
    """The editing methods."""
    from ..editing.methods import METHODS

    return [(name, method.summary) for name, method in METHODS.items()]


def presets() -> list[tuple[str, str]]:
    """The hyper-parameter files that are shipped, with their variants."""
    from ..presets import presets as known

    return [
        (name, preset.summary + (f" (--variant {' or '.join(preset.variants)})" if preset.variants else ""))
        for name, preset in known().items()
    ]


def datasets() -> list[tuple[str, str]]:
    """The embedded facts, and the record formats that a file may have."""
    from ..facts import FORMATS

    known = [(name, f"{format.about}; records hold {format.keys}") for name, format in FORMATS.items()]
    return [
        ("demo", "the embedded facts, which the demo model knows"),
        ("FILE, FOLDER", "a .json, .jsonl, .csv or .tsv file, or a folder of them, in one of the formats below"),
        ("hf:OWNER/NAME[:FILE]", "a data set on the Hugging Face Hub (pip install 'kt[data]')"),
        *known,
    ]


LISTS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "models": models,
    "methods": methods,
    "presets": presets,
    "datasets": datasets,
}
