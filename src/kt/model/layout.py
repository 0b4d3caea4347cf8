"""Find a decoder's parts by their shapes and roles, not by the name of its family.

`find_layout` looks for a list of `num_hidden_layers` blocks; in every block one module that takes an attention mask
and, inside it, the last linear map onto the residual stream (W_o); outside it, the last linear map onto the residual
stream (down_proj). A caller may name parts (`read_layout`). validation.py and explained.py then prove all of them by
running two tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .._util.data import read_table
from ..errors import KtError, UnknownModel, UnknownSite
from .packed import is_packed
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
    if getattr(module.config, "is_encoder_decoder", False):
        not_found(module, None, "a decoder alone: it is an encoder and a decoder")
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
            return not_found(module, "attn", f"an attention in {_held(blocks_name, block)}{_other_mixer(block)}")
        attn = found[0]
        last = _last_linear(found[1], d_model)
        if last is None:
            return not_found(module, "o_proj", f"a linear map onto d_model ({d_model}) inside {blocks_name}.0.{attn}")
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
    return with_maps(module, layout)


def with_maps(module: nn.Module, layout: Layout) -> Layout:
    """The layout with all linear maps of a block by their own names, its W_o and down_proj being in every block."""
    blocks = module.get_submodule(layout.blocks)
    _same_in_every_block(module, blocks, layout)  # type: ignore[arg-type]
    paths = [name for name, _ in linear_maps(blocks[0])]  # type: ignore[index]
    return replace(layout, linears=own_names(layout, paths))


def _end(module: nn.Module, given: Mapping[str, str], part: str) -> str:
    """Path of the token embedding or the unembedding."""
    if part in given:
        _named(module, module, given, part)
        return given[part]
    getter = getattr(module, "get_input_embeddings" if part == "embed" else "get_output_embeddings")
    try:
        found = getter()
    except (AttributeError, NotImplementedError):  # transformers' own, where a model does not say which it is
        found = None
    names = [name for name, child in module.named_modules() if child is found]
    what = "token embedding (get_input_embeddings)" if part == "embed" else "unembedding (get_output_embeddings)"
    return names[0] if found is not None and names else not_found(module, part, f"the {what}")


def _named(module: nn.Module, owner: nn.Module, given: Mapping[str, str], part: str) -> nn.Module:
    """The module that the caller names for a part.

    Raises:
        UnknownModel: there is none of that path, or it is no linear map where one is due.
    """
    path = given.get(part, "")
    if not path:
        not_found(module, part, f"{part} (config has no hidden_size)")
    try:
        found = owner.get_submodule(path)
    except AttributeError:
        near = get_close_matches(path, [name for name, _ in owner.named_modules()], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        where = "in the model" if owner is module else "in a block"
        raise UnknownModel(f"layout: {part} = {path!r} is no module {where}{hint}") from None
    if part in ("o_proj", "down_proj") and not is_linear(found):
        raise UnknownModel(f"layout: {part} = {path!r} is {type(found).__name__}; name one linear map")
    if part in ("embed", "head") and getattr(getattr(found, "weight", None), "ndim", 2 * is_packed(found)) != 2:
        raise UnknownModel(
            f"layout: {part} = {path!r} is {type(found).__name__}; name a module with a row for each token"
        )
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
    if not isinstance(source, Mapping | str | Path):
        raise KtError(f"layout is {source!r}; give the parts' paths as a mapping, or the name of a file of them")
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


def own_names(layout: Layout, paths: list[str]) -> dict[str, str]:
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
    lists = {name: child for name, child in lists.items() if not in_a_list(module, name.rpartition(".")[0])}
    right = {name: blocks for name, blocks in lists.items() if len(blocks) == n_layers}
    with_attention = [name for name, blocks in right.items() if _attention(blocks[0]) is not None]
    if with_attention or (right and "o_proj" in given):
        name = max(with_attention or right, key=lambda name: _shared_path(name, embed))
        return name, right[name]
    for name, blocks in lists.items():
        if len(several := _attentions(blocks[0])) > 1:  # LongCat, whose config counts them as layers
            has = f"{name}.0 ({type(blocks[0]).__name__}) has {len(several)} ({', '.join(several)})"
            return not_found(module, None, f"one attention in a block: {has}")
    apart = [name for name, parts in right.items() if linear_maps(parts[0])]
    if len(apart) > 1 and len({name.rpartition(".")[0] for name in apart}) == 1:  # XLM
        return not_found(module, None, f"a list of blocks: their parts stand in lists apart ({', '.join(apart)})")
    if right:
        name = max(right, key=lambda name: _shared_path(name, embed))
        return not_found(module, "attn", f"an attention in {_held(name, right[name][0])}{_other_mixer(right[name][0])}")
    others = ", ".join(f"{name} ({len(blocks)})" for name, blocks in [*lists.items()][:4]) or "none"
    return not_found(module, "blocks", f"a list of {n_layers} blocks (config.num_hidden_layers); lists: {others}")


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
    if onto and not in_a_list(block, onto[-1]):
        return onto[-1]
    found = experts(block)
    if found is not None:
        return not_found(module, None, f"one down projection in {blocks}.0: it is {found}")
    if onto:
        return not_found(module, "down_proj", f"one down projection in {blocks}.0: {onto[-1]} is one of a list")
    what = f"an MLP: outside {attn} no linear map onto d_model ({d_model}) in {_held(blocks, block)}"
    return not_found(module, "down_proj", what)


def in_a_list(block: nn.Module, path: str) -> bool:
    """Whether a module is inside one of a list (experts), where a row of modules that run in turn (CTRL) is none."""
    names = path.split(".")
    return any(isinstance(block.get_submodule(".".join(names[:n])), nn.ModuleList) for n in range(1, len(names)))


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
        routers = [
            path
            for path, child in block.named_modules()
            if not path.startswith(name) and any(p.dim() == 2 and n in p.shape for p in child.parameters(recurse=False))
        ]
        if routers:
            router = max(routers, key=lambda path: _shared_path(path, name))
            return f"a mixture of {n} experts ({name}, with the router {router})"
    return None


def _attentions(block: nn.Module) -> list[str]:
    """Paths of the modules that take an attention mask, without those inside another one."""
    found: list[str] = []
    for name, child in block.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and _takes_mask(child) and linear_maps(child) and not _convolves(child):
            found.append(name)
    return found


def _attention(block: nn.Module) -> tuple[str, nn.Module] | None:
    """The first module that takes an attention mask; the module inside it where that holds all of its linear maps."""
    for name, child in block.named_modules():
        if name and _takes_mask(child) and linear_maps(child) and not _convolves(child):
            n_maps = len(linear_maps(child))
            inner = [n for n, m in child.named_modules() if n and _takes_mask(m) and len(linear_maps(m)) == n_maps]
            return (name, child) if not inner else (f"{name}.{inner[-1]}", child.get_submodule(inner[-1]))
    return None


def _takes_mask(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return "attention_mask" in parameters or {"mask", "layer_past"} <= set(parameters)  # CTRL


def _convolves(module: nn.Module) -> bool:
    """Whether a mixer is a state-space model, a linear recurrence or a convolution: all of them convolve the tokens."""
    return any(isinstance(child, nn.Conv1d) for child in module.modules())


def _other_mixer(block: nn.Module) -> str:
    """What stands in the attention's place, in words; "" if nothing does."""
    other = next((n for n, m in block.named_children() if _takes_mask(m) and _convolves(m)), None)
    return f"; {other} mixes tokens with a convolution and is no attention" if other else ""


def linear_maps(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in module.named_modules() if is_linear(m)]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear map, plain or packed."""
    return isinstance(module, nn.Linear | Conv1D) or is_packed(module)


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
    """Refuse blocks without the same maps, blocks that share their weights, and blocks whose values cannot be read."""
    for index, block in enumerate(blocks):
        present = {n for n, _ in linear_maps(block)}
        for path in (layout.w_attn, layout.w_mlp):
            if path not in present:
                inside = experts(block) or "blocks of different kinds are not supported"
                held = _held(layout.blocks, block, index)
                not_found(module, None, f"{path}, which {layout.blocks}.0 has, in {held}: {inside}")
    for path in (layout.w_attn, layout.w_mlp):
        first: dict[int, int] = {}
        for index, block in enumerate(blocks):
            own: Any = block.get_submodule(path)
            other = first.setdefault(id(own) if is_packed(own) else own.weight.data_ptr() or id(own.weight), index)
            if other != index:
                shared = f"weights of its own in {layout.blocks}.{index}: it shares {path} with {layout.blocks}.{other}"
                not_found(module, None, f"{shared}, so that an edit of one would be an edit of both")
    for name in ("input", "output"):
        if hasattr(blocks[0], name):
            held = _held(layout.blocks, blocks[0])
            not_found(module, None, f"a block whose {name} nnsight can read: that is a module's name in {held}")


def not_found(module: nn.Module, part: str | None, what: str) -> Any:
    """Refuse the model; `part` is the one to name where the model may have it under another name."""
    hint = ""
    if part is not None:
        hint = f'. If it is there, name {PARTS[part]}: layout={{"{part}": "path"}} in kt.load, or --layout FILE'
    raise UnknownModel(
        f"{type(module).__name__} is not a decoder that kt can read: did not find {what}. Looked for: a list of "
        "num_hidden_layers blocks; per block an attention with an output projection onto d_model and an MLP with a "
        f"down projection onto d_model; token embedding and unembedding{hint}"
    )
