"""Where a decoder's parts are, and how a block combines them: what finding.py found and numbers proved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .._util.text import runs_of
from ..errors import UnknownSite
from .mixture import Mixture
from .sites import OUTPUT, Kind, Site

ATTENTION = "attention"
SECOND_ATTN, SECOND_MLP = "attn.second", "mlp.second"
W_ATTN, W_MLP = (f"{kind}.{role}" for kind, role in OUTPUT.items())


ENDS = (W_ATTN, SECOND_ATTN, W_MLP, SECOND_MLP)


@dataclass(frozen=True)
class Parts:
    """The parts of one kind of block, as `Layout` names them. A block may lack a mixer (attn is "") or an MLP (mlp).

    `mixer` is what brings tokens together: attention, or another one, whose output projection then is W_o. `mixture` is
    a mixture of experts in the place of the MLP: the path of its module then stands for down_proj.
    """

    attn: str
    mlp: str
    linears: Mapping[str, str] = field(hash=False)
    mixture: Mixture | None = None
    mixer: str = ATTENTION

    @property
    def w_attn(self) -> str:
        """Path of W_o inside a block; "" without a mixer."""
        return self.linears.get(W_ATTN, "")

    @property
    def w_mlp(self) -> str:
        """Path of down_proj inside a block; of a mixture's module where there is one; "" without an MLP."""
        return self.linears.get(W_MLP, "")

    @property
    def ends(self) -> dict[str, str]:
        """The maps onto the residual stream: role -> path."""
        return {role: self.linears[role] for role in ENDS if role in self.linears}

    @property
    def seconds(self) -> dict[str, str]:
        """Maps onto the residual stream of a second mixer, and a second MLP, beside the first: role -> path."""
        return {role: path for role, path in self.ends.items() if role in (SECOND_ATTN, SECOND_MLP)}


@dataclass(frozen=True)
class Layout:
    """Where the parts are (module paths), and how a block combines them.

    `by_layer` has the parts of every block. `attn`, `mlp` and `linears` are those of the first one.

    `linears` names every linear map of a block's attention and MLP: role -> module path inside the block, in the order
    of a forward pass. Roles: `attn.q_proj`, `attn.k_proj`, `attn.v_proj`, `attn.o_proj` (W_o), `mlp.gate_proj`,
    `mlp.up_proj`, `mlp.down_proj`, each where the numbers decide it. Any other map keeps the name of its own module:
    the fused ones (`attn.c_attn`, `attn.query_key_value`, `attn.qkv_proj`, `mlp.gate_up_proj`) and those whose role is
    not clear.
    """

    blocks: str
    by_layer: tuple[Parts, ...]
    embed: str
    norm: str | None
    unembed: str
    d_model: int
    transposed: bool = False  # Conv1D keeps its weight as (d_in, d_out)
    parallel: bool = False  # attention and MLP read the same input (GPT-J, NeoX, Phi)
    direct: bool = True  # the values are added to the residual stream as they are, without a norm or a multiplier
    has_post_norm: bool = False  # a norm stands between a module's value and the residual stream
    tuple_output: bool = False
    unchecked: str | None = None  # why the blocks were not checked by numbers

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.by_layer)

    @property
    def attn(self) -> str:
        """Path of the first block's attention."""
        return self.by_layer[0].attn

    @property
    def mlp(self) -> str:
        """Path of the first block's MLP."""
        return self.by_layer[0].mlp

    @property
    def linears(self) -> Mapping[str, str]:
        """The first block's linear maps: role -> path."""
        return self.by_layer[0].linears

    @property
    def w_attn(self) -> str:
        """Path of W_o inside the first block."""
        return self.by_layer[0].w_attn

    @property
    def w_mlp(self) -> str:
        """Path of down_proj inside the first block."""
        return self.by_layer[0].w_mlp

    def has(self, site: Site) -> bool:
        """Whether the block at a site's layer has the site."""
        if site.kind is Kind.RESID:
            return True
        parts = self.at(site.layer)
        if site.name in parts.linears or (parts.mixture is not None and site.name in parts.mixture.roles):
            return True
        try:
            return self.role(site.name) in parts.linears  # named by its module's own name
        except UnknownSite:
            return False

    @property
    def mixers(self) -> tuple[str, ...]:
        """What mixes tokens in each block: `attention`, `linear attention`, `state space`, `convolution`, `recurrence`,
        or "" where nothing does."""
        return tuple(parts.mixer for parts in self.by_layer)

    def at(self, layer: int) -> Parts:
        """The parts of the block at a layer.

        Raises:
            UnknownSite: the model has no such layer.
        """
        if layer >= self.n_layers:
            raise UnknownSite(f"the model has layers 0 to {self.n_layers - 1}, not {layer}; choose among these")
        return self.by_layer[layer]

    @property
    def kinds(self) -> dict[int, Parts]:
        """The kinds of blocks, each by the first layer that is of it."""
        return {self.by_layer.index(parts): parts for parts in self.by_layer}

    def with_kind(self, parts: Parts, settled: Parts) -> Layout:
        """The layout with one kind of block replaced."""
        return replace(self, by_layer=tuple(settled if each == parts else each for each in self.by_layer))

    def path(self, kind: Kind | Site, layer: int | None = None) -> str:
        """Module path of a site's linear map, or of the whole block for the residual stream.

        Args:
            kind: A site, or a kind with its `layer`.

        Raises:
            UnknownSite: a block has no such linear map.
        """
        site = kind if isinstance(kind, Site) else Site(kind, int(layer or 0))
        block = f"{self.blocks}.{site.layer}"
        if site.kind is Kind.RESID:
            return block
        linears = self.at(site.layer).linears
        if (role := self.role(site.name)) not in linears:
            raise UnknownSite(f"{block} has no {role}; it has {', '.join(linears)}")
        return f"{block}.{linears[role]}"

    def role(self, name: str) -> str:
        """The role of a linear map, of any kind of block.

        Args:
            name: Its role (`mlp.up_proj`), its own name in its part (`mlp.c_fc`), or its path inside the block
                (`self_attn.q_proj`).

        Raises:
            UnknownSite: a block has no such linear map; the message lists those that it has.
        """
        kinds = self.kinds.values()
        if any(name in parts.linears or (parts.mixture and name in parts.mixture.roles) for parts in kinds):
            return name
        known: dict[str, str] = {}
        for parts in kinds:
            if parts.mixture is not None:
                known |= {each.path: f"mlp.shared.{n}" for n, each in enumerate(parts.mixture.shared)}
                known |= {f"mlp.{p.removeprefix(parts.mlp + '.')}": role for p, role in [*known.items()]}
            known = {path: role for role, path in parts.linears.items()} | known
            known = {_own_name(parts, role, path): role for role, path in parts.linears.items()} | known
        if name in known:
            return known[name]
        roles = dict.fromkeys(role for parts in kinds for role in parts.linears)
        near = get_close_matches(name, [*roles, *known], 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UnknownSite(f"a block has no linear map {name!r}; {hint}It has {', '.join(roles)}")

    def parts(self) -> dict[str, str]:
        """The paths as `kt.load(layout=...)` takes them, those inside a block where all blocks have them alike."""
        kinds = [*self.kinds.values()]
        names = dict(attn="attn", o_proj="w_attn")
        if not any(parts.mixture for parts in kinds):
            names |= dict(mlp="mlp", down_proj="w_mlp")
        inside = {part: {getattr(parts, name) for parts in kinds} for part, name in names.items()}
        found = dict(blocks=self.blocks) | {part: min(paths) for part, paths in inside.items() if len(paths) == 1}
        ends = dict(norm=self.norm, embed=self.embed, head=self.unembed)
        return {part: path for part, path in (found | ends).items() if path}

    def describe(self) -> str:
        """One line that names what was found."""
        mixer = "attention" if set(self.mixers) == {ATTENTION} else "mixer"
        order = f"parallel {mixer} and MLP" if self.parallel else f"{mixer}, then MLP"
        lacking = [not (parts.w_attn and parts.w_mlp) for parts in self.kinds.values()]
        if any(lacking):
            order = "a mixer or an MLP each" if any(p.w_mlp for p in self.kinds.values()) else "a mixer each"
        norm = ", a norm after each" if self.has_post_norm else "" if self.direct else ", scaled"
        return (
            f"{self.n_layers} blocks at {self.blocks} ({order}{norm}), W_o = {self._several('w_attn')}, "
            f"down_proj = {self._several('w_mlp')}, d_model {self.d_model}"
            + (f"; not checked by numbers, since {self.unchecked}" if self.unchecked else "")
        )

    def _several(self, which: str) -> str:
        """W_o or down_proj in words, with its layers where there are several kinds."""
        by_words: dict[str, list[int]] = {}
        for layer in range(self.n_layers):
            parts = self.at(layer)
            mixture = parts.mixture if which == "w_mlp" else None
            words = getattr(parts, which) if mixture is None else mixture.describe()
            if which == "w_attn" and words and parts.mixer != ATTENTION:
                words = f"{words} of a {parts.mixer}"
            if second := parts.seconds.get(SECOND_ATTN if which == "w_attn" else SECOND_MLP):
                words = f"{words} beside {second}"
            by_words.setdefault(words or "none", []).append(layer)
        if len(by_words) == 1:
            return next(iter(by_words))
        return " and ".join(f"{words} (layers {runs_of(layers)})" for words, layers in by_words.items())


def own_names(parts: Parts, paths: list[str]) -> dict[str, str]:
    """Role -> path with the modules' own names, the maps onto the residual stream apart; maps outside attention and MLP
    left out. A mixture's parts have no role of their own here, but it has that of down_proj."""
    ends = {path: role for role in ENDS if (path := parts.linears.get(role))}
    mixture = parts.mixture
    shared = {each.path for each in mixture.shared} if mixture is not None else set()
    whole = parts.mlp == parts.w_mlp and mixture is None and parts.mlp  # OPT: fc1 and fc2 stand in the block itself
    found = {}
    for path in paths:
        if path in shared:  # a part of the mixture, whose key has the gate in it
            continue
        if path in ends:
            found[ends[path]] = path
            continue
        mixing = bool(parts.attn) and path.startswith(parts.attn + ".")
        if mixing or whole or (parts.mlp and path.startswith(parts.mlp + ".")):
            role = W_ATTN if mixing else W_MLP
            own = _own_name(parts, role, path)
            found[f"{role.partition('.')[0]}.{path}" if own in ENDS else own] = path  # a named part's stays
    return found | ({W_MLP: mixture.path} if mixture is not None else {})


def _own_name(parts: Parts, role: str, path: str) -> str:
    """A map by its module's own name in its part: `mlp.c_fc`."""
    kind = role.partition(".")[0]
    return f"{kind}.{path.removeprefix((parts.attn if kind == Kind.ATTN else parts.mlp) + '.')}"


def unwrap_tuple(output: Any) -> Any:
    """A module's tensor, whether it returns one or a tuple (GPT: a list) that begins with it."""
    return output[0] if isinstance(output, tuple | list) else output


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) from the module's type, never from a shape match."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
