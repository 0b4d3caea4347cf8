"""The grids of the two papers, and any other: settings of an edit, each with a name and a place on the x axis.

alpha    attention's share from 0 to 1            supplement tables 1 and 2, Figure 4 (arXiv 2510.27400)
layers   which layers one module is written in    the layer ablation that a reading of that paper asks for
edits    how many facts in one batch              Figure 4 (arXiv 2412.17872), its log scale
clamp    how far a wanted value may move          Figure 6 (arXiv 2412.17872, appendix B)
modules  MLP alone, attention alone, both         supplement B.2 (arXiv 2510.27400)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..editing.closed_form.config import check_alpha
from ..editing.methods import method_named, plain_name, used_by
from ..errors import KtError

KINDS = ("alpha", "layers", "edits", "clamp", "modules")
ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
ATTENTION_SETS = ((1, 2), (2, 3), (3, 4), (2, 3, 4), (1, 2, 3, 4, 5))
"""R_attn as a reading of IntAttn-Edit would vary it, with R_mlp held fixed."""
CLAMPS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
"""γ from 0.05 to 1, the ends of JEEP's Figure 6; the paper does not say which values lie between."""
SCALE_STEPS = 16
JOINT, MLP_ONLY, ATTN_ONLY, MLP_PART = "joint", "MLP only", "attention only", "MLP part of joint"


@dataclass(frozen=True)
class Point:
    """One setting.

    Args:
        label: its name, unique in its series.
        x: its place on the x axis.
        options: arguments of `kt.edit`: method, alpha, layers and other hyper-parameters.
        series: which line of the figure it is on; usually the method.
        edits: only the first so many facts; None: all.
        control: score the edit's control in its place (a joint edit's MLP part, scaled as in it).
    """

    label: str
    x: float
    options: Mapping[str, Any] = field(default_factory=dict)
    series: str = ""
    edits: int | None = None
    control: bool = False


def alpha_points(grid: Sequence[float] = ALPHAS, method: str = "intattn", **options: Any) -> list[Point]:
    """One point a share of attention (IntAttn-Edit, eq. 13).

    Raises:
        KtError: a share outside [0, 1], or one named twice.
    """
    for alpha in grid:
        check_alpha(alpha, words=())
    _refuse_swept("alpha", options)
    return _checked([Point(f"{a:g}", a, {"method": method, **options, "alpha": a}, method) for a in grid])


def layer_points(
    grid: Sequence[Sequence[int]] = ATTENTION_SETS, module: str = "attn", method: str = "intattn", **options: Any
) -> list[Point]:
    """One point a set of layers of one module, all else held fixed.

    Raises:
        KtError: a module other than attn and mlp, an empty set, or one named twice.
    """
    if module not in ("attn", "mlp"):
        raise KtError(f"module {module!r} is unknown; choose attn or mlp")
    if not all(grid):
        raise KtError("a set of layers is empty; name at least one layer in each")
    _refuse_swept(f"layers_{module}", options)
    return _checked(
        [
            Point(set_name(layers), index, {"method": method, **options, f"layers_{module}": tuple(layers)}, method)
            for index, layers in enumerate(grid)
        ]
    )


def set_name(layers: Sequence[int]) -> str:
    """`2-4` for a run of layers, `1,3` for others."""
    indices = sorted(set(layers))
    run = len(indices) > 1 and indices[-1] - indices[0] == len(indices) - 1
    return f"{indices[0]}-{indices[-1]}" if run else ",".join(map(str, indices))


def edit_counts(most: int, steps: int = SCALE_STEPS) -> tuple[int, ...]:
    """m_i = exp(ln(most) · i / steps) for i = 0 .. steps (JEEP, footnote 1), to whole numbers, each once.

    Raises:
        KtError: `most` is below 1.
    """
    if most < 1 or steps < 1:
        raise KtError(f"a scale up to {most} edits in {steps} steps has no points; give at least 1 of each")
    return tuple(dict.fromkeys(round(math.exp(math.log(most) * i / steps)) for i in range(steps + 1)))


def edit_points(counts: Sequence[int], methods: Sequence[str], options: Mapping[str, Any] | None = None) -> list[Point]:
    """One point a method and number of edits.

    Raises:
        KtError: a number below 1, or one named twice.
    """
    if wrong := [n for n in counts if n < 1]:
        raise KtError(f"{wrong[0]} edits cannot be made; give numbers from 1")
    given = {m: _of_method(m, methods, options or {}) for m in methods}
    return _checked([Point(str(n), n, {**given[m], "method": m}, m, edits=n) for m in methods for n in counts])


def _of_method(method: str, methods: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without the settings that only another of the methods has."""
    foreign = {name for other in methods for name in used_by(other, options)} - used_by(method, options).keys()
    return {name: value for name, value in options.items() if name not in foreign}


def clamp_points(
    grid: Sequence[float] = CLAMPS, method: str = "jeep", region: str = "high", **options: Any
) -> list[Point]:
    """One point a clamp ratio γ: the most that a wanted value may move, as a part of its own norm (JEEP, eq. 12).

    Args:
        region: `high` is JEEP's second region (`clamp_norm_factor_high`); `low` its first, and that of every other
            method (`clamp_norm_factor`).

    Raises:
        KtError: a γ that is not above zero, or a region that the method does not have.
    """
    if region not in ("low", "high"):
        raise KtError(f"region {region!r} is unknown; choose low or high")
    if region == "high" and method != "jeep":
        raise KtError(f"{method} has no high region; sweep its clamp with region low, or use jeep")
    if wrong := [g for g in grid if not g > 0]:
        raise KtError(f"clamp {wrong[0]:g} lets no value move; give numbers above 0")
    name = "clamp_norm_factor_high" if region == "high" else "clamp_norm_factor"
    _refuse_swept(name, options)
    return _checked([Point(f"{g:g}", g, {"method": method, **options, name: g}, method) for g in grid])


def module_points(alpha: float, method: str = "intattn", **options: Any) -> list[Point]:
    """MLP alone (α = 0), attention alone (α = 1), both (supplement B.2), and the control of both: their MLP part.

    Raises:
        KtError: a method that writes no attention, or an α that leaves a module out.
    """
    if not method_named(method).writes_attention:
        raise KtError(f"{method} writes no attention; a comparison of modules needs intattn or intattn-rome")
    if not 0 < alpha < 1:
        raise KtError(f"alpha {alpha:g} leaves one module out; a comparison of modules needs one between 0 and 1")
    _refuse_swept("alpha", options)
    shares = {MLP_ONLY: 0.0, ATTN_ONLY: 1.0, JOINT: alpha, MLP_PART: alpha}
    return [
        Point(name, index, {"method": method, **options, "alpha": share}, method, control=name == MLP_PART)
        for index, (name, share) in enumerate(shares.items())
    ]


def _refuse_swept(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a value of what the grid sets: no point would have it."""
    if given := [other for other, value in options.items() if plain_name(other) == name and value is not None]:
        raise KtError(f"{given[0]} is what is swept, and the grid names its values; leave it out")


def _checked(points: list[Point]) -> list[Point]:
    seen = set()
    for point in points:
        if (point.series, point.label) in seen:
            raise KtError(f"the grid names {point.label} twice; name each setting once")
        seen.add((point.series, point.label))
    return points


def check_points(points: Sequence[Point], n_facts: int, seeds: Sequence[int] = (0,)) -> None:
    """Refuse what no sweep can be of.

    Raises:
        KtError: no points or seeds, a seed named twice or below 0, or a point that asks for more facts than there are.
    """
    if not points:
        raise KtError("a sweep needs at least one point; the grid is empty")
    if not seeds or len(set(seeds)) < len(seeds):
        raise KtError(f"seeds {list(seeds)}: give at least one, each once")
    if min(seeds) < 0:
        raise KtError(f"seeds {list(seeds)}: {min(seeds)} is below 0; give whole numbers from 0")
    most = max(point.edits or 1 for point in points)
    if most > n_facts:
        raise KtError(f"a point edits {most} facts, and there are {n_facts}; give more facts or a smaller grid")
