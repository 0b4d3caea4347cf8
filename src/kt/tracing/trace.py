"""`Trace`: the measurements of causal tracing, by fact, kind, layer, token and noise draw."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from .._util.data import complete_file, load_arrays, save_arrays
from .._util.kinds import takes
from .._util.text import count, some_of
from ..errors import BadFact, BadFile
from ..report import Card, Figure, Shown, Table
from ..stats import bootstrap_mean, bootstrap_mean_grid
from .means import Curve, RoleGrid, effects_at, grid, over, peak, role_effects, tested
from .patches import MODULES, Patch
from .prompts import ROLES, TITLES, LeftOut, numbered_on, why
from .titles import METRIC_NAMES, metric_title, subtitle_of, title_of
from .traced_fact import EVERY, METRICS, WHOLE, TracedFact, fact_from, fact_header, finite, metric_name, metric_names

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


DIRECTIONS = ("denoise", "noise")
TOKENS = ("all", "subject_last")
"""Which tokens are patched: every one, or the subject's last alone."""
FILE_KIND = "trace"
OLDER = {"direction": "denoise", "method": "exact"}
"""Metadata of files written before these options existed."""
_SAME = ("model", "revision", "n_layers", "window", "corrupt", "direction", "method", "tokens", "at", "keep", "min_gap")
"""Metadata that must agree before the facts of two traces are averaged together."""
_UNSAID = {"tokens": "all", "at": 0}


MANY_BEFORE, SHOWN_BEFORE = 12, 4
"""From how many tokens before the subject on a map leaves them out, as behind a chat template's system prompt, and how
many it keeps."""
NAMES, NAMED = ("id", "subject", "answer"), 5
"""What `Trace.fact` compares a name with first, and how many facts its messages show."""


@dataclass(frozen=True, eq=False)
class Trace(Shown):
    """The result of `causal_trace`: traced facts, the facts left out and why, and the run's settings.

    Attributes:
        facts: a `TracedFact` each, with arrays (layer, token, sample) by kind.
        kinds: what was restored: `mlp`, `attn`, `hidden`, single heads.
        left_out: the facts that were not traced, each with the reason.
        metadata: model, settings and versions of the run.
    """

    kind = "trace"
    heading = "Causal tracing"

    facts: tuple[TracedFact, ...]
    kinds: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    metadata: Mapping[str, Any]

    @property
    def n_facts(self) -> int:
        """Number of traced facts."""
        return len(self.facts)

    @property
    def n_layers(self) -> int:
        """Number of the model's blocks."""
        return int(self.metadata["n_layers"])

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that tables and figures show."""
        return tuple(self.metadata["metrics"])

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the tokens that were patched."""
        tokens = self.metadata.get("tokens", "all")
        return ROLES if tokens == "all" else (tokens,)

    @property
    def other_mixers(self) -> dict[str, tuple[int, ...]]:
        """The layers whose mixer is no attention, by what it is: `linear attention`, `state space`, ..., `no mixer`."""
        found: dict[str, tuple[int, ...]] = {}
        for layer, mixer in enumerate(self.metadata.get("mixers", ())):
            if mixer != "attention":
                found[mixer or "no mixer"] = (*found.get(mixer or "no mixer", ()), layer)
        return found

    # One fact out of many ----------------------------------------------------------------------------------------
    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, place: int | slice) -> Trace:
        """The trace of one traced fact, or of several, by their places among `facts`.

        Examples:
            >>> trace = kt.causal_trace(kt.load("demo"), kt.load_facts("demo", limit=2), samples=2)
            >>> len(trace), len(trace[0])
            (2, 1)
        """
        chosen = self.facts[place] if isinstance(place, slice) else (self.facts[place],)
        return replace(self, facts=chosen, left_out=())

    def fact(self, name: str) -> Trace:
        """The trace of the one fact that has this id, or this subject, or this answer; else of the one whose prompt
        holds this text.

        Args:
            name: such as `"Paris"`; capital and small letters are the same.

        Raises:
            BadFact: no traced fact is of this name, or several are.

        Examples:
            >>> trace = kt.causal_trace(kt.load("demo"), kt.load_facts("demo", limit=2), samples=2)
            >>> trace.fact("Afghanistan").facts[0].answer
            'Kabul'
        """
        wanted = str(name).strip().casefold()
        texts = {of: [str(getattr(f, of)).strip().casefold() for f in self.facts] for of in (*NAMES, "prompt")}
        places = [[i for i, text in enumerate(texts[of]) if text == wanted] for of in NAMES]
        places.append([i for i, text in enumerate(texts["prompt"]) if wanted in text])
        found = next(filter(None, places), [])
        if wanted and len(found) == 1:
            return self[found[0]]
        prompts = [repr(self.facts[place].prompt) for place in (found or range(len(self)))]
        shown = some_of(prompts, NAMED)
        if found:
            raise BadFact(f"{len(found)} traced facts are of the name {name!r}: {shown}; give an id, or trace[i]")
        raise BadFact(f"no traced fact is of the name {name!r}; this trace holds {shown}")

    @takes()
    def patched_tokens(self, fact: TracedFact) -> list[int]:
        """The tokens of a fact that were patched."""
        every = self.roles == ROLES
        return [token for token, role in enumerate(fact.roles) if every or role in self.roles]

    @takes()
    def shown_tokens(self, fact: TracedFact) -> list[int]:
        """Those that a map shows: of many before the subject, where no patch changes anything, the last few.

        Args:
            fact: one of the trace's.
        """
        patched, start = self.patched_tokens(fact), fact.span.start
        return [token for token in patched if token >= start - SHOWN_BEFORE] if start > MANY_BEFORE else patched

    def why_left_out(self) -> str:
        """Reasons with counts, for messages and manifests."""
        return why(self.left_out)

    def __repr__(self) -> str:
        kinds = ", ".join(self.kinds)
        return f"Trace({self.metadata['model']}: {kinds} of {count(self.n_facts, 'fact')}; {self.why_left_out()})"

    # Tables and means -------------------------------------------------------------------------------------------
    def to_dataframe(self) -> pd.DataFrame:
        """One row per fact, kind, layer, token and metric.

        `fact` is the fact's place in the caller's list; `clean` and `corrupted` are p(answer) for the metric `prob` and
        the logit difference for `logit_diff` (see `TracedFact` for all), the corrupted one averaged over the draws.
        """
        import pandas as pd

        parts = []
        for fact in self.facts:
            patched = self.patched_tokens(fact)
            layers, tokens = np.meshgrid(np.arange(self.n_layers), patched, indexing="ij")
            for kind in self.kinds:
                for metric in self.metrics:
                    parts.append(
                        {
                            "fact": np.full(layers.size, fact.index),
                            "kind": np.full(layers.size, kind, dtype=object),
                            "layer": layers.ravel(),
                            "token": tokens.ravel(),
                            "role": np.array(fact.roles, dtype=object)[tokens.ravel()],
                            "metric": np.full(layers.size, metric, dtype=object),
                            "value": finite(fact, fact.effect(kind, metric))[:, patched].ravel(),
                            "clean": np.full(layers.size, fact.clean[metric]),
                            "corrupted": np.full(layers.size, fact.corrupted[metric].mean(dtype=np.float64)),
                        }
                    )
        return pd.DataFrame({name: np.concatenate([p[name] for p in parts]) for name in parts[0]})

    @takes()
    def by_role(self, kind: str, metric: str = "logit_diff", n_boot: int = 2000, seed: int = 0) -> RoleGrid:
        """Means over facts of each fact's mean over the tokens of a role, with 95% bootstrap intervals over facts.

        Args:
            kind: one of `kinds`.
            metric: one of `metrics`, or `prob` and `logit_diff`.
            n_boot: bootstrap samples.
            seed: of the bootstrap.

        Returns:
            Means, intervals, n and p-values as [role][layer].
        """
        effects = role_effects(self, self.checked(kind, metric), metric)
        # A role occurs if a fact has a token of it, even where all its cells are unmeasured.
        n = np.array([[role in fact.roles and role in self.roles for role in ROLES] for fact in self.facts]).sum(0)
        occurring = np.flatnonzero(n)
        grid = bootstrap_mean_grid(effects[:, occurring], n_boot, seed)
        p, q = tested(effects[:, occurring], grid, seed)
        return RoleGrid(tuple(ROLES[r] for r in occurring), grid.mean, grid.low, grid.high, n[occurring], p, q, grid.n)

    @takes()
    def curve(
        self, kind: str, metric: str = "logit_diff", at: str = "subject_last", n_boot: int = 2000, seed: int = 0
    ) -> Curve:
        """The row of `by_role` at role `at`: effect by layer (Figure 2).

        Args:
            kind: one of the trace's kinds.
            metric: `prob` or `logit_diff`.
            at: a token role: `subject_last`, `last`, ...
            n_boot: bootstrap samples.
            seed: of the bootstrap.

        Returns:
            Mean, interval and n by layer.
        """
        grid = self.by_role(kind, metric, n_boot, seed)
        if at not in grid.roles:
            raise BadFact(f"no traced fact has a token of role {at!r}; choose among {', '.join(grid.roles)}")
        row = grid.roles.index(at)
        means = (grid.mean[row], grid.low[row], grid.high[row])
        return Curve(*means, int(grid.n[row]), grid.p[row], grid.q[row], grid.counts[row])

    def checked(self, kind: str, metric: str) -> str:
        """The kind's name.

        Raises:
            BadFact: this trace lacks the kind or the metric, or the metric is unknown.
        """
        if str(kind) not in self.kinds:
            raise BadFact(f"this trace holds {', '.join(self.kinds)}, not {kind}; trace again with kinds=")
        if (name := metric_name(metric)) in WHOLE and any(name not in fact.clean for fact in self.facts):
            raise BadFact(f"this trace holds no {name}; trace again with metrics=('{name}',)")
        return str(kind)

    # Tables and figures -----------------------------------------------------------------------------------------
    def as_dict(self) -> dict[str, Any]:
        """For `--json`: `kinds.<kind>.<metric>[row][layer]`; rows are one fact's tokens, or the roles of several.

        Intervals and n are over facts, or over the noise draws of a single one; `curves` are at the last subject token.
        """
        cells = {kind: {metric: grid(self, kind, metric) for metric in self.metrics} for kind in self.kinds}
        first = next(iter(next(iter(cells.values())).values()))
        roles = self.by_role(self.kinds[0], self.metrics[0], n_boot=1).roles
        ends = {name: bootstrap_mean([getattr(fact, name) for fact in self.facts]) for name in ("p_clean", "p_corrupt")}

        def of_cells(*names: str) -> dict[str, Any]:
            return {k: {m: {n: found[n] for n in names} for m, found in by.items()} for k, by in cells.items()}

        return {
            **{name: self.metadata[name] for name in ("model", "direction", "method")},
            "n_facts": self.n_facts,
            "left_out": [fact._asdict() for fact in self.left_out],
            "rows": first["rows"] if self.n_facts == 1 else roles,
            "subject_rows": first["subject_rows"],
            "kinds": {k: {m: found["values"] for m, found in by.items()} for k, by in cells.items()},
            "intervals": of_cells("low", "high", "n"),
            "tests": of_cells("p", "q"),
            "curves": {k: {m: self.curve(k, m)._asdict() for m in self.metrics} for k in self.kinds},
            "clean": ends["p_clean"].mean,
            "clean_ci95": ends["p_clean"].ci95,
            "corrupted": ends["p_corrupt"].mean,
            "corrupted_ci95": ends["p_corrupt"].ci95,
            **self._whole_answers(),
        }

    def _whole_answers(self) -> dict[str, Any]:
        """The tokens of the whole answers, and their log-probability in the clean and the corrupted runs."""
        if not set(WHOLE) & set(self.metrics):
            return {}
        ends = {"clean": [f.clean["log_prob"] for f in self.facts]}
        ends["corrupted"] = [float(f.corrupted["log_prob"].mean(dtype=np.float64)) for f in self.facts]
        lengths = {name: [len(getattr(f, f"{name}_ids")) for f in self.facts] for name in ("answer", "foil")}
        means = {f"{name}_log_prob": bootstrap_mean(values).as_dict() for name, values in ends.items()}
        return {"whole_answer": {f"{name}_tokens": n for name, n in lengths.items()} | means}

    def notes(self) -> Sequence[str]:
        """How many facts, and what a cell is."""
        return [
            f"{count(self.n_facts, 'fact')} traced; {self.why_left_out()}. Each cell restores one clean state in the "
            "corrupted run and shows how much of the answer comes back."
        ]

    def headline(self) -> Sequence[Card]:
        """How many facts."""
        return [Card("facts traced", self.n_facts)]

    def tables(self, metric: str | None = None) -> Sequence[Table]:
        """The strongest layer at the last subject token, by kind; of single heads the best five.

        Args:
            metric: one of `metrics`; None is the last of them, a difference where one was measured.
        """
        metric = metric or self.metrics[-1]
        peaks = {kind: peak(self.curve(kind, metric)) for kind in self.kinds}
        modules = without_heads(self)
        heads = sorted((kind for kind in self.kinds if kind not in modules), key=lambda kind: -peaks[kind][1].mean)
        rows = [[kind, *peaks[kind]] for kind in (*modules, *heads[:5])]
        note = f"{count(self.n_facts, 'fact')}, {self.why_left_out()}"
        title = "strongest layer at the last subject token"
        if metric_name(metric) in WHOLE:
            title += f", {metric_title(self, metric)}"
        return [Table(["kind", "layer", "effect [95%]"], rows, title, note)]

    @takes()
    def figures(self, metrics: Sequence[str] | None = None) -> Sequence[Figure]:
        """Figure 1 for each of `metrics` (None: the trace's) in the order given, then single heads, then Figure 2."""
        metrics = metric_names(metrics or self.metrics)
        found = []
        for metric in metrics:
            says = f"Effect on the {METRIC_NAMES[metric]}, tokens down, layers across."
            found.append(Figure(self.heatmaps(metric), says, name=f"heatmap-{metric.replace('_', '-')}"))
        for name, says in {"heads": "Attention by head.", "experts": "The MLP by expert."}.items():
            if _singles(self, name):
                found.append(Figure(getattr(self, name)(metrics[0]), says, name=name, only="command"))
        says = "By layer at the last subject token, with 95% intervals over facts."
        return [*found, Figure(self.curves(), says, name="curves")]

    def heatmap(self, kind: str = "mlp", metric: str = "logit_diff") -> go.Figure:
        """One kind's heatmap: layers across; down, the tokens of a single fact or the roles of several.

        Args:
            kind: one of the trace's kinds.
            metric: `prob` or `logit_diff`.

        Returns:
            A plotly figure.
        """
        from ..figures import heatmap_panel

        panel = _panel(self, self.checked(kind, metric), metric)
        return heatmap_panel([panel], title=title_of(self), subtitle=subtitle_of(self, metric))

    def heatmaps(self, metric: str = "logit_diff") -> go.Figure:
        """All kinds side by side in one `metric`, `mlp` and `attn` on one scale (Figure 1).

        Single heads have a figure of their own, `heads`, unless the trace holds nothing else.
        """
        from ..figures import heatmap_panel

        kinds = without_heads(self)
        if not kinds:
            return self.heads(metric) if _singles(self, "heads") else self.experts(metric)
        panels = [_panel(self, self.checked(kind, metric), metric) for kind in kinds]
        # Restored hidden states reach 1 and would leave the two modules pale: each sort shares a scale of its own.
        for sort in (True, False):
            alike = [p for p in panels if (p["kind"] in MODULES) is sort]
            top = max((float(p["values"][~np.isnan(p["values"])].max(initial=0.0)) for p in alike), default=0.0)
            for panel in alike if top > 0 else ():
                panel["zmax"] = top
        return heatmap_panel(panels, title=title_of(self), subtitle=subtitle_of(self, metric), shared_scale=False)

    def curves(self, at: str = "subject_last") -> go.Figure:
        """Both metrics by layer at one role, with interval bands (Figure 2).

        Single heads are left out, unless the trace holds nothing else.
        """
        from ..figures import Series, layer_curves, theme

        layers = range(self.n_layers)
        series: dict[str, dict[str, Any]] = {}
        for name in without_heads(self) or self.kinds:
            series[name] = {}
            for metric in self.metrics:
                found = self.curve(name, metric, at)
                line = (found.mean, found.low, found.high, found.counts)
                series[name][metric] = Series(theme.look(name).label, layers, *line, kind=name)
        title = f"{title_of(self)} · {TITLES[at].lower()}"
        titles = {metric: metric_title(self, metric) for metric in self.metrics}
        return layer_curves(series, title=title, subtitle=subtitle_of(self, *self.metrics), metric_titles=titles)

    def heads(self, metric: str = "logit_diff", at: str = "subject_last") -> go.Figure:
        """Attention by head: heads down, layers across, at one role. q is over all cells of the figure.

        Several facts' intervals and tests are over the facts, a single fact's over its noise draws.

        Args:
            metric: `prob` or `logit_diff`.
            at: a token role: `subject_last`, `last`, ...

        Raises:
            BadFact: the trace holds no single heads, or no token of this role.
        """
        return self._by_single("heads", "attention by head", metric, at)

    def experts(self, metric: str = "logit_diff", at: str = "subject_last") -> go.Figure:
        """The MLP by expert: experts down, layers across, at one role; see `heads`.

        Args:
            metric: `prob` or `logit_diff`.
            at: a token role: `subject_last`, `last`, ...

        Raises:
            BadFact: the trace holds no single experts, or no token of this role.
        """
        return self._by_single("experts", "MLP by expert", metric, at)

    def _by_single(self, name: str, words: str, metric: str, at: str) -> go.Figure:
        from ..figures import heads_figure
        from ..figures.theme import single_of

        found = _singles(self, name)
        if not found:
            raise BadFact(f"this trace holds no single {name}; trace again with kinds=({name!r},)")
        if at not in self.roles or at not in {role for fact in self.facts for role in fact.roles}:
            raise BadFact(f"no traced fact has a token of role {at!r}; choose among {', '.join(self.roles)}")
        records = np.stack([effects_at(self, self.checked(kind, metric), metric, at) for kind in found], -1)
        cells = bootstrap_mean_grid(records)
        p, q = tested(records, cells)
        return heads_figure(
            cells.mean,
            cells.low,
            cells.high,
            q,
            p=p,
            n=cells.n,
            rows=[" ".join(map(str, single_of(kind) or ())) for kind in found],
            kind="attn" if name == "heads" else "mlp",
            over=over(self),
            colour_title=metric_title(self, metric),
            title=f"{title_of(self)} · {words} · {TITLES[at].lower()}",
            subtitle=subtitle_of(self, metric),
        )

    def figure(self) -> go.Figure:
        """The heatmaps of all kinds, logit difference, or the whole answers' where these alone decided."""
        return self.heatmaps("logit_diff" if set(METRICS) & set(self.metrics) else self.metrics[-1])

    # Files ------------------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file.

        It holds float32 arrays `<n>.corrupted.<metric>` (sample) and `<n>.<kind>.<metric>` (layer, token, sample) of
        the n-th fact; everything else is JSON in its header.

        Returns:
            The path that was written.
        """
        arrays: dict[str, ndarray] = {}
        for i, fact in enumerate(self.facts):
            for metric in fact.clean:
                arrays[f"{i}.corrupted.{metric}"] = fact.corrupted[metric].astype(np.float32)
                for kind in self.kinds:
                    arrays[f"{i}.{kind}.{metric}"] = fact.patched[kind][metric].astype(np.float32)
        header = {
            "kind": FILE_KIND,
            "kinds": list(self.kinds),
            "facts": [fact_header(fact) for fact in self.facts],
            "left_out": [fact._asdict() for fact in self.left_out],
            "run": dict(self.metadata),
        }
        return save_arrays(path, arrays, header)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Trace:
        """Read the trace that `save` wrote to `path`.

        Raises:
            BadFile: the file is not a trace, or an incomplete one.
        """
        arrays, header = load_arrays(path, kind=FILE_KIND)
        with complete_file(path, "trace", "trace again"):
            try:
                kinds = tuple(Patch.parse(kind).label for kind in header["kinds"])
            except BadFact as error:
                raise BadFile(f"{path}: not a whole trace ({error}); trace again") from error
            facts = tuple(fact_from(fact, i, kinds, arrays) for i, fact in enumerate(header["facts"]))
            left_out = tuple(LeftOut(**fact) for fact in header["left_out"])
            return Trace(facts, kinds, left_out, OLDER | header["run"])

    @takes()
    def merge(self, others: Trace | Sequence[Trace]) -> Trace:
        """This trace's facts and the others', numbered on from this trace's list.

        Raises:
            BadFact: the traces differ in model, kinds, window or corruption, or hold the same fact twice.
        """
        traces = [self, *([others] if isinstance(others, Trace) else others)]
        for trace in traces[1:]:
            _must_merge(self, trace)
        seen: set[tuple[Any, ...]] = set()
        for fact in (fact for trace in traces for fact in trace.facts):
            if fact.question in seen:
                raise BadFact(f"{fact.prompt!r} is in two of the traces and would count twice; merge distinct facts")
            seen.add(fact.question)
        facts, left_out, n_given = numbered_on(traces)
        return Trace(tuple(facts), self.kinds, tuple(left_out), _merged_metadata(traces, n_given))


def _must_merge(first: Trace, other: Trace) -> None:
    for name in _SAME:
        mine, theirs = (trace.metadata.get(name, _UNSAID.get(name)) for trace in (first, other))
        if theirs != mine:
            raise BadFact(f"traces of {name} {mine!r} and {theirs!r} do not merge; trace both the same way")
    if set(other.kinds) != set(first.kinds):
        raise BadFact(
            f"traces of kinds {', '.join(first.kinds)} and {', '.join(other.kinds)} do not merge; "
            "trace both the same way"
        )


def _merged_metadata(traces: Sequence[Trace], n_given: int) -> dict[str, Any]:
    """The first trace's metadata, with lists where the traces differ (the noise level depends on the facts)."""
    merged = dict(traces[0].metadata)
    for name in ("noise_level", "noise_scale", "noise", "seed", "dtype"):
        values = []
        for value in (trace.metadata[name] for trace in traces):
            values += value if isinstance(value, list) else [value]
        merged[name] = values[0] if all(v == values[0] for v in values) else values
    merged["metrics"] = [m for m in EVERY if all(m in trace.metrics for trace in traces)] or list(METRICS)
    merged["samples"] = sorted({s for trace in traces for s in trace.metadata["samples"]})
    merged["warnings"] = [text for trace in traces for text in trace.metadata["warnings"]]
    return merged | {"n_given": n_given}


def _singles(trace: Trace, name: str) -> list[str]:
    """The kinds that are single `heads`, or single `experts`, in the order of their numbers."""
    from ..figures.theme import single_of

    found = {kind: single for kind in trace.kinds if (single := single_of(kind)) is not None}
    return sorted(
        (k for k, single in found.items() if (single[0] == "head") == (name == "heads")), key=found.__getitem__
    )


def without_heads(trace: Trace) -> list[str]:
    """The kinds that are whole modules or states: no single heads, no single experts."""
    from ..figures.theme import single_of

    return [kind for kind in trace.kinds if single_of(kind) is None]


def _panel(trace: Trace, kind: str, metric: str) -> dict[str, Any]:
    marked = trace.other_mixers if kind == "attn" else {}
    return {"kind": kind, "colour_title": metric_title(trace, metric), "marked": marked, **grid(trace, kind, metric)}
