"""Find a decoder's parts by their shapes and roles, not by the name of its family.

`find_layout` looks for a list of `num_hidden_layers` blocks; in every block one module that takes an attention mask
and, inside it, the last linear map onto the residual stream (W_o); outside it, the last linear map onto the residual
stream (down_proj). `validate` then runs two tokens through the model. It checks that the parts found are what they are
taken for, and gives the other linear maps of attention and MLP their roles (see `_roles`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnknownModel, UnknownSite
from .devices import execution_device
from .sites import OUTPUT, Kind, Site

W_ATTN, W_MLP = (f"{kind}.{role}" for kind, role in OUTPUT.items())


@dataclass(frozen=True)
class Layout:
    """Where the parts are (module paths), and how a block combines them.

    `linears` names every linear map of a block's attention and MLP: role -> module path inside the block, in the order
    of a forward pass. Roles: `attn.q_proj`, `attn.k_proj`, `attn.v_proj`, `attn.o_proj` (W_o), `mlp.gate_proj`,
    `mlp.up_proj`, `mlp.down_proj`, each where the numbers decide it. Any other map keeps the name of its own module:
    the fused ones (`attn.c_attn`, `attn.query_key_value`, `attn.qkv_proj`, `mlp.gate_up_proj`) and those whose role is
    not clear.
    """

    blocks: str
    attn: str
    mlp: str
    linears: Mapping[str, str] = field(hash=False)
    embed: str
    norm: str | None
    unembed: str
    n_layers: int
    d_model: int
    transposed: bool = False  # Conv1D keeps its weight as (d_in, d_out)
    parallel: bool = False  # attention and MLP read the same input (GPT-J, NeoX, Phi)
    has_post_norm: bool = False  # a norm stands between a module's value and the residual stream
    tuple_output: bool = False

    @property
    def w_attn(self) -> str:
        """Path of W_o inside a block."""
        return self.linears[W_ATTN]

    @property
    def w_mlp(self) -> str:
        """Path of down_proj inside a block."""
        return self.linears[W_MLP]

    def path(self, kind: Kind | Site, layer: int | None = None) -> str:
        """Module path of a site's linear map, or of the whole block for the residual stream.

        Args:
            kind: A site, or a kind with its `layer`.

        Raises:
            UnknownSite: a block has no such linear map.
        """
        site = kind if isinstance(kind, Site) else Site(kind, int(layer or 0))
        block = f"{self.blocks}.{site.layer}"
        return block if site.kind is Kind.RESID else f"{block}.{self.linears[self.role(site.name)]}"

    def role(self, name: str) -> str:
        """The role of a linear map.

        Args:
            name: Its role (`mlp.up_proj`), its own name in its part (`mlp.c_fc`), or its path inside the block
                (`self_attn.q_proj`).

        Raises:
            UnknownSite: a block has no such linear map; the message lists those that it has.
        """
        if name in self.linears:
            return name
        known = {path: role for role, path in self.linears.items()}
        known |= {_own_name(self, role, path): role for role, path in self.linears.items()}
        if name in known:
            return known[name]
        near = get_close_matches(name, [*self.linears, *known], 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UnknownSite(f"a block has no linear map {name!r}; {hint}It has {', '.join(self.linears)}")

    def describe(self) -> str:
        """One line that names what was found."""
        order = "parallel attention and MLP" if self.parallel else "attention, then MLP"
        norm = ", a norm after each" if self.has_post_norm else ""
        return (
            f"{self.n_layers} blocks at {self.blocks} ({order}{norm}), W_o = {self.w_attn}, "
            f"down_proj = {self.w_mlp}, d_model {self.d_model}"
        )


def find_layout(module: nn.Module) -> Layout:
    """Locate blocks, linear maps, embedding, final norm and unembedding.

    Returns:
        The layout by structure alone: of the linear maps only W_o and down_proj have their roles, the others their
        own names.

    Raises:
        UnknownModel: a part is missing; the message lists what was looked for.
    """
    config = module.config.get_text_config()  # type: ignore[union-attr,operator]
    n_layers, d_model = int(config.num_hidden_layers), int(config.hidden_size)
    names = {id(m): name for name, m in module.named_modules()}
    blocks_name, blocks = _blocks(module, n_layers)
    block = blocks[0]
    attn = _attention(block) or _missing(module, "a block's attention: a child whose forward takes attention_mask")
    w_attn = _last_linear(attn[1], d_model) or _missing(module, "W_o: a linear map onto d_model inside the attention")
    outside = [(n, m) for n, m in _linears(block) if not n.startswith(attn[0] + ".")]
    onto = [(n, m) for n, m in outside if linear_shape(m)[0] == d_model]
    if not onto or any(part.isdigit() for part in onto[-1][0].split(".")):
        _missing(
            module,
            "down_proj: one linear map onto d_model outside the attention (mixtures of experts have many)",
        )
    w_mlp_name, w_mlp = onto[-1]
    embed, head = module.get_input_embeddings(), module.get_output_embeddings()  # type: ignore[operator]
    if embed is None or head is None:
        _missing(module, "token embedding and unembedding (get_input_embeddings, get_output_embeddings)")
    layout = Layout(
        blocks=blocks_name,
        attn=attn[0],
        mlp=w_mlp_name.rpartition(".")[0] or w_mlp_name,
        linears={W_ATTN: f"{attn[0]}.{w_attn[0]}", W_MLP: w_mlp_name},
        embed=names[id(embed)],
        norm=_final_norm(module, blocks_name, d_model),
        unembed=names[id(head)],
        n_layers=n_layers,
        d_model=d_model,
        transposed=isinstance(w_mlp, Conv1D),
    )
    _same_in_every_block(module, blocks, layout)
    return replace(layout, linears=_own_names(layout, [name for name, _ in _linears(block)]))


def validate(model: Any) -> Layout:
    """Check by running two tokens that W · key + b is each module's whole output, and see how a block is built.

    Args:
        model: A TracedModel under construction.

    Returns:
        The layout with `parallel`, `has_post_norm`, `tuple_output` and the roles of all linear maps set.

    Raises:
        UnknownModel: a module's output is not that of the linear map found.
    """
    layout: Layout = model.layout
    ids = torch.tensor([[1, 2]], device=model.device) % model.vocab_size
    block, attn, mlp = model.block(0), model.envoy(f"{layout.blocks}.0.{layout.attn}"), None
    if layout.mlp != layout.w_mlp:
        mlp = model.envoy(f"{layout.blocks}.0.{layout.mlp}")
    w_attn, w_mlp = model.projection(Kind.ATTN, 0), model.projection(Kind.MLP, 0)
    with torch.no_grad():
        with model.root.trace(input_ids=ids, use_cache=False, backend=model.backend()) as tracer:
            seen: Any = {"in": block.input}
            seen["a"] = w_attn.output
            seen["attn"] = attn.output
            seen["m_key"] = w_mlp.input
            seen["m"] = w_mlp.output
            if mlp is not None:
                seen["mlp"] = mlp.output
            seen["out"] = block.output
            seen.save()
            tracer.stop()
        with model.root.trace(input_ids=ids, use_cache=False, backend=model.backend()) as tracer:
            w_attn.output[:] = 0
            key_cut: Any = w_mlp.input.save()
            tracer.stop()
    out = unwrap_tuple(seen["out"])
    if not torch.equal(unwrap_tuple(seen["attn"]), seen["a"]):
        _missing(model.module, f"an attention whose output is that of {layout.w_attn}")
    if mlp is not None and not torch.equal(unwrap_tuple(seen["mlp"]), seen["m"].view_as(unwrap_tuple(seen["mlp"]))):
        _missing(model.module, f"an MLP whose output is that of {layout.w_mlp}")
    total = seen["in"] + seen["a"] + seen["m"].view_as(out)
    scale = float(out.float().abs().max()) + 1e-6
    return replace(
        layout,
        linears=_roles(model),
        parallel=torch.equal(seen["m_key"], key_cut),
        has_post_norm=not bool((total - out).float().abs().max() <= 2e-2 * scale),
        tuple_output=isinstance(seen["out"], tuple),
    )


def _roles(model: Any) -> dict[str, str]:
    """Roles of the linear maps, by what each does to the key of W_o or down_proj.

    One forward of two tokens, with a row for each map. In its row the map's output at the first token, where attention
    sees that token alone, is multiplied by -8 (exact in floating point):

        v_proj     the first key of W_o becomes -8 times itself: attention is linear in v
        k_proj     the first key stays, the second changes: its query weighs the two tokens anew
        q_proj     both keys stay: with one token to see there is nothing to weigh
        up_proj    the first key of down_proj becomes -8 times itself: the product is linear in up
        gate_proj  the other of two maps of the same width: its activation is not linear

    A single map before down_proj is `up_proj`. Fused maps are wider than the key. Unless every map of a part (W_o and
    down_proj apart) has a role of its own by these rules, all keep the names of their modules.
    """
    layout: Layout = model.layout
    paths = _forward_order(model, layout)
    ends = {layout.w_attn: Kind.ATTN, layout.w_mlp: Kind.MLP}
    points = [(model.envoy(f"{layout.blocks}.0.{path}"), path in ends, row) for row, path in enumerate(paths, 1)]
    ids = torch.tensor([[1, 2]], device=model.device) % model.vocab_size
    rows = len(paths) + 1
    with torch.no_grad():
        trace = model.root.trace(input_ids=ids.repeat(rows, 1), use_cache=False, backend=model.backend())
        with trace as tracer:
            keys: Any = []
            for envoy, is_end, row in points:
                if is_end:
                    keys.append(envoy.input.reshape(rows, 2, -1).clone())
                else:
                    envoy.output.view(rows, 2, -1)[row, 0] *= -8
            keys.save()
            tracer.stop()
    own, roles = _own_names(layout, paths), dict[str, str]()
    block = model.module.get_submodule(f"{layout.blocks}.0")
    for end, key in zip(filter(ends.__contains__, paths), keys, strict=True):
        part = {path: role for role, path in own.items() if role.startswith(f"{ends[end]}.")}
        effects = {
            path: _Effect.of(key[0], key[row])
            for row, path in enumerate(paths, 1)
            if path in part and path != end and linear_shape(block.get_submodule(path))[0] <= key.shape[-1]
        }
        found = _attention_roles(effects) if ends[end] is Kind.ATTN else _mlp_roles(effects)
        clear = len(set(found.values())) == len(part) - 1
        roles |= part | ({path: f"{ends[end]}.{role}" for path, role in found.items()} if clear else {})
    return {roles[path]: path for path in paths if path in roles}


class _Effect(NamedTuple):
    """Effect on the keys of two tokens of a change of a map at the first: which keys moved, and if the first one became
    -8 times itself."""

    first: bool
    second: bool
    scaled: bool

    @classmethod
    def of(cls, before: Float[Tensor, "2 d_key"], after: Float[Tensor, "2 d_key"]) -> _Effect:
        tolerance = max(4 * torch.finfo(before.dtype).eps, 1e-4) * before.double().abs().amax(1)
        first, second = ((after.double() - before.double()).abs().amax(1) > tolerance).tolist()
        scaled = (after[0].double() + 8 * before[0].double()).abs().max() <= 8 * tolerance[0]
        return cls(first, second, bool(scaled))


def _attention_roles(effects: Mapping[str, _Effect]) -> dict[str, str]:
    by_effect = {(True, True): "v_proj", (False, True): "k_proj", (False, False): "q_proj"}
    found = {path: by_effect.get((e.first, e.second)) for path, e in effects.items() if e.scaled or not e.first}
    return {path: role for path, role in found.items() if role}


def _mlp_roles(effects: Mapping[str, _Effect]) -> dict[str, str]:
    if len(effects) == 1:
        return dict.fromkeys(effects, "up_proj")
    if len(effects) == 2 and sum(e.scaled for e in effects.values()) == 1:
        return {path: "up_proj" if e.scaled else "gate_proj" for path, e in effects.items()}
    return {}


class _Stop(Exception):
    """Ends a forward pass after the first block."""


def _forward_order(model: Any, layout: Layout) -> list[str]:
    """Paths of the linear maps in the order in which a block runs them; left out are those that do not see every token
    once (unused ones, experts)."""
    block = model.module.get_submodule(f"{layout.blocks}.0")
    modules = {path: block.get_submodule(path) for path in layout.linears.values()}
    return _call_order(model, modules, block)


def _call_order(model: Any, modules: Mapping[str, nn.Module], last: nn.Module) -> list[str]:
    """Names of the modules that see each of two tokens once, in the order of a plain forward that ends at `last`.

    A structure without weights runs on the meta device. Where its mask cannot be made there, all names stay as given.
    """
    device = execution_device(model.module.get_input_embeddings())
    ids = torch.ones((1, 2), dtype=torch.long, device=device)
    on_meta = device.type == "meta"
    for mask in [torch.zeros((1, 1, 2, 2), device=device), None] if on_meta else [torch.ones_like(ids)]:
        seen: list[tuple[str, int]] = []

        def note(name: str, seen: list[tuple[str, int]] = seen) -> Any:
            return lambda _module, _inputs, output: seen.append((name, unwrap_tuple(output).shape[:-1].numel()))

        def stop(*_: Any) -> None:
            raise _Stop

        handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
        handles.append(last.register_forward_hook(stop))
        try:
            with torch.no_grad():
                model.module(input_ids=ids, attention_mask=mask, use_cache=False)
        except _Stop:
            calls = Counter(name for name, _ in seen)
            return [name for name, tokens in seen if tokens == ids.numel() and calls[name] == 1]
        except (RuntimeError, ValueError):
            if not on_meta:
                raise
        finally:
            for handle in handles:
                handle.remove()
    return list(modules)


class Explained(NamedTuple):
    """How much of one block's change of the residual stream its attention and MLP explain.

    Attributes:
        residual: ‖(output - input) - (s_attn · f(attention) + s_mlp · g(MLP))‖ / ‖output - input‖, 0 where nothing is
            missing; f and g are the norms found behind W_o and down_proj, or the identity.
        rounding: The part of `residual` that rounding alone can leave: the dtype's eps times the largest norm of the
            residual stream before, in and after the block, / ‖output - input‖. In bfloat16 a small missing part hides
            below it; load the model in float32 for a sharp answer.
        scales: s_attn and s_mlp, by least squares: 1 in most families, the residual multiplier in Granite.
        norms: Paths of f and g inside the block; None for the identity.
    """

    residual: float
    rounding: float
    scales: tuple[float, float]
    norms: tuple[str | None, str | None]

    @property
    def whole(self) -> bool:
        """Nothing is missing but rounding."""
        return self.residual <= 2 * self.rounding + 1e-12


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
    linear = {layout.w_attn, layout.w_mlp}
    modules = {
        f"{layout.blocks}.{layer}.{path}": module
        for layer, block in enumerate(blocks)
        for path, module in block.named_modules()
        if path in linear or ("." not in path and not _linears(module) and not list(module.children()))
    }
    order = _call_order(model, modules, blocks[-1])
    by_block = [
        (model.block(layer), [model.envoy(p) for p in order if p.startswith(f"{layout.blocks}.{layer}.")])
        for layer in range(layout.n_layers)
    ]
    ids = torch.tensor([[1, 2]], device=model.device) % model.vocab_size
    with torch.no_grad(), model.root.trace(input_ids=ids, use_cache=False, backend=model.backend()) as tracer:
        seen: Any = []
        for block, inner in by_block:
            streams = [block.input.clone()]
            around = [(envoy.input.clone(), envoy.output.clone()) for envoy in inner]
            output = block.output
            streams.append((output[0] if isinstance(output, tuple) else output).clone())
            seen.append((streams, around))
        seen.save()
        tracer.stop()
    found = []
    for layer, (streams, around) in enumerate(seen):
        prefix = f"{layout.blocks}.{layer}."
        names = [p.removeprefix(prefix) for p in order if p.startswith(prefix)]
        found.append(_explained_block(layout, streams, dict(zip(names, around, strict=True))))
    return found


def _explained_block(
    layout: Layout, streams: Sequence[Float[Tensor, "1 2 d_model"]], around: Mapping[str, tuple[Tensor, Tensor]]
) -> Explained:
    """One block from its input and output, and the inputs and outputs of its projections, norms and dropouts."""
    before, after = (stream.double().flatten() for stream in streams)
    parts, norms = [], []
    for path in (layout.w_attn, layout.w_mlp):
        value, norm = around[path][1].double().flatten(), None
        for name, (given, gives) in around.items():  # in the order of the forward: a dropout comes before its norm
            if name not in (layout.w_attn, layout.w_mlp) and torch.equal(given.double().flatten(), value):
                norm = norm if torch.equal(gives, given) else name
                value = gives.double().flatten()
        parts.append(value)
        norms.append(norm)
    change, columns = after - before, torch.stack(parts, 1)
    scales = torch.linalg.lstsq(columns, change[:, None]).solution[:, 0]
    size = float(change.norm()) + 1e-300
    largest = max(float(stream.norm()) for stream in (before, before + columns[:, 0] * scales[0], after))
    return Explained(
        float((change - columns @ scales).norm()) / size,
        torch.finfo(streams[0].dtype).eps * largest / size,
        (float(scales[0]), float(scales[1])),
        (norms[0], norms[1]),
    )


def _own_names(layout: Layout, paths: list[str]) -> dict[str, str]:
    """Role -> path with the modules' own names, W_o and down_proj apart; maps outside attention and MLP left out."""
    ends = {path: role for role, path in ((W_ATTN, layout.w_attn), (W_MLP, layout.w_mlp))}
    whole = layout.mlp == layout.w_mlp  # OPT: fc1 and fc2 stand in the block itself
    found = {}
    for path in paths:
        if path in ends:
            found[ends[path]] = path
        elif path.startswith(layout.attn + "."):
            found[_own_name(layout, W_ATTN, path)] = path
        elif whole or path.startswith(layout.mlp + "."):
            found[_own_name(layout, W_MLP, path)] = path
    return found


def _own_name(layout: Layout, role: str, path: str) -> str:
    """A map by its module's own name in its part: `mlp.c_fc`."""
    kind = role.partition(".")[0]
    return f"{kind}.{path.removeprefix((layout.attn if kind == Kind.ATTN else layout.mlp) + '.')}"


def unwrap_tuple(output: Any) -> Any:
    """A module's tensor, whether it returns one or a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) from the module's type, never from a shape match."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def _blocks(module: nn.Module, n_layers: int) -> tuple[str, nn.ModuleList]:
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) == n_layers and _attention(child[0]):
            return name, child
    return _missing(module, f"a list of {n_layers} blocks (config.num_hidden_layers) with an attention each")


def _attention(block: nn.Module) -> tuple[str, nn.Module] | None:
    for name, child in block.named_modules():
        if name and "attention_mask" in inspect.signature(child.forward).parameters and _linears(child):
            inner = [n for n, m in child.named_modules() if n and "attention_mask" in _parameters(m)]
            return (name, child) if not inner else (f"{name}.{inner[-1]}", child.get_submodule(inner[-1]))
    return None


def _parameters(module: nn.Module) -> Any:
    return inspect.signature(module.forward).parameters


def _linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)]


def _last_linear(module: nn.Module, d_out: int) -> tuple[str, nn.Module] | None:
    onto = [(n, m) for n, m in _linears(module) if linear_shape(m)[0] == d_out]
    return onto[-1] if onto else None


def _final_norm(module: nn.Module, blocks: str, d_model: int) -> str | None:
    parent = blocks.rpartition(".")[0]
    names = []
    for name, child in module.get_submodule(parent).named_children():
        weight = getattr(child, "weight", None)
        if weight is not None and tuple(weight.shape) == (d_model,):
            names.append(f"{parent}.{name}" if parent else name)
    return names[-1] if names else None


def _same_in_every_block(module: nn.Module, blocks: nn.ModuleList, layout: Layout) -> None:
    for index, block in enumerate(blocks):
        present = {n for n, _ in _linears(block)}
        for part in (layout.w_attn, layout.w_mlp):
            if part not in present:
                _missing(module, f"{part} in block {index} (blocks of different kinds are not supported)")


def _missing(module: nn.Module, what: str) -> Any:
    raise UnknownModel(
        f"{type(module).__name__} is not a decoder that kt can read: did not find {what}. Looked for: a list of "
        "num_hidden_layers blocks; per block an attention with an output projection onto d_model and an MLP with "
        "a down projection onto d_model; token embedding and unembedding"
    )
