"""The explorer with a model behind it: a prompt is traced and read, an edit solved, applied and taken back at once.

The front end sends messages, `Live.act` does what they say, and the front end shows `Live.state`.

    {"do": "trace", "prompt": "The capital of {} is", "subject": "France", "answer": "Paris", "target": "Rome"}
    {"do": "edit", ..., "method": "memit"}      solved for the model without edits, and applied
    {"do": "apply", "edit": 0}, {"do": "revert", "edit": 0}, {"do": "revert"}      one of the edits, or all
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from .._util.kinds import require_options
from .._util.text import count, visible
from ..editing import Edit, EditSession
from ..editing.method_names import MethodName
from ..editing.methods import METHODS, plain_name
from ..editing.session import edit as solve_edit
from ..editing.session_options import SessionOptions
from ..editing.stack import EditStack
from ..errors import BadFact, KtError, warn_user
from ..facts.fact import Fact
from ..facts.load import fact_by_hand
from ..model.effects import puts_text
from ..model.model import TracedModel
from ..model.tokens import token_ids
from ..probing import Probe, contrast_probe
from ..probing.lens import KINDS as LENS_KINDS
from ..probing.lens import TOP, read_lens
from ..runs.report import Run
from ..tracing import Trace, causal_trace
from .missing import commands
from .page import data_of, named_results, packed
from .seen import Seen

KINDS = ("mlp", "attn", "hidden")
SET_HERE = {"model", "config", "method", "progress", "options", "journal"}
"""Arguments of `EditSession` that are no options of `Live`."""
TEXT = 12
"""Tokens that the model goes on with."""
MOST = 20
"""Facts that are read again when an edit is applied or taken back: those that were asked last."""


class Live:
    """See the module.

    Args:
        model: unedited; `revert` gives it back so, to the byte.
        runs: run folders whose facts and results are shown too, and whose edits can be applied.
        changed: called with the names of `state` that changed, as soon as they do.
        options: of `kt.edit` for every edit (`alpha`, `preset`, hyper-parameters); `samples` of `kt.causal_trace`.
    """

    def __init__(
        self,
        model: TracedModel,
        runs: str | Path | Sequence[str | Path] = (),
        changed: Callable[[str], None] = lambda name: None,
        *,
        samples: int | None = None,
        **options: Any,
    ) -> None:
        sessions = [*signature(EditSession).parameters, *(field.name for field in fields(SessionOptions))]
        settings = [name for method in METHODS.values() for name in method.settings()]
        known = dict.fromkeys([*sessions, "preset", "variant", *settings])
        named = [plain_name(name) for name in options]  # `layers` too is a name that `kt.edit` takes
        require_options(named, ["samples", *(name for name in known if name not in SET_HERE)], "the widget")
        self.model, self.changed, self.options = model, changed, options
        self.trace_options: dict[str, Any] = {} if samples is None else {"samples": samples}
        folders = [Run.of(folder) for folder in ([runs] if isinstance(runs, str | Path) else runs)]
        self.commands = commands(folders, model.name)
        self.kept = named_results(folders)
        self.edits: list[Edit] = [result for _, result in self.kept if isinstance(result, Edit)]
        self.on: list[int] = []
        self._stack: EditStack | None = None
        self._facts: dict[str, Fact] = {}
        self._traces: dict[tuple[str, str], Trace] = {}
        self._probes: dict[tuple[str, str], Probe] = {}
        self._seen: dict[tuple[str, str], Seen] = {}
        self.state: dict[str, Any] = {"data": "", "edits": [], "status": {}, "methods": list(METHODS)}
        self._show(f"{model.name}: type a prompt, or choose a fact")

    @property
    def name(self) -> str:
        """`after` where an edit is applied, else `before`."""
        return "after" if self.on else "before"

    def act(self, message: Mapping[str, Any]) -> None:
        """Do what a message says; what the user can put right stands in `state["status"]`, with `error` set.

        Raises:
            Exception: any other, after the status has said so.
        """
        what = {"trace": self._trace, "edit": self._edit, "apply": self._switch, "revert": self._switch}
        try:
            with self._warned() as lines:
                done = what.get(str(message.get("do")), self._unknown)(message)
            self._show("; ".join([done, *lines]), fact=message.get("prompt") and self._fact(message).prompt)
        except KtError as error:
            self._say(str(error), error=True)
        except BaseException as error:
            self._say(f"{type(error).__name__}: {error}", error=True)
            raise

    def revert(self) -> None:
        """Take every edit out of the model: it has its exact bytes from before."""
        self._stand([])

    # What is asked ----------------------------------------------------------------------------------------------
    def _trace(self, message: Mapping[str, Any]) -> str:
        fact = self._fact(message)
        self._read_trace(fact)
        self._read(self._facts[fact.prompt])
        return f"traced {self.name} the edit" if self.edits else "traced"

    def _edit(self, message: Mapping[str, Any]) -> str:
        fact, method = self._fact(message), str(message.get("method") or "intattn")
        if not fact.target:
            raise BadFact("an edit needs the new answer; type it in its field")
        on = self.on
        self._stand([])
        try:
            with self._stage(f"solving {method}"):
                edit = solve_edit(self.model, [fact], MethodName(method), progress=self._tick, **self.options)
            self._read(fact)
            self.edits.append(edit)
            on = [*on, len(self.edits) - 1]
        finally:
            self._stand(on)
        self._read(fact)
        return edit.verdict.text if edit.verdict is not None else f"{method} applied"

    def _switch(self, message: Mapping[str, Any]) -> str:
        place, apply = message.get("edit"), message["do"] == "apply"
        if place is None and not apply:
            self._stand([])
            return "every edit is taken out"
        if not isinstance(place, int) or not 0 <= place < len(self.edits):
            raise BadFact(f"there is no edit {place!r}; the list has {count(len(self.edits), 'edit')}, the first is 0")
        others = [each for each in self.on if each != place]
        self._stand(sorted([*others, place]) if apply else others)
        for fact in list(self._facts.values())[-MOST:] if self.on else ():
            self._read(fact)
        return f"{count(len(self.on), 'edit')} applied"

    def _unknown(self, message: Mapping[str, Any]) -> str:
        raise BadFact(f"the message {dict(message)!r} asks for nothing known; do is trace, edit, apply or revert")

    # The model --------------------------------------------------------------------------------------------------
    def _fact(self, message: Mapping[str, Any]) -> Fact:
        """The fact that was typed; what an earlier trace found out of it stays."""
        prompt, subject = (str(message.get(name) or "") for name in ("prompt", "subject"))
        if not prompt.strip() or not subject.strip():
            raise BadFact("type a prompt and its subject, the part of the prompt that the fact is about")
        given = {name: str(message.get(name) or "").strip() or None for name in ("answer", "target")}
        fact = fact_by_hand(prompt, subject, **given)
        known = self._facts.get(fact.prompt)
        if known is None or fact.answer not in (None, known.answer):
            return fact
        return replace(fact, answer=known.answer, foil=known.foil, target=fact.target or known.target)

    def _stand(self, on: Sequence[int]) -> None:
        """Have these edits in the model and no other. Readings under other edits are of no use any more."""
        if list(on) == self.on:
            return
        if self._stack is not None:
            self._stack.revert_(self.model)
        self._stack, self.on = None, []
        if on:
            stack = EditStack([self.edits[place] for place in on])
            stack.apply_(self.model)
            self._stack, self.on = stack, list(on)
            for readings in (self._traces, self._probes, self._seen):
                for key in [key for key in readings if key[0] == "after"]:
                    del readings[key]

    def _read_trace(self, fact: Fact) -> None:
        with self._stage("tracing"):
            options = self.trace_options
            trace = causal_trace(self.model, [fact], KINDS, keep="all", progress=self._tick, **options)
        [traced] = trace.facts
        self._traces[self.name, fact.prompt] = trace
        self._facts.pop(fact.prompt, None)
        self._facts[fact.prompt] = replace(fact, answer=traced.answer, foil=traced.foil)

    def _read(self, fact: Fact) -> None:
        """Both answers through the layers, the top tokens at every token, and the text, as the model stands.

        Under an edit that puts text before prompts it is the text alone, for the layers are read of bare prompts.
        """
        self._facts.setdefault(fact.prompt, fact)
        if puts_text(self.model):
            with self._stage("reading the text"):
                [text] = self.model.generate([fact.prompt], TEXT)
            nothing = np.empty((0, len(LENS_KINDS), self.model.n_layers, TOP), dtype=np.int64)
            self._seen[self.name, fact.prompt] = Seen(self.name, fact.prompt, text, nothing, nothing.astype(float), {})
            warn_user(
                "the layers and the traces shown are of the model without text before its prompts, as they read bare "
                "prompts; of an edit of kind context the page shows how the text goes on"
            )
            return
        with self._stage("reading the layers"):
            self._probes[self.name, fact.prompt] = contrast_probe(self.model, [fact], progress=self._tick)
            ids = token_ids(self.model.reader, fact.prompt)
            tokens = range(len(ids))
            nothing = np.empty((len(tokens), 0), dtype=np.int64)
            read = read_lens(self.model, [ids] * len(tokens), tokens, nothing, top=TOP)
            [text] = self.model.generate([fact.prompt], TEXT)
        assert read.top is not None and read.top_prob is not None
        kept = read.top[:, 0], read.top_prob[:, 0], read.texts(self.model.tokenizer)
        self._seen[self.name, fact.prompt] = Seen(self.name, fact.prompt, text, *kept)

    # What is shown ----------------------------------------------------------------------------------------------
    def _show(self, said: str, fact: str | None = None) -> None:
        own = [*_merged(self._probes), *_merged(self._traces)]
        new = [("", edit) for edit in self.edits if not any(edit is result for _, result in self.kept)]
        data = data_of([*own, *new, *self.kept], list(self._seen.values()))
        data |= {"missing": [], "commands": self.commands, "chosen": None}
        if fact is not None:
            data["chosen"] = next((i for i, row in enumerate(data["facts"]) if row["prompt"] == visible(fact)), None)
        self._set("data", packed(data))
        rows = [self._about(edit) | {"on": place in self.on} for place, edit in enumerate(self.edits)]
        self._set("edits", rows)
        self._say(said)

    @staticmethod
    def _about(edit: Edit) -> dict[str, Any]:
        first = next(iter(edit.report), None)
        named = "" if first is None else f"{first.prompt} → {first.target}"
        more = len(edit.report) - 1
        return {"name": visible(f"{edit.manifest.get('method')}: {named}" + (f" and {more} more" if more > 0 else ""))}

    def _say(self, text: str, error: bool = False, done: int = 0, total: int = 0, busy: bool = False) -> None:
        status = {"text": visible(text), "error": error, "busy": busy, "done": done, "total": total}
        self._set("status", status)

    def _set(self, name: str, value: Any) -> None:
        self.state[name] = value
        self.changed(name)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._doing = name
        self._say(name, busy=True)
        yield

    def _tick(self, done: int, total: int) -> None:
        self._say(self._doing, done=done, total=total, busy=True)

    @contextmanager
    def _warned(self) -> Iterator[list[str]]:
        """Warnings as lines, each once: in a widget nobody sees the kernel's own."""
        lines: list[str] = []
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", UserWarning)
            yield lines
        lines += dict.fromkeys(str(each.message) for each in found if issubclass(each.category, UserWarning))


def _merged(results: Mapping[tuple[str, str], Any]) -> list[tuple[str, Any]]:
    """The results of each state of the model as one, as far as there are some."""
    found = [(state, [each for (of, _), each in results.items() if of == state]) for state in ("before", "after")]
    return [(state, parts[0].merge(parts[1:])) for state, parts in found if parts]
