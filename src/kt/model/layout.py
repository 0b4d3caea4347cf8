"""Find a decoder's parts by their shapes and roles, not by the name of its family.

`find_layout` looks for a list of `num_hidden_layers` blocks; in every block one module that takes an attention mask
and, inside it, the last linear map onto the residual stream (W_o); outside it, the last linear map onto the residual
stream (down_proj). `validate` then runs two tokens through the model. It checks that the parts found are what they are
taken for, and gives the other linear maps of attention and MLP their roles (see `_roles`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._util.data import read_table
from ..errors import KtError, UnknownModel, UnknownSite
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
    direct: bool = True  # the values are added to the residual stream as they are, without a norm or a multiplier
    has_post_norm: bool = False  # a norm stands between a module's value and the residual stream
    tuple_output: bool = False
    unchecked: str | None = None  # why the blocks were not checked by numbers

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

    def parts(self) -> dict[str, str]:
        """The paths as `kt.load(layout=...)` takes them."""
        names = dict(blocks=self.blocks, attn=self.attn, o_proj=self.w_attn, mlp=self.mlp, down_proj=self.w_mlp)
        ends = dict(norm=self.norm, embed=self.embed, head=self.unembed)
        return {part: path for part, path in (names | ends).items() if path}

    def describe(self) -> str:
        """One line that names what was found."""
        order = "parallel attention and MLP" if self.parallel else "attention, then MLP"
        norm = ", a norm after each" if self.has_post_norm else "" if self.direct else ", scaled"
        return (
            f"{self.n_layers} blocks at {self.blocks} ({order}{norm}), W_o = {self.w_attn}, "
            f"down_proj = {self.w_mlp}, d_model {self.d_model}"
            + (f"; not checked by numbers, since {self.unchecked}" if self.unchecked else "")
        )


def find_layout(module: nn.Module, given: Mapping[str, str] | None = None) -> Layout:
    """Locate blocks, linear maps, embedding, final norm and unembedding.

    Args:
        module: A causal language model.
        given: Paths of parts that the caller names (see `read_layout`); the others are found.

    Returns:
        The layout by structure alone: of the linear maps only W_o and down_proj have their roles, the others their
        own names.

    Raises:
        UnknownModel: a part is missing, or not where `given` says; the message names it and what was looked for.
    """
    given = given or {}
    embed, head = (_end(module, given, part) for part in ("embed", "head"))
    blocks_name, blocks = _blocks(module, given, embed)
    block = blocks[0]
    config = module.config.get_text_config()  # type: ignore[union-attr,operator]
    d_model = int(getattr(config, "hidden_size", 0) or linear_shape(_named(module, block, given, "o_proj"))[0])
    for part, owner in (("attn", block), ("mlp", block), ("norm", module)):
        if part in given:
            _named(module, owner, given, part)
    if "o_proj" in given:
        _named(module, block, given, "o_proj")
        w_attn = given["o_proj"]
        attn = given.get("attn", w_attn.rpartition(".")[0] or w_attn)
    else:
        found = (given["attn"], block.get_submodule(given["attn"])) if "attn" in given else _attention(block)
        if found is None:
            return _missing(module, "attn", f"an attention in {_held(blocks_name, block)}")
        attn = found[0]
        last = _last_linear(found[1], d_model)
        if last is None:
            return _missing(module, "o_proj", f"a linear map onto d_model ({d_model}) inside {blocks_name}.0.{attn}")
        w_attn = f"{attn}.{last[0]}".rstrip(".")
    if "down_proj" in given:
        _named(module, block, given, "down_proj")
        w_mlp = given["down_proj"]
    else:
        w_mlp = _down_proj(module, blocks_name, block, attn, d_model)
    layout = Layout(
        blocks=blocks_name,
        attn=attn,
        mlp=given.get("mlp", w_mlp.rpartition(".")[0] or w_mlp),
        linears={W_ATTN: w_attn, W_MLP: w_mlp},
        embed=embed,
        norm=given.get("norm") or _final_norm(module, blocks_name, d_model),
        unembed=head,
        n_layers=len(blocks),
        d_model=d_model,
        transposed=isinstance(block.get_submodule(w_mlp), Conv1D),
    )
    _same_in_every_block(module, blocks, layout)
    return replace(layout, linears=_own_names(layout, [name for name, _ in linear_maps(block)]))


def _end(module: nn.Module, given: Mapping[str, str], part: str) -> str:
    """Path of the token embedding or the unembedding."""
    if part in given:
        _named(module, module, given, part)
        return given[part]
    getter = getattr(module, "get_input_embeddings" if part == "embed" else "get_output_embeddings")
    try:
        found = getter()
    except (AttributeError, NotImplementedError):
        found = None
    names = [name for name, child in module.named_modules() if child is found]
    what = "token embedding (get_input_embeddings)" if part == "embed" else "unembedding (get_output_embeddings)"
    return names[0] if found is not None and names else _missing(module, part, f"the {what}")


def _named(module: nn.Module, owner: nn.Module, given: Mapping[str, str], part: str) -> nn.Module:
    """The module that the caller names for a part.

    Raises:
        UnknownModel: there is none of that path, or it is no linear map where one is due.
    """
    path = given.get(part, "")
    if not path:
        _missing(module, part, f"{part} (config has no hidden_size)")
    try:
        found = owner.get_submodule(path)
    except AttributeError:
        near = get_close_matches(path, [name for name, _ in owner.named_modules()], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        where = "in the model" if owner is module else "in a block"
        raise UnknownModel(f"layout: {part} = {path!r} is no module {where}{hint}") from None
    if part in ("o_proj", "down_proj") and not isinstance(found, nn.Linear | Conv1D):
        raise UnknownModel(f"layout: {part} = {path!r} is {type(found).__name__}; name one linear map")
    return found


PARTS = {
    "blocks": "the list of blocks",
    "attn": "a block's attention (path inside the block)",
    "o_proj": "the attention's output projection (path inside the block)",
    "mlp": "a block's MLP (path inside the block)",
    "down_proj": "the MLP's down projection (path inside the block)",
    "norm": "the final norm",
    "embed": "the token embedding",
    "head": "the unembedding",
}
"""Names of the parts that a caller can give, and what each is."""


def read_layout(source: Mapping[str, str] | str | Path | None) -> dict[str, str] | None:
    """Paths of parts, from a mapping or a TOML or JSON file of one: `{"o_proj": "attn.out"}`; see `PARTS`.

    Raises:
        KtError: no such file, or an unknown part.
    """
    if source is None:
        return None
    where = "layout" if isinstance(source, Mapping) else f"layout {source}"
    parts = source if isinstance(source, Mapping) else read_table(Path(source))
    unknown = [key for key in parts if key not in PARTS]
    if unknown or not parts:
        near = get_close_matches(str(unknown[0]), PARTS, 1) if unknown else []
        hint = f"; did you mean {near[0]}?" if near else f"; choose among {', '.join(PARTS)}"
        raise KtError(f"{where}: {repr(unknown[0]) + ' is no part' if unknown else 'it names no part'}{hint}")
    wrong = [key for key, path in parts.items() if not isinstance(path, str) or not path]
    if wrong:
        raise KtError(f"{where}: {wrong[0]} must be a module's path, as text; see docs/reliability.md")
    return dict(parts)


def validate(model: Any) -> Layout:
    """Check by running two tokens that W · key + b is each module's whole output, and see how a block is built.

    Args:
        model: A TracedModel under construction.

    Returns:
        The layout with `parallel`, `direct`, `tuple_output` and the roles of all linear maps set. `has_post_norm` is a
        first guess from `direct`, which `explained.settle` replaces.

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
            seen: Any = {"in": block.input.clone()}  # clones, since a forward may add to its own tensors (Falcon)
            seen["a"] = w_attn.output.clone()
            whole = attn.output
            seen["attn"] = (whole[0] if isinstance(whole, tuple | list) else whole).clone()
            seen["m_key"] = w_mlp.input.clone()
            seen["m"] = w_mlp.output.clone()
            if mlp is not None:
                whole = mlp.output
                seen["mlp"] = (whole[0] if isinstance(whole, tuple | list) else whole).clone()
            seen["out"] = block.output
            seen.save()
            tracer.stop()
        with model.root.trace(input_ids=ids, use_cache=False, backend=model.backend()) as tracer:
            w_attn.output[:] = 0
            key_cut: Any = w_mlp.input.save()
            tracer.stop()
    out = unwrap_tuple(seen["out"])
    stream = (*ids.shape, layout.d_model)
    for name, tensor in (("gets", seen["in"]), ("gives", out)):
        if tuple(tensor.shape) != stream:
            _missing(model.module, None, f"one residual stream: a block {name} {tuple(tensor.shape)}, not {stream}")
    if not same(seen["attn"], seen["a"]):
        _missing(model.module, "attn", f"an attention whose output is that of {layout.w_attn}")
    if mlp is not None and not same(seen["mlp"], seen["m"]):
        _missing(model.module, "mlp", f"an MLP whose output is that of {layout.w_mlp}")
    total = seen["in"] + seen["a"].view_as(out) + seen["m"].view_as(out)
    scale = float(out.float().abs().max()) + 1e-6
    direct = bool((total - out).float().abs().max() <= 2e-2 * scale)
    return replace(
        layout,
        linears=_roles(model),
        parallel=torch.equal(seen["m_key"], key_cut),
        direct=direct,
        has_post_norm=not direct,
        tuple_output=isinstance(seen["out"], tuple),
    )


@contextmanager
def understood(module: nn.Module) -> Iterator[None]:
    """Say in one line that a model's own forward of two tokens fails.

    Raises:
        UnknownModel: it does.
    """
    try:
        yield
    except KtError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")[:200]
        raise UnknownModel(
            f"{type(module).__name__} is not a decoder that kt can read: a forward of two tokens fails "
            f"({type(error).__name__}: {reason})"
        ) from error


def same(one: Tensor, other: Tensor) -> bool:
    """The same numbers, whatever the shapes: OPT's MLP works on flattened rows."""
    return one.numel() == other.numel() and torch.equal(one, other.view_as(one))


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
    return call_order(model, modules, block)


def call_order(model: Any, modules: Mapping[str, nn.Module], last: nn.Module) -> list[str]:
    """Names of the modules that see each of two tokens once, in the order of a plain forward that ends at `last`.

    A structure without weights runs on the meta device. Where its mask cannot be made there, all names stay as given.
    """
    device = execution_device(model.embedding)
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


def _own_names(layout: Layout, paths: list[str]) -> dict[str, str]:
    """Role -> path with the modules' own names, W_o and down_proj apart; maps outside attention and MLP left out."""
    ends = {path: role for role, path in ((W_ATTN, layout.w_attn), (W_MLP, layout.w_mlp))}
    whole = layout.mlp == layout.w_mlp  # OPT: fc1 and fc2 stand in the block itself
    found = {}
    for path in paths:
        if path in ends:
            found[ends[path]] = path
            continue
        role = W_ATTN if path.startswith(layout.attn + ".") else W_MLP
        if role == W_ATTN or whole or path.startswith(layout.mlp + "."):
            own = _own_name(layout, role, path)
            found[f"{role.partition('.')[0]}.{path}" if own in (W_ATTN, W_MLP) else own] = path  # a named part's stays
    return found


def _own_name(layout: Layout, role: str, path: str) -> str:
    """A map by its module's own name in its part: `mlp.c_fc`."""
    kind = role.partition(".")[0]
    return f"{kind}.{path.removeprefix((layout.attn if kind == Kind.ATTN else layout.mlp) + '.')}"


def unwrap_tuple(output: Any) -> Any:
    """A module's tensor, whether it returns one or a tuple (GPT: a list) that begins with it."""
    return output[0] if isinstance(output, tuple | list) else output


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) from the module's type, never from a shape match."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def _blocks(module: nn.Module, given: Mapping[str, str], embed: str) -> tuple[str, nn.ModuleList]:
    """The list of blocks with an attention each; of several (a vision tower has one) that beside the embedding."""
    if "blocks" in given:
        found = _named(module, module, given, "blocks")
        if not isinstance(found, nn.ModuleList) or not len(found):
            raise UnknownModel(f"layout: blocks = {given['blocks']!r} is {type(found).__name__}; name the list of them")
        return given["blocks"], found
    n_layers = getattr(module.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[union-attr,operator]
    lists = {name: child for name, child in module.named_modules() if isinstance(child, nn.ModuleList) and len(child)}
    right = {name: blocks for name, blocks in lists.items() if len(blocks) == n_layers}
    with_attention = [name for name, blocks in right.items() if _attention(blocks[0]) is not None]
    if with_attention or (right and "o_proj" in given):
        name = max(with_attention or right, key=lambda name: _shared_path(name, embed))
        return name, right[name]
    if right:
        name = max(right, key=lambda name: _shared_path(name, embed))
        return _missing(module, "attn", f"an attention in {_held(name, right[name][0])}")
    others = ", ".join(f"{name} ({len(blocks)})" for name, blocks in [*lists.items()][:4]) or "none"
    return _missing(module, "blocks", f"a list of {n_layers} blocks (config.num_hidden_layers); lists: {others}")


def _shared_path(one: str, other: str) -> int:
    """Number of leading parts that two module paths share."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one.split("."), other.split("."), strict=False))
    )


def _held(blocks: str, block: nn.Module, index: int = 0) -> str:
    """A block's class and children in words."""
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in block.named_children())
    return f"{blocks}.{index} ({type(block).__name__}), which holds {children or 'nothing'}"


def _down_proj(module: nn.Module, blocks: str, block: nn.Module, attn: str, d_model: int) -> str:
    """Path of the last linear map onto the residual stream outside the attention."""
    outside = [(n, m) for n, m in linear_maps(block) if not n.startswith(attn + ".")]
    onto = [n for n, m in outside if linear_shape(m)[0] == d_model]
    if onto and not any(part.isdigit() for part in onto[-1].split(".")):
        return onto[-1]
    found = experts(block)
    if found is not None:
        return _missing(module, None, f"one down projection in {blocks}.0: it is {found}")
    if onto:
        return _missing(module, "down_proj", f"one down projection in {blocks}.0: {onto[-1]} is one of a list")
    what = f"an MLP: outside {attn} no linear map onto d_model ({d_model}) in {_held(blocks, block)}"
    return _missing(module, "down_proj", what)


def experts(block: nn.Module) -> str | None:
    """A mixture of experts in words, if a block has both experts and a router over as many; else None.

    Experts are a list of modules of one class with linear maps, or a module that owns weights with an axis for them. A
    router owns a matrix with a row (or a column) for each.
    """
    counts: dict[str, int] = {}
    for name, child in block.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and all(linear_maps(one) for one in child):
            counts[name] = len(child)
        of_conv = isinstance(child, nn.Conv1d)  # whose weight has three axes, too
        stacked = [p for p in child.parameters(recurse=False) if p.dim() == 3 and not of_conv]
        if stacked and name and len({p.shape[0] for p in stacked}) == 1 and stacked[0].shape[0] > 1:
            counts[name] = int(stacked[0].shape[0])
    for name, n in counts.items():
        for path, child in block.named_modules():
            matrices = [p for p in child.parameters(recurse=False) if p.dim() == 2]
            if not path.startswith(name) and any(n in p.shape for p in matrices):
                return f"a mixture of {n} experts ({name}, with the router {path})"
    return None


def _attention(block: nn.Module) -> tuple[str, nn.Module] | None:
    for name, child in block.named_modules():
        if name and "attention_mask" in inspect.signature(child.forward).parameters and linear_maps(child):
            inner = [n for n, m in child.named_modules() if n and "attention_mask" in _parameters(m)]
            return (name, child) if not inner else (f"{name}.{inner[-1]}", child.get_submodule(inner[-1]))
    return None


def _parameters(module: nn.Module) -> Any:
    return inspect.signature(module.forward).parameters


def linear_maps(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)]


def _last_linear(module: nn.Module, d_out: int) -> tuple[str, nn.Module] | None:
    onto = [(n, m) for n, m in linear_maps(module) if linear_shape(m)[0] == d_out]
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
        present = {n for n, _ in linear_maps(block)}
        for path in (layout.w_attn, layout.w_mlp):
            if path not in present:
                inside = experts(block) or "blocks of different kinds are not supported"
                held = _held(layout.blocks, block, index)
                _missing(module, None, f"{path}, which {layout.blocks}.0 has, in {held}: {inside}")


def _missing(module: nn.Module, part: str | None, what: str) -> Any:
    """Refuse the model; `part` is the one to name where the model may have it under another name."""
    hint = ""
    if part is not None:
        hint = f'. If it is there, name {PARTS[part]}: layout={{"{part}": "path"}} in kt.load, or --layout FILE'
    raise UnknownModel(
        f"{type(module).__name__} is not a decoder that kt can read: did not find {what}. Looked for: a list of "
        "num_hidden_layers blocks; per block an attention with an output projection onto d_model and an MLP with a "
        f"down projection onto d_model; token embedding and unembedding{hint}"
    )
