"""Each block must add its attention's and its MLP's value to the residual stream, and no more.

Experts beside a shared one, a second mixer beside the attention or a norm over the sum pass for a dense block where
only its modules are looked at. The numbers of one forward of two tokens tell: what they leave unexplained is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UnknownModel
from .finding import experts, linear_maps
from .layout import Layout, unwrap_tuple
from .sites import Kind
from .validation import call_order, ordinary_tokens, validate_ends


def settle(model: Any) -> Layout:
    """The layout with the norms behind the projections, if blocks and ends are what it takes them for.

    Where the weights are not all on devices here nothing is run, and `unchecked` says why. It also says where rounding
    alone may be as large as the whole change of a block, so that anything would pass.

    Args:
        model: A TracedModel under construction, its layout validated.

    Raises:
        UnknownModel: a block's change of the residual stream is not explained, or embedding, final norm or head is
            another module; the message says what was found where.
    """
    layout: Layout = model.layout
    if model.remote:
        return replace(layout, unchecked="its weights are not here")
    if any(weight.is_meta for weight in model.module.parameters()):
        return replace(layout, unchecked="some of its weights are not on a device")
    blocks: list[Explained] = model.explained
    missing = {layer: block for layer, block in enumerate(blocks) if not block.whole and block.is_finite}
    if missing:
        raise UnknownModel(_unexplained(model, missing))
    validate_ends(model)
    layout = replace(layout, has_post_norm=any(norm for block in blocks for norm in block.norms))
    blind = [layer for layer, block in enumerate(blocks) if 2 * block.sharpest >= 1]
    if blind:
        kind = str(model.dtype).removeprefix("torch.")
        what = f"the rounding of {kind} exceeds what {len(blind)} of {len(blocks)} blocks change; load in float32"
        return replace(layout, unchecked=what)
    return layout


def _unexplained(model: Any, missing: Mapping[int, Explained]) -> str:
    """Which blocks hold something else, how much, and what there is in them."""
    layout: Layout = model.layout
    layer = max(missing, key=lambda layer: missing[layer].residual)
    worst, block = missing[layer], model.module.get_submodule(layout.path(Kind.RESID, layer))
    parts = layout.at(layer)
    inside = experts(block) if parts.mixture is None else None
    if inside is not None:
        what = f"{inside} beside {parts.w_mlp}, which is what a shared expert is"
    else:
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in block.named_children())
        what = f"the block ({type(block).__name__}) holds {children}"
    if worst.idle:
        return (
            f"{type(model.module).__name__} is not a decoder that kt can read: in {layout.blocks}.{layer} "
            f"the output of {', '.join(worst.idle)} does not reach the residual stream, where the block "
            f"({type(block).__name__}) is taken to add it; docs/reliability.md lists the kinds of models that can be"
        )
    return (
        f"{type(model.module).__name__} is not a decoder that kt can read: in {len(missing)} of {layout.n_layers} "
        f"blocks {parts.w_attn} and {parts.w_mlp} do not make the whole change of the residual stream. In "
        f"{layout.blocks}.{layer} {worst.residual:.1%} of it is not theirs (rounding: {worst.rounding:.1g}): {what}. "
        "Only a part of such a block would be read and edited; "
        "docs/reliability.md lists the kinds of models that can be"
    )


class Explained(NamedTuple):
    """How much of one block's change of the residual stream its attention and MLP explain.

    Attributes:
        residual: ‖(output - input) - (s_attn · f(attention) + s_mlp · g(MLP))‖ / ‖output - input‖ of the worst token, 0
            where nothing is missing; f and g are the norms found behind W_o and down_proj, or the identity.
        rounding: The part of `residual` that rounding alone can leave: the dtype's eps times the largest norm of the
            residual stream before, in and after the block, / ‖output - input‖. In bfloat16 a small missing part hides
            below it; load the model in float32 for a sharp answer.
        scales: s_attn and s_mlp, one for each of the block's parts (`Parts.ends`), by least squares: 1 in most
            families, the residual multiplier in Granite.
        norms: Paths of f and g inside the block; None for the identity.
        sharpest: `rounding` of the token where it is least.
        idle: Paths of parts that add nothing, though their outputs are well above the rounding: they go elsewhere.
    """

    residual: float
    rounding: float
    scales: tuple[float, ...]
    norms: tuple[str | None, ...]
    sharpest: float
    idle: tuple[str, ...] = ()

    @property
    def is_finite(self) -> bool:
        """No number is NaN or infinite; where one is, nothing can be said."""
        return math.isfinite(self.residual) and math.isfinite(self.rounding)

    @property
    def whole(self) -> bool:
        """Nothing is missing but rounding, and every part adds something."""
        return self.residual <= 2 * self.rounding + 1e-12 and not self.idle


def explained(model: Any) -> list[Explained]:
    """Check by running two tokens that each block adds to its input its attention's and its MLP's value, and no more.

    Experts, a second mixer or a norm over the sum leave a residual: such a block is not what the layout takes it for.

    Args:
        model: A TracedModel.

    Returns:
        One result a block, first to last.
    """
    layout: Layout = model.layout
    blocks = [model.module.get_submodule(layout.path(Kind.RESID, layer)) for layer in range(layout.n_layers)]
    ends = [tuple(layout.at(layer).ends.values()) for layer in range(layout.n_layers)]
    modules = {
        f"{layout.blocks}.{layer}.{path}": module
        for layer, block in enumerate(blocks)
        for path, module in block.named_modules()
        if path in ends[layer] or ("." not in path and not linear_maps(module) and not list(module.children()))
    }
    order = call_order(model, modules, blocks[-1])
    by_block = [
        (model.block(layer), [model.envoy(p) for p in order if p.startswith(f"{layout.blocks}.{layer}.")])
        for layer in range(layout.n_layers)
    ]
    ids = ordinary_tokens(model)
    with torch.no_grad(), model.root.trace(input_ids=ids, use_cache=False, backend=model.backend()) as tracer:
        seen: Any = []
        for block, inner in by_block:
            streams = [block.input.clone()]
            around = []
            for envoy in inner:
                given, gives = envoy.input, envoy.output
                around.append((given.clone(), unwrap_tuple(gives).clone()))
            streams.append(unwrap_tuple(block.output).clone())
            seen.append((streams, around))
        seen.save()
        tracer.stop()
    found = []
    for layer, (streams, around) in enumerate(seen):
        prefix = f"{layout.blocks}.{layer}."
        names = [p.removeprefix(prefix) for p in order if p.startswith(prefix)]
        found.append(_explained_block(ends[layer], streams, dict(zip(names, around, strict=True))))
    return found


def _explained_block(
    ends: tuple[str, ...],
    streams: Sequence[Float[Tensor, "1 2 d_model"]],
    around: Mapping[str, tuple[Tensor, Tensor]],
) -> Explained:
    """One block from its input and output, and the inputs and outputs of its projections, norms and dropouts."""
    before, after = (stream.double().flatten(0, -2) for stream in streams)
    parts, norms = [], []
    for path in ends:
        value, norm = around[path][1].double().flatten(), None
        for name, (given, gives) in around.items():  # in the order of the forward: a dropout comes before its norm
            if name not in ends and torch.equal(given.double().flatten(), value):
                norm = norm if torch.equal(gives, given) else name
                value = gives.double().flatten()
        parts.append(value.view_as(before))
        norms.append(norm)
    change, columns = after - before, torch.stack(parts, -1)
    if not (change.isfinite().all() and columns.isfinite().all()):
        return Explained(math.nan, math.nan, (math.nan,) * len(ends), tuple(norms), math.nan)
    # By token: a first token may be a thousand times as long as others, and its rounding would hide what they miss.
    largest = torch.stack([stream.norm(dim=-1) for stream in (before, before + parts[0], after)]).amax(0)
    noise = (torch.finfo(streams[0].dtype).eps * largest).clamp(min=1e-300)
    weighted = columns / noise[:, None, None], change / noise[:, None]
    scales = torch.linalg.lstsq(weighted[0].flatten(0, 1), weighted[1].flatten()[:, None]).solution[:, 0]
    added = (columns.norm(dim=1) / noise[:, None]).amax(0)
    shares = zip(ends, scales.tolist(), added.tolist(), strict=True)
    idle = [path for path, scale, size in shares if abs(scale) < IDLE < size * IDLE**2]
    left, size = (change - columns @ scales).norm(dim=-1), change.norm(dim=-1) + 1e-300
    worst = int((left / noise).argmax())
    return Explained(
        float(left[worst] / size[worst]),
        float(noise[worst] / size[worst]),
        tuple(scales.tolist()),
        tuple(norms),
        float((noise / size).min()),
        tuple(idle),
    )


IDLE = 0.01
"""A part whose factor is below this adds nothing; Granite's residual multiplier is 0.22."""
