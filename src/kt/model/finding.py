"""Find a decoder's parts by their shapes and roles, not by the name of its family.

`find_layout` looks for a list of `num_hidden_layers` blocks and, in every block, for what mixes tokens (a module that
takes an attention mask; else one that convolves) and its last linear map onto the residual stream (W_o), and outside it
for a mixture of experts or the last linear map onto the residual stream (down_proj). A caller may name parts
(`read_layout`). validation.py and explained.py then prove all of them by running two tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .._util.data import read_table
from ..errors import KtError, UnknownModel
from .layout import (
    ATTENTION,
    SECOND_ATTN,
    SECOND_MLP,
    W_ATTN,
    W_MLP,
    Layout,
    Parts,
    linear_shape,
    own_names,
)
from .mixture import Mixture, find_mixture
from .packed import is_packed


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
    made: dict[Hashable, Parts] = {}
    for layer, each in enumerate(blocks):
        if (built := _built(each)) not in made:
            made[built] = _parts(module, blocks_name, blocks, layer, given, d_model)
    by_layer = tuple(made[_built(each)] for each in blocks)
    layout = Layout(
        blocks=blocks_name,
        by_layer=by_layer,
        embed=embed,
        norm=given.get("norm") or _final_norm(module, blocks_name, d_model),
        unembed=head,
        d_model=d_model,
        transposed=isinstance(block.get_submodule(by_layer[0].w_mlp or by_layer[0].w_attn), Conv1D),
    )
    _sound(module, blocks, layout)
    return layout


def _built(block: nn.Module) -> Hashable:
    """What a block is built of: blocks of which it is the same have the same parts."""
    stacked = ((name, tuple(p.shape)) for name, p in block.named_parameters() if p.dim() == 3)
    return tuple((name, type(child)) for name, child in block.named_modules()), tuple(stacked)


def _parts(
    module: nn.Module, blocks_name: str, blocks: nn.ModuleList, layer: int, given: Mapping[str, str], d_model: int
) -> Parts:
    """The parts of one block, all linear maps but those onto the residual stream by their own names."""
    block, where, ends = blocks[layer], f"{blocks_name}.{layer}", dict[str, str]()
    attn, mixer = given.get("attn", ""), ATTENTION
    if "o_proj" in given:
        _named(module, block, given, "o_proj")
        ends[W_ATTN] = given["o_proj"]
        attn = attn or ends[W_ATTN].rpartition(".")[0] or ends[W_ATTN]
        others = [(name, child) for name, child in _other_mixers(block, d_model) if name != attn.partition(".")[0]]
    else:
        found = (attn, block.get_submodule(attn)) if attn else _attention(block)
        others = [(name, child) for name, child in _other_mixers(block, d_model) if name != attn]
        if found is None and others:
            (name, child), *others = others
            found, mixer = (name, child), mixer_kind(child)
        if found is not None:
            attn, onto = found[0], maps_onto(found[1], d_model)
            if not onto:
                return not_found(module, "o_proj", f"a linear map onto d_model ({d_model}) inside {where}.{attn}")
            ends[W_ATTN] = f"{attn}.{onto[-1][0]}".rstrip(".")
    for name, child in others[:1]:
        ends[SECOND_ATTN] = f"{name}.{maps_onto(child, d_model)[-1][0]}"
    mixture = None if "down_proj" in given else find_mixture(block, d_model)
    mixing = [path.rpartition(".")[0] for path in ends.values()]
    if "down_proj" in given:
        _named(module, block, given, "down_proj")
        ends[W_MLP] = given["down_proj"]
    elif mixture is not None:
        ends[W_MLP] = mixture.path
        if (second := _second_mlp(block, mixture, mixing, d_model)) is not None:
            ends[SECOND_MLP] = second
    elif _holds_more(block, mixing) or not ends:
        ends[W_MLP] = _down_proj(module, where, block, mixing, d_model)
    mlp = ends.get(W_MLP, "")
    whole = mlp if mixture is not None else mlp.rpartition(".")[0] or mlp
    if not attn and _holds_more(block, [whole]):
        return not_found(module, "attn", f"an attention in {_held(blocks_name, block, layer)}")
    return with_maps(block, Parts(attn, given.get("mlp", whole), ends, mixture, mixer if attn else ""))


def _inside(name: str, paths: Iterable[str]) -> bool:
    """Whether a part lies in one of these modules."""
    return any(name.startswith(f"{path}.") for path in paths)


def _holds_more(block: nn.Module, known: Sequence[str]) -> bool:
    """Whether a block has matrices outside the modules that are known."""
    return any(weight.dim() > 1 and not _inside(name, known) for name, weight in block.named_parameters())


def _mixes(block: nn.Module) -> bool:
    """Whether a block brings tokens together."""
    return _attention(block) is not None or any(map(_convolves, block.children()))


def _other_mixers(block: nn.Module, d_model: int) -> list[tuple[str, nn.Module]]:
    """The modules of a block that mix tokens and are no attention: all of them convolve the tokens."""
    children = block.named_children()
    return [(name, child) for name, child in children if _convolves(child) and maps_onto(child, d_model)]


def mixer_kind(module: nn.Module) -> str:
    """What a mixer that is no attention is, by its parameters: decays (`A_log`), a way past the state (`D`)."""
    own = {name.rpartition(".")[2] for name, _ in module.named_parameters()}
    if "A_log" in own:
        return "state space" if "D" in own else "linear attention"
    return "recurrence" if own - {"weight", "bias"} else "convolution"


def _second_mlp(block: nn.Module, mixture: Mixture, mixing: Sequence[str], d_model: int) -> str | None:
    """The last map onto the residual stream of a dense MLP beside a mixture of experts (Granite)."""
    inside = (mixture.path, *mixing)
    return next((n for n, _ in maps_onto(block, d_model)[::-1] if not _inside(n, inside)), None)


def with_maps(block: nn.Module, parts: Parts) -> Parts:
    """The parts with all linear maps of a block by their own names."""
    paths = [name for name, _ in linear_maps(block)]
    return replace(parts, linears=own_names(parts, paths))


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
        hint = f"did you mean {near[0]}?" if near else "name one of its named_modules()"
        where = "in the model" if owner is module else "in a block"
        raise UnknownModel(f"layout: {part} = {path!r} is no module {where}; {hint}") from None
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
    with_attention = [name for name, blocks in right.items() if any(map(_mixes, blocks))]
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


def _down_proj(module: nn.Module, where: str, block: nn.Module, mixing: Sequence[str], d_model: int) -> str:
    """Path of the last linear map onto the residual stream outside the modules that mix tokens."""
    onto = [n for n, _ in maps_onto(block, d_model) if not _inside(n, mixing)]
    if onto and not in_a_list(block, onto[-1]):
        return onto[-1]
    found = experts(block)
    if found is not None:
        return not_found(module, None, f"one down projection in {where}: it is {found}")
    if onto:
        return not_found(module, "down_proj", f"one down projection in {where}: {onto[-1]} is one of a list")
    blocks, _, layer = where.rpartition(".")
    beside = f"outside {', '.join(mixing)} " if mixing else ""
    if not mixing:
        held = _held(blocks, block, int(layer))
        return not_found(module, "attn", f"an attention in {held}{_other_mixer(block)}")
    what = f"an MLP: {beside}no linear map onto d_model ({d_model}) in {_held(blocks, block, int(layer))}"
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
        if name and not _inside(name, found) and _attends(child):
            found.append(name)
    return found


def _attention(block: nn.Module) -> tuple[str, nn.Module] | None:
    """The first module that takes an attention mask; the module inside it where that holds all of its linear maps."""
    for name, child in block.named_modules():
        if name and _attends(child):
            n_maps = len(linear_maps(child))
            inner = [n for n, m in child.named_modules() if n and _takes_mask(m) and len(linear_maps(m)) == n_maps]
            return (name, child) if not inner else (f"{name}.{inner[-1]}", child.get_submodule(inner[-1]))
    return None


def _attends(module: nn.Module) -> bool:
    return _takes_mask(module) and bool(linear_maps(module)) and not _convolves(module)


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


def maps_onto(module: nn.Module, d_out: int) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in linear_maps(module) if linear_shape(m)[0] == d_out]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear map, plain or packed."""
    return isinstance(module, nn.Linear | Conv1D) or is_packed(module)


def _final_norm(module: nn.Module, blocks: str, d_model: int) -> str | None:
    parent = blocks.rpartition(".")[0]
    names = []
    for name, child in module.get_submodule(parent).named_children():
        weight = getattr(child, "weight", None)
        if weight is not None and tuple(weight.shape) == (d_model,):
            names.append(f"{parent}.{name}" if parent else name)
    return names[-1] if names else None


def _sound(module: nn.Module, blocks: nn.ModuleList, layout: Layout) -> None:
    """Refuse blocks that share their weights, and blocks whose values cannot be read."""
    first: dict[int, int] = {}
    for layer, block in enumerate(blocks):
        parts = layout.at(layer)
        mixture = parts.mixture
        paths = [path for role, path in parts.ends.items() if role != W_MLP or mixture is None]
        paths += [] if mixture is None else [mixture.experts, *(each.path for each in mixture.shared)]
        for path in paths:
            own: Any = block.get_submodule(path)
            down = "weight" if hasattr(own, "weight") or mixture is None else mixture.down
            weight = None if is_packed(own) else getattr(own, down)
            other = first.setdefault(id(own) if weight is None else weight.data_ptr() or id(weight), layer)
            if other != layer:
                shared = f"weights of its own in {layout.blocks}.{layer}: it shares {path} with {layout.blocks}.{other}"
                not_found(module, None, f"{shared}, so that an edit of one would be an edit of both")
    for name in ("input", "output"):
        if hasattr(blocks[0], name):
            held = _held(layout.blocks, blocks[0])
            not_found(module, None, f"a block whose {name} nnsight can read: that is a module's name in {held}")


def most_positions(module: nn.Module) -> int | None:
    """The longest row that the configuration says the model reads, by MPT's name or all others'; None: no limit."""
    config = module.config.get_text_config()  # type: ignore[union-attr,operator]
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((limit for limit in named if isinstance(limit, int) and limit > 0), None)


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
