"""From a wanted change of the residual stream to the change of a projection's output that makes it, and from a value
that was searched for before a norm to one of the output's own length.

Gemma 2 and 3 and OLMo 2 put a norm N between W_o or down_proj and the residual stream, Granite a multiplier s: there,
an output o is added as s·N(o). With m the mean of o where N subtracts it (LayerNorm) and 0 where it does not (RMSNorm),
and v = o - m,

    N(o) = b + g ⊙ v / sqrt(mean(v²) + ε)

so N fixes the length of what is added, and on the sphere of v's own length N is *linear*: h = s·g / sqrt(mean(v²) + ε)
is constant there, whatever ε. An output of the same mean and length, o + d = m + v′, therefore changes the stream by
exactly h ⊙ (v′ - v), and the norm can make a wanted change t if some v′ of v's length has h ⊙ (v′ - v) = t. Asked for

    min over ‖v′‖ = ‖v‖ of  ‖h ⊙ (v′ - v) - t‖² + κ ‖v′ - v‖²                                                 (1)

it is a least-squares problem on a sphere, solved by v′ = ((h² + κ) v + h t) / (h² + κ + μ), elementwise, with μ the one
root of ‖v′‖ = ‖v‖ above -min(h² + κ). κ > 0 keeps small gains from asking for large changes: a dead one keeps its part
of v. (1) is repeated from its own solution, with κ as it was (iterated Tikhonov regularisation): a change that the norm
can make is met to rounding where h² is well above κ. ‖d‖ is at most 2 ‖v‖ whatever is wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ...errors import KtError
from ...model.sites import Kind, Site

if TYPE_CHECKING:
    from ...model.model import TracedModel


class Norm(NamedTuple):
    """N(o) = bias + gain ⊙ v / sqrt(mean(v²) + ε), where v is o, less its mean if `centred`."""

    gain: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]
    centred: bool


class OutputChange(NamedTuple):
    """A projection's change, and the residual stream's change that it makes: (d, fact), float64."""

    output: Float[Tensor, "d fact"]
    stream: Float[Tensor, "d fact"]


DAMPING = 0.01
"""κ of (1), relative to the median of h² over the gains that are not zero."""
ROUNDS = 8
"""How often (1) is solved from its own solution."""


def change_of_output(
    model: TracedModel, site: Site, now: Float[Tensor, "d fact"], wanted: Float[Tensor, "d fact"]
) -> OutputChange:
    """The change of a projection's output that changes the residual stream by `wanted`, or by as much of it as can be.

    Args:
        model: The model, as the layers below left it.
        site: W_o or down_proj of a layer. Another map's output is taken to be added as it is.
        now: The map's output for every fact.
        wanted: The wanted change of the residual stream.

    Returns:
        `wanted` itself, twice, where the block adds the output as it is.
    """
    scale, norm = _behind(model, site)
    if norm is None:
        return OutputChange(wanted if scale == 1 else wanted / scale, wanted)
    return through_norm(norm, now, wanted, scale)


def of_own_length(
    model: TracedModel, site: Site, now: Float[Tensor, "d fact"], change: Float[Tensor, "d fact"]
) -> Float[Tensor, "d fact"]:
    """A change of a projection's output of which its norm makes the same as of `change`, at the output's own length.

    N(c v) = N(v) for every c > 0, but for ε: a search that adds δ to an output before a norm may make it as long as it
    likes, and the weight would have to write that length. Of all those outputs the one of v's own length is taken.

    Args:
        model: The model, as the layers below left it.
        site: The projection whose output is searched for.
        now: Its output for every fact.
        change: The change of it that was found.

    Returns:
        `change` itself where the block adds the output as it is, where the module between is not known to be such a
        norm, and for outputs of length zero.
    """
    norm = _behind(model, site)[1]
    form = None if norm is None else _form(norm, len(now))
    return change if form is None else same_direction(now, change, form.centred)


def same_direction(
    now: Float[Tensor, "d fact"], change: Float[Tensor, "d fact"], centred: bool = False
) -> Float[Tensor, "d fact"]:
    """The change that leaves v = now (less its mean, if `centred`) its length and turns it as `change` does."""

    def without_mean(output: Float[Tensor, "d fact"]) -> Float[Tensor, "d fact"]:
        return output - output.mean(0, keepdim=True) if centred else output

    start, end = without_mean(now), without_mean(now + change)
    length, longer = start.norm(dim=0), end.norm(dim=0)
    ratio = length / longer.clamp_min(torch.finfo(now.dtype).tiny)
    return torch.where((length > 0) & (longer > 0), ratio * end - start, change)


def added(model: TracedModel, site: Site, output: Float[Tensor, "d fact"]) -> Float[Tensor, "d fact"]:
    """What the block adds to the residual stream for an output of the projection."""
    scale, norm = _behind(model, site)
    return scale * (output if norm is None else _evaluated(norm, output.T).T)


def passes_norm(model: TracedModel, site: Site) -> bool:
    """Whether a norm stands between a projection and the residual stream."""
    return _behind(model, site)[1] is not None


def through_norm(
    norm: nn.Module, now: Float[Tensor, "d fact"], wanted: Float[Tensor, "d fact"], scale: float = 1.0
) -> OutputChange:
    """`change_of_output` for a norm whose output is multiplied by `scale`.

    Raises:
        KtError: the module is not a norm over the last dimension with a gain an element.
    """
    form = read_norm(norm, len(now))
    gain = (scale * form.gain).to(now)[:, None]
    mean = now.mean(0, keepdim=True) if form.centred else torch.zeros_like(now[:1])
    start = now - mean
    # h from the module itself: what it makes of this output, whatever its ε.
    unit = (_evaluated(norm, now.T).T - form.bias.to(now)[:, None]) * scale
    slope = (unit * gain * start).sum(0) / (gain * start).square().sum(0).clamp_min(torch.finfo(now.dtype).tiny)
    slopes = gain * slope
    end = on_sphere(start, slopes, wanted, form.centred)
    return OutputChange(end - start, slopes * (end - start))


def on_sphere(
    start: Float[Tensor, "d fact"],
    slopes: Float[Tensor, "d fact"],
    wanted: Float[Tensor, "d fact"],
    centred: bool = False,
    damping: float = DAMPING,
    rounds: int = ROUNDS,
) -> Float[Tensor, "d fact"]:
    """v′ of (1): of v's length (and mean zero, where v is `centred`), with h ⊙ (v′ - v) near the wanted change.

    Args:
        start: v.
        slopes: h.
        wanted: t.
        centred: v′ is to have mean zero, as v has.
        damping: κ over the median of h² of the gains that are not zero.
        rounds: how often (1) is solved, each time from its own solution.
    """
    squares = slopes.square()
    live = torch.where(squares > 0, squares, torch.nan).nanmedian(0).values.nan_to_num(1.0)
    weight = squares + damping * live
    end, goal = start, slopes * (slopes * start + wanted)
    for _ in range(rounds):
        end = _on_sphere(goal + damping * live * end, weight, start.norm(dim=0), centred)
    return end


def _on_sphere(
    target: Float[Tensor, "d fact"], weight: Float[Tensor, "d fact"], length: Float[Tensor, " fact"], centred: bool
) -> Float[Tensor, "d fact"]:
    """target / (weight + μ), with the μ above -min(weight) that gives it its length.

    Its length falls as μ grows. At the upper end of the bracket ‖target‖ / (min(weight) + μ) = length, at the lower end
    the smallest weight vanishes. Where `centred`, the mean is taken out by a multiplier of its own.
    """
    least = weight.amin(0)
    low, high = torch.zeros_like(length), target.norm(dim=0) / length.clamp_min(torch.finfo(length.dtype).tiny)

    def at(shift: Float[Tensor, " fact"]) -> Float[Tensor, "d fact"]:
        inverse = 1 / (weight + (shift - least))
        value = target * inverse
        return value - inverse * (value.sum(0) / inverse.sum(0)) if centred else value

    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        long = at(middle).norm(dim=0) > length
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    value = at(high)
    return torch.where(length > 0, value * (length / value.norm(dim=0)), 0.0)  # an output of zero has no direction


BISECTIONS = 64
"""Halvings of μ's bracket: to float64's last digit, also where the root is 1e-12 of the bracket."""


def read_norm(norm: nn.Module, size: int) -> Norm:
    """Gain, bias and whether the mean is subtracted, from what the module makes of a few inputs.

    Raises:
        KtError: the numbers are not those of such a norm.
    """
    if (form := _form(norm, size)) is None:
        raise KtError(
            f"{type(norm).__name__} stands between a projection and the residual stream and is neither RMSNorm nor "
            "LayerNorm; use a method that aims at the projection's own output (rome, pmet)"
        )
    return form


def _form(norm: nn.Module, size: int) -> Norm | None:
    """`read_norm`, or None where the numbers are not those of such a norm."""
    signs = torch.ones(size, dtype=torch.float64)
    signs[1::2] = -1
    probe = torch.linspace(1, 2, size, dtype=torch.float64) * signs
    probe = probe - probe.mean()
    probe = LARGE * probe / probe.square().mean().sqrt()
    plus, minus, shifted = _evaluated(norm, torch.stack([probe, -probe, probe + LARGE]))
    bias = (plus + minus) / 2
    gain = LARGE * (plus - bias) / probe
    centred = bool((shifted - plus).norm() <= (shifted - (bias + gain * (probe + LARGE) / (2**0.5 * LARGE))).norm())
    form = Norm(gain, bias, centred)
    test = torch.randn(4, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    moved = LARGE * (test - test.mean(1, keepdim=True) if centred else test)
    expected = bias + gain * moved / moved.square().mean(1, keepdim=True).sqrt()
    known = (_evaluated(norm, LARGE * test) - expected).norm() <= 1e-3 * expected.norm()
    return form if known else None


LARGE = 1e4
"""Root mean square of the inputs that a norm is read with: its ε, 1e-5 and less, is lost beside the square."""


def _evaluated(norm: nn.Module, inputs: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """The module's output in float64 (as far as it computes in it itself)."""
    own = {name: tensor.double() for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]}
    device = next((tensor.device for tensor in own.values() if not tensor.is_meta), inputs.device)  # meta: offloaded
    return functional_call(norm, own, (inputs.double().to(device),)).double().to(inputs.device)


def _behind(model: TracedModel, site: Site) -> tuple[float, nn.Module | None]:
    """The factor and the norm that a projection's output passes on its way to the residual stream."""
    ends = [*model.layout.at(site.layer).ends]
    if model.layout.direct or site.name not in ends:
        return 1.0, None
    block = model.explained[site.layer]
    index = ends.index(site.name)
    path, scale = block.norms[index], block.scales[index]
    if not block.whole or abs(scale - 1) < SAME_SCALE:
        scale = 1.0
    parent = model.module.get_submodule(model.layout.path(Kind.RESID, site.layer))
    return scale, None if path is None else parent.get_submodule(path)


SAME_SCALE = 1e-2
"""A factor this near to one is one: it is a least-squares estimate, in bfloat16 off by so much."""
