"""`Edit`: the deltas of one or more requests, apart from any model; written, taken back, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from .._util.kinds import Wanted, takes
from .._util.text import count
from ..errors import KtError, NothingToWrite, WorkFailed
from ..model.effects import Effect, without
from ..model.model import A_MODEL
from ..model.update import Dense, Update
from ..report import Card, Column, Figure, Shown, Table
from ..report.table import before_after, cell_text
from ..stats import Interval
from . import apply, edit_io
from .apply import FileState, MatchedWeights
from .request_report import LogProbs, RequestReport, with_log_probs
from .verdict import Verdict

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from ..model.model import TracedModel
    from .config import Config


OF_THE_WHOLE = (
    *("fingerprints_after", "norm_ratios", "value_change", "neighbours", "perplexity"),
    *("rounding", "lost_to_rounding"),
)
"""Fields of a manifest that hold for all updates together and not for a part of them."""

CHOSEN = {"lambda": "λ", "x": "x", "lr": "lr", "norm_constraint": "ε"}
"""Numbers by weight that followed from the model or the requests, and the heads of their columns."""


@dataclass
class Edit(Shown):
    """Updates by weight name (low-rank factors where a closed form gave them), and where they came from.

    Attributes:
        updates: ΔW by weight name; `delta(name)` gives it as one (d_out, d_in) matrix.
        manifest: method, every setting with its source, requests, model, versions, and the weights' fingerprints.
        report: for each request the probability and rank of both answers, before and after.
        targets: the values that were wanted, by aim (`hidden.4`), (fact, d_model).
        keys: the keys that were solved for, by weight name, (fact, d_in).
        effect: what the edit adds to a model in the place of updates: text before prompts, or values at one site.

    Examples:
        >>> before = model.fingerprint()
        >>> with edit.applied(model):
        ...     changed = model.fingerprint() != before
        >>> changed, model.fingerprint() == before
        (True, True)
    """

    updates: dict[str, Update]
    manifest: dict[str, Any]
    report: tuple[RequestReport, ...] = ()
    targets: dict[str, Float[Tensor, "fact d_model"]] = field(default_factory=dict)
    keys: dict[str, Float[Tensor, "fact d_in"]] = field(default_factory=dict)
    effect: Effect | None = None
    _taken: WeakKeyDictionary[Any, MatchedWeights] = field(default_factory=WeakKeyDictionary, repr=False, compare=False)

    kind = edit_io.EDIT

    @property
    def metadata(self) -> dict[str, Any]:
        """The manifest."""
        return self.manifest

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the weights that it writes, in order."""
        return tuple(self.updates)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The requests that it was solved for, as records."""
        return self.manifest.get("requests", [])

    @property
    def alpha(self) -> float | None:
        """Attention's share of a joint edit; None where the method has none."""
        return self.manifest.get("alpha")

    @property
    def verdict(self) -> Verdict | None:
        """What came of it, and what it failed in; None where it was not read back (a part, or made by hand)."""
        return Verdict.of(self.manifest, self.report)

    @property
    def digest(self) -> str:
        """SHA-256 of what its file holds (manifest, names, dtypes, shapes and bytes): the edit's identity."""
        return edit_io.digest(self._parts)

    @property
    def _parts(self) -> edit_io.EditParts:
        return edit_io.EditParts(self.updates, self.manifest, self.report, self.targets, self.keys, self.effect)

    @takes()
    def delta(self, name: str) -> Float[Tensor, "d_out d_in"]:
        """The dense update of the weight `name`, (d_out, d_in) float32 whatever the module's own layout."""
        if name not in self.updates:
            raise KtError(f"the edit does not touch {name!r}; it touches {', '.join(self.updates)}")
        return self.updates[name].to(torch.float64).dense().float()

    def control(self) -> Edit | None:
        """The control of a joint edit: its MLP part alone, scaled by 1 - α as in the edit.

        None for an edit that is not of both modules.
        """
        attention = set(self.manifest.get("attention_weights", []))
        rest = {name: update for name, update in self.updates.items() if name not in attention}
        if not self.alpha or not attention or not rest:
            return None
        known = self.manifest.get("fingerprints", {})
        manifest = {name: value for name, value in self.manifest.items() if name not in OF_THE_WHOLE}
        manifest |= {"control": "MLP alone, x (1 - α)", "fingerprints": {n: known[n] for n in rest if n in known}}
        return Edit(rest, manifest)

    @takes()
    def deltas(self, model: TracedModel | None = None) -> dict[str, dict[str, Any]]:
        """Per weight: shape, rank, norm, the norm relative to the weight's own, the numbers that were chosen
        (`CHOSEN`), and (weights of 16 bits) what of the update rounding left: see `rounding`.

        Args:
            model: adds the state of its weights and what rounding leaves.
        """
        relative = self.manifest.get("weight_norms", {})
        rounded = self.manifest.get("rounding", {})
        chosen = self.manifest.get("chosen", {})
        rows = {}
        for name, update in self.updates.items():
            norm = update.norm()
            base = relative.get(name)
            rows[name] = {
                "shape": list(update.shape),
                "rank": update.rank,
                "norm": norm,
                "relative_norm": norm / base if base else None,
                "norm_ratio": self.manifest.get("norm_ratios", {}).get(name),
                "condition": self.manifest.get("conditions", {}).get(name),
                **{each: chosen.get(name, {}).get(each) for each in CHOSEN},
                "survived": rounded.get(name, {}).get("survived"),
                "rounding_error": rounded.get(name, {}).get("error"),
            }
        return rows

    def check(self) -> None:
        """Raise WorkFailed when the edit is not finite, and NothingToWrite when it changes nothing."""
        for name, update in self.updates.items():
            if not update.finite:
                raise WorkFailed(f"the update of {name} is not finite; nothing was written")
        if self.effect is None and not any(update.norm() > 0 for update in self.updates.values()):
            raise NothingToWrite("the edit changes nothing: every update is zero; check alpha, layers and targets")

    # Writing ----------------------------------------------------------------------------------------------------
    @takes(model=A_MODEL)
    def state_of(self, model: TracedModel) -> dict[str, FileState]:
        """Every weight's state in a model: `base` (as it was solved for), `applied` or `other`, by fingerprints."""
        apply.refuse_other_shapes(self, model)
        return apply.states(self, model)

    @takes(model=A_MODEL)
    @contextmanager
    def applied(self, model: TracedModel, force: bool = False) -> Iterator[TracedModel]:
        """The edit written into the model inside the block; the exact bytes back on exit, also after an exception.

        Raises:
            KtError: the weights are not those that it was solved for (`force` warns instead), hold it already, or are
                being written by another thread.
            WorkFailed: a weight would not be finite, or none would change.
        """
        with model.writing():
            self._admit(model, force)
            with model.restored(self.names):
                apply.write_checked(self, model)
                yield model

    @takes(model=A_MODEL)
    def apply_(self, model: TracedModel, force: bool = False) -> None:
        """Write the edit for good, until `revert_`; the model is unchanged when this raises, what `applied` raises.

        Args:
            model: the model that it was solved for.
            force: write also into other weights than those.
        """
        with model.writing():
            self._admit(model, force)
            model.require_free(self.names, "apply the edit before or after that block, or as a block inside it")
            with model.undone_on_failure(self.names) as (before, _):
                apply.write_checked(self, model)
                self._taken[model.module] = MatchedWeights(before, apply.fingerprints(model, self.names))
            model.keep_effects(self._effects)

    @takes(model=A_MODEL)
    def revert_(self, model: TracedModel, force: bool = False) -> None:
        """Bring back the bytes that `model` had before `apply_`.

        Raises:
            KtError: it was not applied here, or the weights were changed since (`force` puts the bytes back anyway).
        """
        kept = self.taken(model)
        if kept is None:
            raise KtError("this edit was not applied to this model with apply_; there is nothing to revert")
        with model.writing():
            model.require_free(self.names, "revert the edit after that block")
            if not force:
                apply.refuse_changed(kept, model, "revert_(model, force=True)")
            model.put_back(kept.before, without(model.effects, self._effects))
            model.keep_effects((), self._effects)
            del self._taken[model.module]

    @property
    def _effects(self) -> tuple[Effect, ...]:
        return () if self.effect is None else (self.effect,)

    def taken(self, model: TracedModel) -> MatchedWeights | None:
        """The weights that `apply_` kept of this model, while the edit is in it."""
        return self._taken.get(model.module)

    def write(self, model: TracedModel) -> None:
        """Add the updates to the weights, or the effect to the model, unchecked: `applied` and `apply_` are for use,
        this is for a session."""
        for name in self.names:
            model.write(name, self.delta(name))
        if self.effect is not None:
            model.effects = (*model.effects, self.effect)

    def require_updates(self, what: str, kinds: Sequence[str] = ("context", "adapter")) -> None:
        """Refuse, before any work, what an edit of one of these kinds cannot be used for.

        Raises:
            KtError: with the reason.
        """
        if self.effect is not None and self.effect.kind in kinds:
            why = {
                "context": "it is text that is put before prompts, and changes neither weights nor states",
                "adapter": "it sets values while the model runs, and changes no weight",
            }
            method, kind = self.manifest.get("method", "this edit"), self.effect.kind
            raise KtError(f"{what} cannot hold {method}, of kind {kind}: {why[kind]}; apply the edit file with kt")

    @takes(model=A_MODEL)
    def for_model(self, model: TracedModel, force: bool = False) -> Edit:
        """Itself where it fits the model; by force, with a warning, what it holds as an edit of this model.

        Raises:
            KtError: it does not fit (see `applied`), and there is no force.
            WorkFailed: it changes nothing (see `check`).
        """
        self.check()
        mismatch = apply.admit(self, model, force)
        if mismatch is None:
            return self
        manifest = {name: value for name, value in self.manifest.items() if name not in OF_THE_WHOLE}
        manifest |= {"fingerprints": apply.fingerprints(model, self.names), "identity": apply.about(model)}
        manifest["forced"] = mismatch.what
        effect = None if self.effect is None else self.effect.as_made_on(model)
        return Edit(self.updates, manifest, self.report, self.targets, self.keys, effect)

    def _admit(self, model: TracedModel, force: bool) -> None:
        if self.taken(model) is not None:
            raise KtError(f"the edit is already applied to {model.name}; revert_ it first")
        apply.admit(self, model, force)

    # Keeping ----------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Write the edit to `path` as safetensors with the manifest inside: the same edit is the same bytes, and
        loading it runs no code.

        Raises:
            WorkFailed: a number is not finite; nothing was written.
        """
        return edit_io.save(self._parts, path)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read the edit file at `path`.

        Raises:
            BadFile: not there, cut short, changed since it was written, of a newer kt, or not an edit.
        """
        return cls(*edit_io.load(path))

    # Looking ----------------------------------------------------------------------------------------------------
    def to_dataframe(self) -> pd.DataFrame:
        """One row a request: probabilities and ranks of target and old answer, before and after."""
        import pandas as pd

        rows = []
        for r in self.report:
            row: dict[str, Any] = {
                "id": r.id,
                "prompt": r.prompt,
                "subject": r.subject,
                "target": r.target,
                "answer": r.answer,
            }
            for what in ("target_prob", "target_rank", "answer_prob", "answer_rank"):
                before, after = getattr(r, what) or (None, None)
                row |= {f"{what}_before": before, f"{what}_after": after}
            rows.append(row)
        return pd.DataFrame(rows)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: the update of each weight, the probabilities of each request."""
        known: list[str] = [name for name in ("method", "alpha", "model") if name in self.manifest]
        effect = {} if self.effect is None else {"effect": {"kind": self.effect.kind, "place": self.effect.place}}
        known += [name for name in ("alphas", "value_change", "lost_to_rounding") if self.manifest.get(name)]
        requests = [_request(request, log_probs) for request, log_probs in with_log_probs(self.manifest, self.report)]
        found = {"deltas": self.deltas(), "requests": requests, "verdict": self.verdict and self.verdict.as_dict()}
        return {name: self.manifest[name] for name in known} | effect | found

    @property
    def heading(self) -> str:
        """The title of its section."""
        return f"Edit: {self.manifest.get('method')}"

    def headline(self) -> Sequence[Card]:
        """The number of facts; the verdict."""
        facts, verdict = Card("facts edited", len(self.report)), self.verdict
        if verdict is None:
            return [facts]
        changed, _, rest = verdict.text.partition("; ")
        failed = f"; {count(len(verdict.warnings), 'warning')}" if verdict.warnings else ""
        return [facts, Card("verdict", changed, rest + failed)]

    def tables(self) -> Sequence[Table]:
        """A row a request, a row a weight, a row an aim; the verdict."""
        changes = self.manifest.get("value_change") or {}
        parts = ("came_through", "left")
        rows = [[aim, *(Interval.of(change[part]) for part in parts)] for aim, change in changes.items()]
        columns = ["aim", "of the wanted change came through", "still missing, relative"]
        note = "mean [95%] over requests, with the edit as scaled"
        aims = [Table(columns, rows, "intended value change", note)] if rows else []
        written = self._weights_table() if self.effect is None else self.effect.table()
        return [requests_table([self]), written, *aims, *verdict_tables(self.verdict)]

    def _weights_table(self) -> Table:
        rounded = self.manifest.get("rounding") is not None
        names = ["shape", "rank", "norm", "relative_norm", "norm_ratio", "condition"]
        known = self.manifest.get("chosen", {}).values()
        chosen = [each for each in CHOSEN if any(each in numbers for numbers in known)]
        names += chosen
        names += ["survived", "rounding_error"] if rounded else []
        rows = [[name, *(delta[each] for each in names)] for name, delta in self.deltas().items()]
        shape = Column("shape", lambda sides: "x".join(map(str, sides)))
        condition = Column("condition", lambda value: "–" if value is None else f"{value:.0e}")
        columns: list[str | Column] = ["weight", shape, "rank", "norm", "relative", "new / old norm", condition]
        columns += [CHOSEN[each] for each in chosen]
        columns += ["survived", "error"] if rounded else []
        notes = [_rounding_note(self) if rounded else "", self.dequantised or ""]
        return Table(columns, rows, "written weights", "; ".join(filter(None, notes)))

    @property
    def dequantised(self) -> str | None:
        """In words, of weights that the checkpoint stores quantised: the edit is of the dequantised ones. Those that
        stay packed where the model runs are plain only while it is in."""
        words = []
        for key, how, rest in (
            ("dequantised", "stored as", "the edit and its bytes from before are of that"),
            ("packed", "packed as", "the edit is of that, and its bytes from before are the packed ones"),
        ):
            if stored := self.manifest.get(key) or {}:
                kinds = ", ".join(sorted(set(stored.values())))
                what = f"{count(len(stored), 'weight')} of the {len(self.names)} dequantised ({how} {kinds})"
                words.append(f"{what} to {self.manifest.get('dtype')}: {rest}")
        return "; ".join(words) or None

    def figures(self) -> Sequence[Figure]:
        """Target and old answer, before and after; the size of each weight's update."""
        answers = Figure(self.figure(), "Means over requests with 95% intervals.", name="edit")
        if self.effect is not None:
            return [answers]
        return [
            answers,
            Figure(self.sizes_figure(), "How large each update is beside the weight it is added to.", name="sizes"),
        ]

    def sizes_figure(self) -> go.Figure:
        """‖ΔW‖/‖W‖ of every weight that the edit writes."""
        from ..figures.summary import weight_sizes

        relative = [delta["relative_norm"] for delta in self.deltas().values()]
        return weight_sizes(self.names, relative, title=f"{self.manifest.get('method', 'edit')}: size of the updates")

    def figure(self) -> go.Figure:
        """Mean probability of the new and the old answer, before and after, and of the new one under the control."""
        from ..figures import Change, before_after
        from ..stats import bootstrap_mean

        old = [r.answer_prob for r in self.report if r.answer_prob is not None]
        new = [r.target_prob for r in self.report]
        alone = [(r.target_prob[0], r.control_prob) for r in self.report if r.control_prob is not None]
        rows = {"new answer": new, "new answer, MLP part alone": alone, "old answer": old}
        changes = [Change(n, *(bootstrap_mean(list(v)) for v in zip(*p, strict=True))) for n, p in rows.items() if p]
        title = f"{self.manifest.get('method', 'edit')}: {count(len(self.report), 'request')}"
        return before_after(changes, title=title, subtitle="joint probability, teacher-forced", x_title="probability")

    @property
    def config_class(self) -> type[Config] | None:
        """The configuration of its method; None for one that this kt does not have."""
        from .methods import METHODS

        return METHODS.get(str(self.manifest.get("method")))

    @property
    def shared_alpha(self) -> float | None:
        """α where there is a share of attention: None for a method that leaves attention alone."""
        config = self.config_class
        return self.alpha if config is None or config.writes_attention else None

    def __repr__(self) -> str:
        method, alpha = self.manifest.get("method", "?"), self.alpha
        if self.effect is not None:
            return f"Edit({method}, {count(len(self.requests), 'request')}, {self.effect.kind} at {self.effect.place})"
        weights = ", ".join(f"{n} ({_form(u)})" for n, u in self.updates.items())
        return f"Edit({method}, {count(len(self.requests), 'request')}, alpha={alpha}, {weights})"


def requests_table(edits: Sequence[Edit]) -> Table:
    """Target and old answer before and after, of all edits; beside them the control of a joint edit."""
    reports = [pair for edit in edits for pair in with_log_probs(edit.manifest, edit.report)]
    joint = any(request.control_prob is not None for request, _ in reports)
    prob, rank = Column("prob", before_after), Column("rank", before_after)
    columns: list[str | Column] = ["prompt", "target", prob, *(["MLP alone"] if joint else []), rank]
    columns += ["old answer", prob, rank]
    rows = []
    for r, log_probs in reports:
        target_prob, answer_prob = r.as_told(log_probs)
        alone = [r.control_prob] if joint else []
        rows.append([r.prompt, r.target, target_prob, *alone, r.target_rank, r.answer, answer_prob, r.answer_rank])
    last = edits[-1]
    alpha = "" if last.shared_alpha is None else f", alpha {cell_text(last.shared_alpha)}"
    return Table(columns, rows, f"{last.manifest.get('method')}{alpha}")


def verdict_tables(verdict: Verdict | None) -> list[Table]:
    """The verdict in words, and on pages its warnings (a command says them on stderr); no table where there is none."""
    if verdict is None:
        return []
    lines = [[line] for line in verdict.warnings]
    return [Table(["verdict"], [[verdict.text]]), *([Table(["warnings"], lines, only="page")] if lines else [])]


def _request(report: RequestReport, log_probs: LogProbs) -> dict[str, Any]:
    """For `--json`: texts, and {before, after} of what was measured (None where it was not)."""
    values: dict[str, Any] = {name: getattr(report, name) for name in ("id", "prompt", "subject", "target", "answer")}
    for name in ("target_prob", "target_rank", "answer_prob", "answer_rank"):
        pair = getattr(report, name)
        values[name] = None if pair is None else {"before": pair[0], "after": pair[1]}
    for name, pair in log_probs.items():  # of a long answer, for whose probability a float has no room
        values[f"{name}_log_prob"] = {"before": pair[0], "after": pair[1]}
    return values | {"control_prob": report.control_prob}


def _rounding_note(edit: Edit) -> str:
    """The note on the two columns of a rounded edit, with the requests that rounding cost."""
    what = "survived, error: of each update after rounding to 16 bits, relative to it"
    lost = edit.manifest.get("lost_to_rounding")
    if lost is None:
        return f"{what}; requests lost to rounding: not measured where other weights than W_o and down_proj change"
    named = [f"{r.subject} ({r.id})" for r in edit.report if r.id in lost]
    return f"{what}; requests lost to rounding: {len(lost)} of {len(edit.report)}" + "".join(f", {n}" for n in named)


def _form(update: Update) -> str:
    return "dense" if isinstance(update, Dense) else f"rank {update.rank}"


AN_EDIT: Wanted = ((Edit,), "an edit, as kt.edit or Edit.load returns it")
"""An edit of a public function."""
