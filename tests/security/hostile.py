"""Texts that attack whoever shows them, facts made of them, and every kind of run folder that comes of such facts."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from families import byte_level_tokenizer, tiny_module

from kt.cli import main

MARK = "document.title='pwned'"
SCRIPT = f"<script>{MARK}</script>"
TEXTS = {
    "script": f"{SCRIPT}{{{{7*7}}}}",
    "close": f"</script></style>{SCRIPT}%{{x}}${{7*7}}",
    "image": f'"><img src=x onerror="{MARK}">%s %(x)s {{0}}',
    "svg": f"<svg onload={MARK}><a href='javascript:{MARK}'>a</a>",
    "remote": "<img src=//evil.invalid/x><link rel=stylesheet href=//evil.invalid/y>",
    "escapes": "\x1b]0;pwned\x07\x1b[31m\x9b2J\x08\u202eevil\u2066\u2028two\rthree",
}
"""By what they try; each short enough for a tiny model to read."""
LONG = SCRIPT + "x" * 10_000
MODEL = "<b>tiny{{7*7}}"
HARMLESS = "{{7*7}}"
"""Of the texts, what must be read on a page as it is."""

WORDS = tuple(
    words.split()
    for words in (
        *("Rome soccer Paris", "Italy France Seattle", "French chemist Rome"),
        *("Warsaw Paris Italy", "soccer Rome French", "physicist Warsaw soccer"),
    )
)
"""First words of answer, foil and target: relations need answers that differ in their first token."""


def records() -> list[dict[str, object]]:
    """A fact for each text, which stands in every field of it."""
    return [
        {
            "id": f"{text} {name}",
            "relation": LONG,
            "prompt": f"So {text} {{}} is",
            "subject": text,
            "answer": f"{old} {text}",
            "foil": f"{foil} {text}",
            "target": f"{new} {text[:9]}",  # a long one's probability is zero before and after
            "answer_aliases": [LONG],
            "target_aliases": [text],
            "paraphrases": [f"{text} so {{}} is"],
            "neighbourhood": [{"prompt": f"{text} near", "answer": text, "kind": text}],
            "portability": [{"prompt": f"{text} far", "answer": text, "kind": text}],
        }
        for (name, text), (old, foil, new) in zip(TEXTS.items(), WORDS, strict=True)
    ]


class Ran(NamedTuple):
    """What a command left on the terminal."""

    arguments: tuple[str, ...]
    code: int
    out: str
    err: str


class Hostile(NamedTuple):
    """The folder that holds the runs, and what the commands said."""

    folder: Path
    ran: tuple[Ran, ...]

    @property
    def pages(self) -> list[Path]:
        return sorted(self.folder.rglob("*.html"))


def run(*arguments: object) -> Ran:
    """`kt` in this process, its output kept."""
    out, err = io.StringIO(), io.StringIO()
    typed = tuple(map(str, arguments))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(typed))
    return Ran(typed, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """In a folder, with a cache of its own, offline, and without settings from outside."""
    wanted = {"KT_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    before, here = dict(os.environ), Path.cwd()
    for name in [name for name in os.environ if name.startswith("KT_")]:
        del os.environ[name]
    os.environ.update(wanted)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)


def make_model(folder: Path) -> Path:
    """A tiny model with room for long prompts, as a folder whose name attacks too."""
    torch.set_num_threads(1)
    tiny_module("qwen2", max_position_embeddings=1024).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def run_everything(
    folder: Path,
    given: list[dict[str, object]] | None = None,
    name: str = "<img src>",
    seed: int = 0,
    only: Sequence[str] = (),
) -> Hostile:
    """Every command that writes a page or a result (or only some), on facts of hostile texts; then a report."""
    with alone(folder):
        model = make_model(Path(MODEL))
        Path("facts.json").write_text(json.dumps(records() if given is None else given))
        Path("corpus.txt").write_text("\n".join(TEXTS.values()) + "Marie Curie was born in Warsaw.\n" * 9)
        on, facts = ("-m", model), ("-f", "facts.json")
        traced = (*on, *facts, "--keep", "all", "--samples", 1)
        placed = (*on, "--layers-mlp", "0", "--layers-attn", "1", "--corpus", "corpus.txt")
        placed += ("--set", "v_num_grad_steps=3")
        solved = (*placed, "--alpha", "0.3")
        edit = "edit/edit.safetensors"
        commands: Mapping[str, tuple[object, ...]] = {
            "heatmap": ("heatmap", *traced, "--limit", 3, "--kind", "mlp", "--heads", "-o", "heatmap"),
            "screen": ("heatmap", *traced, "--limit", 1, "--kind", "mlp", "--method", "atp", "-o", "screen"),
            "alpha": ("alpha", *traced, "--seed", seed, "--per-fact", "-o", "alpha"),
            "edit": ("apply-edit", "--edits", "facts.json", *solved, "--force", "-o", "edit"),
            "steps": (
                *("apply-edit", "--edits", "facts.json", "--limit", 2, *solved, "--force", "--mode", "sequential"),
                *("--evaluate", "step", "--no-generate", "-o", "steps"),
            ),
            "eval": ("eval", *on, *facts, "--edit", edit, "--no-generate", "-o", "eval"),
            "probe": ("probe", *on, *facts, "-o", "probe"),
            "residual": ("probe", *on, *facts, "--edit", edit, "-o", "residual"),
            "case": ("case", *on, *facts, "--edits", f"{name}={edit}", "--tokens", 2, "-o", "case"),
            "sweep": (
                *("sweep", "alpha", *facts, "--limit", 2, *placed, "--grid", "0,1", "--no-trace"),
                *("--no-generate", "-o", "sweep"),
            ),
        }
        wanted = [name for name in commands if not only or name in only]
        ran = [run(*commands[name]) for name in wanted]
        made = [name for name in wanted if Path(name).is_dir()]
        ran += [run(page, *made, "-o", f"{page}.html") for page in ("report", "explore")]
    return Hostile(folder, tuple(ran))
