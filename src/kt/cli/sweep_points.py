"""What `kt sweep` is given, and the points that it comes to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import KtError
from . import parse
from .command import BadOption, option_of
from .judge import EvalOptions, questions
from .options import FactOptions, FigureOptions, ModelOptions, Opt, RunOptions, SolveOptions

if TYPE_CHECKING:
    from ..model import TracedModel
    from ..sweep import Point

KINDS = ("alpha", "layers", "edits", "clamp", "modules")
NUMBER = r"\d*\.?\d+"


@dataclass(frozen=True)
class SweepOptions(FigureOptions, RunOptions, SolveOptions, FactOptions, ModelOptions):
    method: Annotated[
        str | None,
        Opt("--method", help="An editing method, for edits several: memit,pmet,jeep [default: intattn; clamp: jeep]."),
    ] = None
    alpha: Annotated[
        str | None,
        Opt("--alpha", help="Attention's share where not swept: 0.3, or auto [default: the preset's]."),
    ] = None
    kind: Annotated[str, typer.Argument(metavar="|".join(KINDS))] = "alpha"
    grid: Annotated[
        str | None,
        Opt(
            "--grid",
            help="The settings: 0,0.3,1 or 0:1:0.1 (from:to:step); of layers 1-2;2-3 [default: the papers'].",
        ),
    ] = None
    requests: Annotated[
        int | None,
        Opt("--requests", min=1, help="How many facts are edited, evenly over all [default: all; 20 of the demo's]."),
    ] = None
    module: Annotated[str, Opt("--module", help="Whose layers are swept: attn or mlp.")] = "attn"
    region: Annotated[
        str | None, Opt("--region", help="Whose clamp is swept: high, of jeep, or low [default: high for jeep].")
    ] = None
    protocol: Annotated[str, option_of(EvalOptions, "protocol")] = EvalOptions.protocol
    heldout: Annotated[str | None, option_of(EvalOptions, "heldout")] = None
    no_generate: Annotated[bool, Opt("--no-generate", help="Score without generated text: faster.")] = False
    no_trace: Annotated[bool, Opt("--no-trace", help="Sweep alpha without tracing the α to mark.")] = False
    resume: Annotated[
        Path | None, Opt("--resume", metavar="DIR", help="Go on with an interrupted sweep; repeat its options.")
    ] = None


def fixed_settings(options: SweepOptions) -> dict[str, Any]:
    """The settings that all points share."""
    found = parse.settings(options.set) | {
        "preset": options.preset,
        "variant": options.variant,
        "layers_mlp": parse.layers(options.layers_mlp, "--layers-mlp"),
        "layers_attn": parse.layers(options.layers_attn, "--layers-attn"),
    }
    return {name: value for name, value in found.items() if value is not None}


def protocols_of(options: SweepOptions) -> tuple[str, ...]:
    """The ways to ask, read as `kt eval` reads them; what cannot work is refused before a model loads."""
    names = ("protocol", "no_generate", "heldout")
    found: tuple[str, ...] = questions(EvalOptions(**{name: getattr(options, name) for name in names}))["protocols"]
    if "ppl" in found:
        from ..evaluation.perplexity import heldout_corpus

        heldout_corpus(options.heldout, options.model)
    return found


def methods_of(options: SweepOptions) -> list[str]:
    """One method, or several in a sweep of the number of edits."""
    from ..editing import METHODS

    default = "jeep" if options.kind == "clamp" else "intattn"
    found = list(parse.names(options.method or default, tuple(METHODS), "--method"))
    if len(found) > 1 and options.kind != "edits":
        raise BadOption(f"--method {options.method}: only a sweep of edits takes several methods; name one")
    return found


def default_grid(kind: str, n_facts: int) -> Any:
    """The papers' grid of a kind; of edits, up to all facts."""
    from ..sweep import edit_counts, grids

    known = {"alpha": grids.ALPHAS, "layers": grids.ATTENTION_SETS, "clamp": grids.CLAMPS}
    return edit_counts(n_facts) if kind == "edits" else known.get(kind, ())


def points_of(
    grid: Any,
    model: TracedModel,
    options: SweepOptions,
    given: Mapping[str, Any],
    balance: Mapping[str, Any] | None,
) -> list[Point]:
    """The grid as points; whatever writes attention gets its α as a number, so that all points have the same."""
    from ..sweep import alpha_points, clamp_points, edit_points, layer_points, module_points

    kind, methods = options.kind, methods_of(options)
    method = methods[0]
    if kind == "alpha":
        return alpha_points(grid, method, **given)
    shares = {name: _alpha(model, name, options, given, balance) for name in methods}
    own = {name: {**given, **({} if share is None else {"alpha": share})} for name, share in shares.items()}
    if kind == "modules":
        if shares[method] is None:
            raise BadOption(f"--method {method} writes no attention; a sweep of modules needs intattn or intattn-rome")
        return module_points(float(shares[method] or 0), method, **given)
    if kind == "layers":
        return layer_points(grid, options.module, method, **own[method])
    if kind == "clamp":
        region = options.region or ("high" if method == "jeep" else "low")
        return clamp_points(grid, method, region, **own[method])
    counts = [int(number) for number in grid]
    return [point for name in methods for point in edit_points(counts, [name], own[name])]


def parse_grid(kind: str, text: str | None) -> Any:
    """`0,0.3,1` or `0:1:0.1`; sets of layers `1-2;2-3`; None for the default of the kind."""
    if text is None:
        return None
    if kind == "modules":
        raise BadOption("--grid has no meaning for modules: they are MLP, attention, and both")
    if kind == "layers":
        return tuple(parse.layers(part.strip(), "--grid") or () for part in text.split(";"))
    if match := re.fullmatch(rf"({NUMBER}):({NUMBER}):({NUMBER})", text.strip()):
        first, last, step = (float(part) for part in match.groups())
        if step <= 0 or last < first or (last - first) / step > 1000:
            raise BadOption(f"--grid {text!r}: write from:to:step with a step above 0 and at most 1000 points")
        return tuple(round(first + i * step, 10) for i in range(int((last - first) / step + 1e-9) + 1))
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(NUMBER, part) for part in parts):
        raise BadOption(f"--grid {text!r}: write numbers as 0,0.3,1 or from:to:step as 0:1:0.1")
    if kind == "edits" and not all(part.isdigit() for part in parts):
        raise BadOption(f"--grid {text!r}: numbers of edits are whole: 1,10,100")
    return tuple(float(part) for part in parts)


def _alpha(
    model: TracedModel,
    method: str,
    options: SweepOptions,
    given: Mapping[str, Any],
    balance: Mapping[str, Any] | None,
) -> float | None:
    """A method's α: None where it writes no attention; the traced one where nobody set it."""
    from ..editing.methods import METHODS

    if not METHODS[method].writes_attention:
        return None
    fixed = fixed_alpha(model, method, options, given)
    if fixed is not None:
        return fixed
    if balance is None:
        raise KtError(f"{method} needs an α, and it could not be traced on these facts; give --alpha as a number")
    return float(balance["alpha"])


def fixed_alpha(model: TracedModel, method: str, options: SweepOptions, given: Mapping[str, Any]) -> float | None:
    from ..editing.prepare import Asked

    alpha = None if options.alpha is None else parse.alpha(options.alpha)
    if alpha == "per-fact":
        raise BadOption("--alpha per-fact: a sweep takes one α for all facts; write auto or a number")
    names = {n: v for n, v in given.items() if n not in ("preset", "variant")}
    return Asked.of(model, method, alpha, options.preset, options.variant, names).fixed_alpha()
