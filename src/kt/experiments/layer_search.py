"""`find_layers`: which layers to edit in a model that no paper has edited, by editing in them.

    found = kt.find_layers(model, method="memit")    # facts that the model knows, of the shipped ones
    found.chosen, found.sources; found.save_preset("mine.toml")

1. Of the facts, those that the model knows; some are edited, the others traced (none is both).
2. The trace gives α, the layers that it proposes and the share of bootstrap draws that propose each (`Balance`).
3. Windows of layers are compared by editing, as a sweep: of the MLP, and where the method writes attention also of
   attention, the other module's layers held fixed. A window is as wide as the method's default layers.
4. The best window has the highest score: the harmonic mean of edit success and locality, times the unedited model's
   perplexity over the edited one's where that is worse. Ties go to the default layers, then to the first ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.files import write_named
from .._util.kinds import require_options, takes
from .._util.notebook_bar import stage_or_bars
from .._util.progress import Stage
from .._util.text import without_folders
from ..editing import METHODS
from ..editing.config import Config
from ..editing.evidence import (
    default_alpha,
    facts_beside,
    keep_balance,
    keep_preset,
    known_facts,
    probe_stages,
    traced_balance,
)
from ..editing.method_names import Method, MethodName
from ..editing.methods import layered
from ..editing.presets import preset_for
from ..editing.resolve import configure, default_layers
from ..errors import KtError
from ..facts.fact import Fact
from ..facts.load import FactsLike, facts_from
from ..model.sites import Kind
from ..report import Card, Figure, Shown, Table
from ..report.table import layer_list
from ..stats import Interval
from .grids import layer_points
from .sweep import distinct, sweep
from .sweep_result import Row, Sweep

if TYPE_CHECKING:
    from ..model.model import TracedModel
    from ..tracing import Balance

WINDOWS = 7
"""Windows of a module, evenly over the depth."""
SUCCESS, LOCALITY, PERPLEXITY = "edit_success_tf_exact", "neighbourhood_same_argmax", "perplexity_heldout"
DEFAULT = "by default"


@dataclass(frozen=True)
class FoundLayers(Shown):
    """The result of `find_layers`.

    Attributes:
        method: the method whose layers these are.
        balance: α and the layers that the trace proposes, with the shares of bootstrap draws.
        sweep: one edit a window.
        chosen: the best layers by setting, α where the method has one, and what else the edits were made with.
        sources: where each value of `chosen` comes from.
        inherits: the preset that stands behind them, if one matches the model.
    """

    kind = "layers"

    heading = "Layers to edit"

    method: str
    balance: Balance
    sweep: Sweep
    chosen: Mapping[str, Any]
    sources: Mapping[str, str]
    inherits: str | None = None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The model, the facts, and what each metric means."""
        return self.sweep.about

    def __repr__(self) -> str:
        return f"FoundLayers({self.method}: {', '.join(f'{name} {value}' for name, value in self.chosen.items())})"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: the chosen settings with their sources, the windows' scores, the trace and the sweep."""
        scores = {f"{row.series} {row.label}": score(row, self.sweep.before) for row in self.sweep.rows}
        chosen = {name: list(v) if isinstance(v, tuple) else v for name, v in self.chosen.items()}
        content = {"method": self.method, "chosen": chosen, "sources": dict(self.sources), "scores": scores}
        return content | {"balance": self.balance.as_dict(), "sweep": self.sweep.as_dict()}

    def notes(self) -> Sequence[str]:
        """What the trace does not determine, and how far the best window is told apart from the default layers."""
        return [*self.balance.notes(), *self._apart()]

    def headline(self) -> Sequence[Card]:
        """The chosen layers."""
        return [Card(name, layer_list(value)) for name, value in self.chosen.items() if name.startswith("layers")]

    def tables(self) -> Sequence[Table]:
        """The shares of draws that propose each layer; the windows; the chosen settings."""
        shares, before = self.balance.layer_shares, self.sweep.before
        seen = [i for i in range(len(next(iter(shares.values()), ()))) if any(v[i] >= 0.05 for v in shares.values())]
        draws = [[i, *(f"{shares[kind][i]:.0%}" for kind in shares)] for i in seen]
        title = f"share of bootstrap draws of {self.balance.n_facts} facts that propose a layer"
        rows = [
            [row.series, row.label, *(Interval.of(row.metrics[n]) if n in row.metrics else None for n in METRICS), s]
            for row in self.sweep.rows
            for s in [score(row, before)]
        ]
        note = f"unedited: perplexity {before[PERPLEXITY]['mean']:.2f}" if PERPLEXITY in before else ""
        columns = ["module", "layers", "edit success", "locality", "perplexity", "score"]
        chosen = [[name, _text(value), self.sources.get(name, "")] for name, value in self.chosen.items()]
        return [
            Table(["layer", *shares], draws, title, "below 5% left out"),
            Table(columns, rows, f"{self.method}: {self.metadata['n_facts']} facts edited in each window", note),
            Table(["setting", "value", "from"], chosen, f"{self.method} on {without_folders(self.metadata['model'])}"),
        ]

    def figures(self) -> Sequence[Figure]:
        """The windows by metric; what each layer adds to the trace's two sums."""
        return [*self.sweep.figures(), *self.balance.figures()]

    def _apart(self) -> list[str]:
        """For each module, whether the facts tell its best window apart from the default layers."""
        notes = []
        for series in dict.fromkeys(row.series for row in self.sweep.rows):
            rows = {row.label: row for row in self.sweep.rows if row.series == series}
            best = max(rows.values(), key=lambda row: score(row, self.sweep.before))
            plain = next((row for label, row in rows.items() if label.endswith(f" {DEFAULT}")), None)
            if plain is None or plain is best:
                continue
            gaps = replace(self.sweep, rows=tuple(rows.values())).difference(best.label, plain.label)
            told = [n for n in (SUCCESS, LOCALITY) if n in gaps and not gaps[n].low <= 0 <= gaps[n].high]
            if not told:
                notes.append(
                    f"{series}: {best.label} and {plain.label} are not told apart by success or locality on "
                    f"{self.metadata['n_facts']} facts; more facts (--edits) would tell"
                )
        return notes

    def preset(self) -> str:
        """The settings as a preset file (docs/presets.md), with the source of each."""
        about = f"{self.method} on {self.metadata['model']}: layers by kt layers"
        head = [f"summary = {_toml(about)}", f"source = {_toml('kt layers')}"]
        head += [f"inherits = {_toml(self.inherits)}"] if self.inherits else []
        values = [f"{name} = {_toml(value)}" for name, value in self.chosen.items() if value is not None]
        sources = [f"{n} = {_toml(s)}" for n, s in self.sources.items() if self.chosen.get(n) is not None]
        table = f"methods.{self.method}"
        return "\n".join([*head, "", f"[{table}]", *values, "", f"[{table}.sources]", *sources, ""])

    def save_preset(self, path: str | Path) -> Path:
        """Write `preset` as a file that `--preset` reads."""
        return write_named(path, self.preset())


METRICS = (SUCCESS, LOCALITY, PERPLEXITY)
SET_HERE = {"model", "facts", "points", "kind", "seeds", "stage"}
"""Arguments of `sweep` that are no options of `find_layers`."""


@takes(method=((Config, str), "a method's name (kt ls methods)"))
def find_layers(
    model: TracedModel,
    facts: FactsLike | None = None,
    method: Method | MethodName = "memit",
    *,
    n_trace: int = 50,
    n_edits: int = 10,
    alpha: float | None = None,
    windows: int = WINDOWS,
    seed: int = 0,
    stage: Stage | None = None,
    **solving: Any,
) -> FoundLayers:
    """Trace facts, compare windows of layers by editing in them, and choose.

    The trace and the choice are kept for later edits of the same weights, which take them where nobody gives layers.

    Args:
        model: the loaded model, as `kt.load` returns it.
        facts: of which those that the model knows are taken, in their order; None takes the shipped ones.
        method: whose layers; a method that writes attention has its windows compared too.
        n_trace: number of facts that are traced.
        n_edits: number of other facts that are edited in each window.
        alpha: attention's share in the edits; None takes the trace's (see `evidence.default_alpha`).
        windows: windows of a module, beside the trace's and the default layers.
        seed: of the draws of trace, edits and bootstrap.
        solving: statistics, corpus, max_tokens, heldout, batch_size, as in `sweep`.

    Returns:
        The trace, one row a window, and the chosen layers as a preset.

    Raises:
        KtError: an unknown method, too few facts that the model knows, or what `sweep` raises.
    """
    require_options(solving, set(signature(sweep).parameters) - SET_HERE, "find_layers")
    stage = stage_or_bars(stage)
    for name, number, least in (("n_trace", n_trace, 2), ("n_edits", n_edits, 1), ("windows", windows, 1)):
        if number < least:
            raise KtError(f"{name} {number} must be at least {least}")
    layered(method)
    config = configure(model, method, alpha)
    asked = facts_beside(model, []) if facts is None else facts_from(facts)
    with stage("facts that the model knows"):
        known, _, looked = known_facts(model, distinct(asked), n_trace + n_edits)
    if len(known) < n_edits + 2:
        raise KtError(
            f"{model.name} knows {len(known)} of {looked} facts, and {n_edits} are edited and others traced; "
            "give facts whose answer is the model's first choice"
        )
    edited, traced = known[:n_edits], known[n_edits:]
    with stage("tracing") as tick:
        balance = traced_balance(model, traced, seed, tick)
    keep_balance(model, balance)
    chosen, sources = _fixed(model, config, method, balance, traced, alpha)
    settings: dict[str, Any] = {
        "protocols": ("tf", "ppl"),
        "seeds": (seed,),
        "stage": stage,
        "kind": "layers",
    } | solving
    found: Sweep | None = None
    for module in ("mlp", "attn") if METHODS[method].writes_attention else ("mlp",):
        grid, fixed = _grid(model, config, module, balance, windows), dict(chosen)
        fixed.pop(f"layers_{module}", None)
        points = [
            replace(p, label=f"{p.label}{f' {grid[layers]}' if grid[layers] else ''}", series=_series(method, module))
            for layers, p in zip(grid, layer_points(list(grid), module, method, **fixed), strict=True)
        ]
        part = sweep(model, edited, points, **settings)
        best = max(part.rows, key=lambda row: (score(row, part.before), DEFAULT in row.label, -row.x))
        name = f"layers_{module}"
        chosen[name], sources[name] = tuple(best.settings[name]), _why(best, part, len(edited))
        found = part if found is None else replace(found, rows=(*found.rows, *part.rows))
    assert found is not None, "every method has MLP layers"
    preset = preset_for(model)
    whole = _with_defaults(config, chosen, sources)
    result = FoundLayers(method, balance, found, *whole, None if preset is None else preset.name)
    keep_preset(model, method, result.preset())
    return result


def score(row: Row, before: Mapping[str, Mapping[str, Any]]) -> float:
    """Success and locality as their harmonic mean, times the share of perplexity that is kept."""
    parts = [float(row.metrics[name]["mean"]) for name in (SUCCESS, LOCALITY) if row.metrics.get(name, {}).get("n")]
    held = 0.0 if not parts or min(parts) <= 0 else len(parts) / sum(1 / part for part in parts)
    after, base = (m.get(PERPLEXITY, {}).get("mean") for m in (row.metrics, before))
    return held * min(1.0, float(base) / float(after)) if after and base else held


def _series(method: str, module: str) -> str:
    return method if module == "mlp" else f"{method}, attention"


def _grid(
    model: TracedModel, config: Config, module: str, balance: Balance, windows: int
) -> dict[tuple[int, ...], str]:
    """Windows from the first layers to the last but one, with names for the trace's and the default one."""
    depth = _default(model, config, f"layers_{module}")
    last = max(0, model.n_layers - 1 - len(depth))
    starts = sorted({round(i * last / max(1, windows - 1)) for i in range(windows)})
    named = {depth: DEFAULT}
    if proposed := balance.layers.get(module):
        named[proposed] = "as traced" if proposed != depth else f"as traced and {DEFAULT}"
    there = model.layers_with(Kind(module))
    windows_there = (tuple(n for n in range(start, start + len(depth)) if n in there) for start in starts)
    sets = {window: "" for window in windows_there if window}
    return dict(sorted((sets | named).items()))


def _default(model: TracedModel, config: Config, name: str) -> tuple[int, ...]:
    """The layers of an edit for which nobody gives layers and nothing is kept: the preset's, else by depth."""
    return default_layers(model, config, name) if name in config.missing_layers else tuple(getattr(config, name))


def _fixed(
    model: TracedModel, config: Config, method: str, balance: Balance, facts: Sequence[Fact], alpha: float | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings that all windows share: α, attention's layers while the MLP's are compared, JEEP's high region."""
    chosen: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if METHODS[method].writes_attention:
        fixed = config.fixed_alpha
        found = None if fixed is not None else default_alpha(model, facts)
        chosen["alpha"] = fixed if found is None else found.value
        sources["alpha"] = "given, or the preset's" if found is None else found.source
        stable = balance.stable_layers.get("attn")
        chosen["layers_attn"] = stable or _default(model, config, "layers_attn")
    if "layers_high" in config.missing_layers:
        stages = probe_stages(model, facts)
        probed = None if stages is None else stages.layers_high
        chosen["layers_high"] = probed or default_layers(model, config, "layers_high")
        sources["layers_high"] = "stages of recall" if probed else "by relative depth"
    return chosen, sources


def _why(row: Row, part: Sweep, n: int) -> str:
    """The best row's measurements in words."""
    numbers = [f"{word} {row.metrics[m]['mean']:.2f}" for word, m in (("success", SUCCESS), ("locality", LOCALITY))
               if row.metrics.get(m, {}).get("n")]  # fmt: skip
    if PERPLEXITY in row.metrics:
        numbers.append(f"perplexity {part.before[PERPLEXITY]['mean']:.2f} -> {row.metrics[PERPLEXITY]['mean']:.2f}")
    return f"best of {len(part.rows)} windows by edits of {n} facts: {', '.join(numbers)}"


def _with_defaults(config: Config, chosen: Mapping[str, Any], sources: Mapping[str, str]) -> tuple[Any, Any]:
    """Beside what was chosen, every other setting of the method as the edits had it."""
    values, froms = dict(chosen), dict(sources)
    for name, setting in config.settings().items():
        if name not in values and name not in config.missing_layers:
            values[name] = getattr(config, name)
            froms[name] = f"preset or default ({setting.source})"
    return values, froms


def _text(value: Any) -> str:
    return layer_list(value) if isinstance(value, tuple) else str(value)


def _toml(value: Any) -> str:
    """A setting's value as TOML, whose basic strings and numbers are JSON's."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
