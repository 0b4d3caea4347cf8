"""What δ can change, and nothing else, run again at every step of a target search.

δ enters at the lowest aim's block and, in each row, at the subject's last token (or the prompt's). Blocks below and
tokens before give the same at every step. So the rows are run whole once; a step runs their last columns through the
blocks from `start` on, over the keys and values that the columns before left, and the head only where logits are read;
so is the last block's MLP.

Whether a model's keys and values say all that later tokens need is found out by running: a few rows, with no δ, must
come to the head as they did whole. Otherwise (recurrent layers, short sliding windows) steps run all columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..sites import Kind, Site
from ..tracing.runs import Prefix, new_cache, prefix_is_reusable, saved, stored
from .aims import Aim
from .target_rows import TargetRows

if TYPE_CHECKING:
    from ..model import TracedModel

ORDER = (Kind.ATTN, Kind.MLP, Kind.RESID)
"""The order in which a block computes its values."""

Deltas = Mapping[Aim, Float[Tensor, "fact d_model"]]


@dataclass(frozen=True)
class Suffix:
    """Rows from column `cut` on, as they enter block `start`; `prefixes` are the columns before, block by block."""

    rows: TargetRows
    start: int
    cut: int
    entering: Float[Tensor, "row suffix d_model"]
    prefixes: Sequence[Prefix]

    def of(self, facts: Bool[Tensor, " fact"]) -> Suffix:
        """The rows of some of the requests."""
        kept = facts[self.rows.fact]
        prefixes = [(keys[kept.to(keys.device)], values[kept.to(keys.device)]) for keys, values in self.prefixes]
        entering = self.entering[kept.to(self.entering.device)]
        return Suffix(self.rows.of(kept), self.start, self.cut, entering, prefixes)


def lowest_block(aims: Sequence[Aim]) -> int:
    """The first block whose output depends on δ."""
    return min(aim.site.layer + (aim.site.kind is Kind.RESID) for aim in aims)


def run_whole(
    model: TracedModel, rows: TargetRows, aims: Sequence[Aim]
) -> tuple[Suffix, dict[Aim, Float[Tensor, "row d_model"]]]:
    """The rows' one whole forward: what a step starts from, and the value now at each aim in every row."""
    start, cut = lowest_block(aims), rows.first_touched(aims)
    cache = new_cache(model) if cut and prefix_is_reusable(model, rows.width) else None
    entering, now, arriving = _first_run(model, rows, aims, start, cache)
    if cache is not None and (prefixes := stored(cache, model.n_layers, rows.batch.ids)) is not None:
        before = [(keys[:, :, :cut], values[:, :, :cut]) for keys, values in prefixes[start:]]
        short = Suffix(rows, start, cut, entering[:, cut:], before)
        if _arrives_the_same(model, short, arriving):
            return short, now
    return Suffix(rows, start, 0, entering, []), now


@torch.no_grad()
def _first_run(
    model: TracedModel, rows: TargetRows, aims: Sequence[Aim], start: int, cache: Any
) -> tuple[Tensor, dict[Aim, Tensor], Tensor | None]:
    """The residual stream that enters block `start`, values at the aims, and (with a cache) what reaches the head."""
    size, every = len(rows), torch.arange(len(rows), device=model.device)
    last = model.n_layers if cache is not None else max(start, max(a.site.layer for a in aims) + 1)
    now: dict[Aim, Tensor] = {}
    entering: list[Tensor] = []
    arriving: list[Tensor] = []
    arguments = model.inputs(rows.batch, rows.keep, past_key_values=cache, use_cache=cache is not None)
    with model.nns.trace(**arguments) as tracer:
        for layer in range(last):
            if layer == start == 0:
                entering.append(saved(model.block(0).input.clone()))
            for kind in ORDER:
                for aim in aims:
                    if aim.site == Site(kind, layer):
                        full: Any = model.value(aim.site, size)
                        now[aim] = saved(
                            full[every.to(full.device), rows.columns[aim.position].to(full.device)].float()
                        )
            if layer == start - 1:
                entering.append(saved(model.value(Site(Kind.RESID, layer), size).clone()))
        if cache is not None:
            arriving.append(saved(_read_states(model, rows).clone()))
        tracer.stop()
    return entering[0], {a: now[a] for a in aims}, arriving[0] if arriving else None


def suffix_logits(model: TracedModel, suffix: Suffix, delta: Deltas) -> Float[Tensor, "read vocab"]:
    """Logits where `rows.reads` says, row by row, with every δ added at its aim: float32, with a gradient."""
    return _run_suffix(model, suffix, delta, to_the_head=False).float().to(model.device)


def _arrives_the_same(model: TracedModel, suffix: Suffix, whole: Tensor | None) -> bool:
    """Whether the first and the last request's rows come to the head as they did in the whole run."""
    rows = suffix.rows
    some = torch.zeros(int(rows.fact.max()) + 1, dtype=torch.bool, device=rows.fact.device)
    some[[int(rows.fact.min()), int(rows.fact.max())]] = True
    assert whole is not None
    want = whole[some[rows.fact[rows.reads.nonzero()[:, 0]]].to(whole.device)].float()
    try:
        with torch.no_grad():
            found = _run_suffix(model, suffix.of(some), {}, to_the_head=True).float()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError):  # a cache that the model does not take
        return False
    close = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    return bool(((found - want).norm(dim=-1) <= close * want.norm(dim=-1)).all())


def _run_suffix(model: TracedModel, suffix: Suffix, delta: Deltas, to_the_head: bool) -> Tensor:
    """Logits where they are read, or what the head would make them from."""
    rows, start, size = suffix.rows, suffix.start, len(suffix.rows)
    shifts = {aim: _Shift.of(suffix, aim, d) for aim, d in delta.items()}
    entering = suffix.entering.clone()
    for aim, shift in shifts.items():
        if aim.site == Site(Kind.RESID, start - 1):
            entering = entering.index_put(shift.places(entering), shift.by(entering), accumulate=True)
    filler = (entering, None) if model.layout.tuple_output else entering
    result: list[Tensor] = []
    with model.nns.trace(**_arguments(model, suffix)) as tracer:
        for layer in range(start):
            model.block(layer).skip(filler)
        if start == 0:
            model.block(0).input = entering
        for layer in range(start, model.n_layers):
            for kind in ORDER:
                for aim, shift in shifts.items():
                    if aim.site == Site(kind, layer):
                        value: Any = model.value(aim.site, size)
                        value[shift.places(value)] += shift.by(value)
        if _narrows(model, suffix, delta):
            _mlp_of_read_columns(model, rows.keep)
        states = _read_states(model, rows)
        if to_the_head:
            result.append(saved(states))
            tracer.stop()
        else:
            model.envoy(model.layout.unembed).input = states[:, None]
            result.append(saved(model.nns.output.logits[:, 0]))
    return result[0]


def _narrows(model: TracedModel, suffix: Suffix, delta: Deltas) -> bool:
    """Whether the last block's MLP may be given fewer columns: there are fewer, and δ is added to none there."""
    last = model.n_layers - 1
    own_module = model.layout.mlp != model.layout.w_mlp
    inside = suffix.start <= last and all(aim.site.layer < last for aim in delta)
    return own_module and inside and suffix.cut > 0 and suffix.rows.width - suffix.cut > suffix.rows.keep


def _mlp_of_read_columns(model: TracedModel, keep: int) -> None:
    """Inside a trace: past the last attention no column sees another, so those that are not read stay zero."""
    mlp = model.envoy(f"{model.layout.blocks}.{model.n_layers - 1}.{model.layout.mlp}")
    given = mlp.input
    mlp.input = given[:, -keep:].contiguous()
    mlp.output = torch.nn.functional.pad(mlp.output, (0, 0, given.shape[1] - keep, 0))


def _read_states(model: TracedModel, rows: TargetRows) -> Any:
    """Inside a trace: what the head is given in the columns that are read, as a dense matrix of `read` rows."""
    given = model.envoy(model.layout.unembed).input[:, -rows.keep :]
    return given[rows.reads.to(given.device)]


def _arguments(model: TracedModel, suffix: Suffix) -> dict[str, Any]:
    """One forward over the suffix's columns; a cache of its own, since a forward adds its keys to it."""
    batch = suffix.rows.batch
    arguments = model.inputs(batch, suffix.rows.keep)
    if not suffix.cut:
        return arguments
    cache = new_cache(model)
    for layer in range(model.n_layers):  # of a skipped block only the length counts, for the masks
        held = model.device if layer < suffix.start else suffix.prefixes[layer - suffix.start][0].device
        nothing = torch.zeros((1, 1, suffix.cut, 1), device=held, dtype=model.dtype)
        cache.update(nothing, nothing, layer)
        if layer >= suffix.start:  # put there, not added: no copy
            cache.layers[layer].keys, cache.layers[layer].values = suffix.prefixes[layer - suffix.start]
    short = {name: arguments[name][:, suffix.cut :] for name in ("input_ids", "position_ids") if name in arguments}
    return arguments | short | {"past_key_values": cache, "use_cache": True}


@dataclass(frozen=True)
class _Shift:
    """δ of an aim, at each place of the suffix that it is added to."""

    where: tuple[Int[Tensor, " place"], Int[Tensor, " place"]]
    each: Float[Tensor, "place d_model"]

    @classmethod
    def of(cls, suffix: Suffix, aim: Aim, delta: Float[Tensor, "fact d_model"]) -> _Shift:
        rows, columns = suffix.rows.where(aim.position)
        return cls((rows, columns - suffix.cut), delta[suffix.rows.fact[rows]])

    def places(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Where the value is: blocks may lie on several devices."""
        rows, columns = self.where
        return rows.to(value.device), columns.to(value.device)

    def by(self, value: Tensor) -> Tensor:
        return self.each.to(value.device, value.dtype)
