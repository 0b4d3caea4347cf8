"""How an adapter's entries are read in a forward: GRACE's rule, and those of MELO, WISE and MEMOIR.

An entry is a request's key k_i, a value and a radius. GRACE's value is the output itself. Of the others it is the
change δ_i of the output that makes the model say the target, and a map M takes the keys to the changes, M k_i = δ_i.
At every token, with x the input of the site's map W and y = W x:

    replace     the nearest key lies within its radius: v_i (GRACE, arXiv 2211.11031)
    blocks      the same, but y + M_b x, with b the block of the nearest key: `size` requests in their order share a
                block, of rank `rank` at most (MELO, arXiv 2312.11795)
    part        y + M_b x with the b of the largest part of a request's own change, where that reaches the radius; a
                block's M is zero but for a random `share` of the inputs, and as small as it can be at the keys of
                unrelated text (WISE, arXiv 2405.14768). M x = Σ c_i δ_i is a sum of the requests' changes, and
                the part of request i is c_i(x) / c_i(k_i). The paper asks for the length of M x, which grows with
                the number of requests (docs/methods-measured.md)
    overlap     each key has its own mask m_i, a `share` of the inputs chosen by its largest ones; y + M (m_i ⊙ x) with
                the mask that shares most inputs with x's own, where that share reaches the radius (MEMOIR, arXiv
                2506.07899)

M follows from the entries alone: the papers come to it by gradient steps on a copy of the weight. From zero, at one
token a request, such steps add multiples of the keys (their masked parts) and nothing else, as the least M does.

What the papers route by is the prompt as a whole (a mean over its tokens, or its last one); here it is every token by
itself, so that a batch, padding and a key-value cache change nothing (see adapter_edit.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import KtError, WorkFailed, warn_user
from .closed_form.aims import Position

if TYPE_CHECKING:
    from .adapter_edit import Adapter

RIDGE = 1.0
"""Added to the second moment of unrelated keys, as a share of their mean square: they are fewer than a map has inputs,
and nothing else would hold the map back at all others."""
SHARED, HELD_BACK = 1e-4, 0.01
"""Added to the keys' Gram matrix, as a share of its mean diagonal: nearer keys share what they read. The second
is of a map that is held back at unrelated text: of two requests about one subject the keys are nearly one, and what
tells them apart would be large at every token."""
LEAST_OWN = 0.02
"""The least c_i(k_i) of a request that is read: below, its key is next to nothing beside the others', and any token has
as much of it. Of n equal keys each has 1 / n."""
BEFORE = "activation"
"""The name of a rule that an older kt read by the length of M x."""
ANSWERED = 1e-3
"""Share of an adapter's largest ‖δ‖ from which an entry changes the output at all."""
EXACT = "donot_use_mm_for_euclid_dist"
"""torch.cdist by matrix products loses the small distances of equal keys."""


@dataclass(frozen=True)
class Rule:
    """`position`: the token of a prompt at which keys and values are read. The others: see the module."""

    name: str = "replace"
    position: str = Position.PROMPT_LAST.value
    size: int = 1
    rank: int = 1
    share: float = 1.0

    FORM: ClassVar[dict[str, Any]] = {"name": str, "position": str, "size": int, "rank": int, "share": float}

    @property
    def adds(self) -> bool:
        """Whether values are changes of the output."""
        return self.name != "replace"

    @property
    def by_distance(self) -> bool:
        """Whether radii are distances between keys."""
        return self.name in ("replace", "blocks")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, fields: Any) -> Rule:
        """The inverse of `as_dict`; nothing is GRACE's, as in files before there were others."""
        strange = sorted(set(fields or ()) - set(cls.FORM))
        if strange:
            raise KtError(f"the rule of an adapter has a field {strange[0][:40]!r}, which this kt does not read")
        if fields and fields.get("name") == BEFORE:
            warn_user(
                "this WISE edit was made by an older kt, and its memory is read by today's rule, at other tokens; "
                "evaluate it again, or solve it again"
            )
            fields = {**fields, "name": "part"}
        rule = cls(**fields) if fields else cls()
        if rule.name not in READERS or rule.position not in {each.value for each in Position}:
            named = rule.name if rule.name not in READERS else rule.position
            raise KtError(f"the rule of an adapter, {named[:40]!r}, is not one that this kt reads")
        if rule.size < 1 or rule.rank < 1 or not 0 < rule.share <= 1:
            raise KtError(
                f"the rule of an adapter has size {rule.size}, rank {rule.rank} and share {rule.share:g}; sizes and "
                "ranks are at least 1, a share lies above 0, at most at 1"
            )
        return rule


class Read(NamedTuple):
    """By token: whether an entry is met, and the output or its change."""

    met: Bool[Tensor, " token"]
    value: Float[Tensor, "token d_out"]


Reader = Callable[[Tensor], Read]
"""A rule at work: of inputs, (token, d_in), what each reads."""


class Map(NamedTuple):
    """A low-rank map, left · right."""

    left: Float[Tensor, "d_out rank"]
    right: Float[Tensor, "rank d_in"]

    def __call__(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_out"]:
        return x @ self.right.to(x).T @ self.left.to(x).T


def least_map(
    keys: Float[Tensor, "key d_in"],
    changes: Float[Tensor, "key d_out"],
    unrelated: Float[Tensor, "token d_in"] | None = None,
) -> Map:
    """The M with M k_i = δ_i that is least: in Frobenius' norm, or at unrelated keys, by their second moment A.

    M = Dᵀ (K A⁻¹ Kᵀ)⁻¹ K A⁻¹, in float64, with keys and changes as rows; `RIDGE` of the mean diagonal is added to A,
    and `SHARED` or `HELD_BACK` of that to the Gram matrix, so that two equal keys share a mean.

    Raises:
        WorkFailed: every key is zero.
    """
    k, d = keys.double(), changes.double()
    if not k.any():
        raise WorkFailed(
            "every request's inputs are zero where the memory may read them, and nothing can be written there; let it "
            "read more of them (a larger density)"
        )
    whitened = k if unrelated is None else _whitened(k, unrelated.double())
    gram = whitened @ k.T
    gram.diagonal().add_((SHARED if unrelated is None else HELD_BACK) * gram.diagonal().mean())
    return Map(d.T, torch.linalg.solve(gram, whitened))


def _whitened(keys: Float[Tensor, "key d_in"], unrelated: Float[Tensor, "token d_in"]) -> Float[Tensor, "key d_in"]:
    """K A⁻¹ for A = Uᵀ U / tokens + ridge · I, through the smaller system of the tokens; ridge · A⁻¹ to be exact."""
    n = len(unrelated)
    ridge = RIDGE * unrelated.square().mean()
    if not ridge:
        return keys
    system = unrelated @ unrelated.T
    system.diagonal().add_(n * ridge)
    return keys - torch.linalg.solve(system, unrelated @ keys.T).T @ unrelated


def cut(whole: Map, rank: int) -> Map:
    """Its best approximation of a rank."""
    if rank >= len(whole.right):
        return whole
    q, r = torch.linalg.qr(whole.right.T)
    u, s, v = torch.linalg.svd(whole.left @ r.T, full_matrices=False)
    return Map(u[:, :rank] * s[:rank], v[:rank] @ q.T)


def reader(book: Adapter) -> Reader:
    """The rule of an adapter, with its maps solved."""
    return READERS[book.rule.name](book)


def reach(book: Adapter, x: Float[Tensor, "fact d_in"]) -> Float[Tensor, "fact entry"]:
    """How far keys reach into each entry; from 1 on the entry, or its block, is met."""
    return REACH[book.rule.name](book, x)


# The rules --------------------------------------------------------------------------------------------------------
def _nearest(book: Adapter, x: Float[Tensor, "token d_in"]) -> tuple[Bool[Tensor, " token"], Int[Tensor, " token"]]:
    distance, nearest = torch.cdist(x, book.keys.to(x), compute_mode=EXACT).min(-1)
    return distance <= book.radii.to(x)[nearest], nearest


def _replace(book: Adapter) -> Reader:
    def read(x: Tensor) -> Read:
        met, nearest = _nearest(book, x)
        return Read(met, book.values.to(x)[nearest])

    return read


def _blocks(book: Adapter) -> Reader:
    lots = zip(book.keys.split(book.rule.size), book.values.split(book.rule.size), strict=True)
    maps = [cut(least_map(keys, changes), book.rule.rank) for keys, changes in lots]
    block = torch.arange(len(book.labels)) // book.rule.size

    def read(x: Tensor) -> Read:
        met, nearest = _nearest(book, x)
        chosen = block.to(x.device)[nearest]
        value = torch.zeros(len(x), book.values.shape[1]).to(x)
        for number in chosen[met].unique().tolist():
            its = met & (chosen == number)
            value[its] = maps[number](x[its])
        return Read(met, value)

    return read


def _text(book: Adapter) -> Float[Tensor, "token d_in"]:
    assert book.unrelated is not None  # an adapter of these rules is not made without it
    return book.unrelated


def answered(book: Adapter) -> Bool[Tensor, " entry"]:
    """Whether entries change the output: of what the model says already δ is zero, but for rounding."""
    sizes = book.values.double().norm(dim=-1)
    return (sizes > 0) & (sizes > ANSWERED * sizes.max())


class Side(NamedTuple):
    """A block of a side memory: its map, and of each request c_i(k_i); infinite where the request has no change, or
    next to no key, so that no token reads the block for its sake."""

    whole: Map
    own: Float[Tensor, " entry"]

    def parts(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token entry"]:
        """Of each request's change as much as a token reads, 1 at its own key."""
        return x @ self.whole.right.to(x).T / self.own.to(x)


def sides(book: Adapter) -> list[Side]:
    """The blocks of an adapter whose rule is `part`."""
    found = []
    size = book.rule.size
    lots = zip(book.keys.split(size), book.values.split(size), answered(book).split(size), strict=True)
    for number, (keys, changes, counts) in enumerate(lots):
        kept = torch.rand(keys.shape[1], generator=torch.Generator().manual_seed(number)) < book.rule.share
        masked = least_map(keys * kept, changes, _text(book) * kept)
        own = (keys.double() * masked.right).sum(-1)
        found.append(Side(masked, own.masked_fill(~counts | (own < LEAST_OWN), math.inf)))
    return found


def _part(book: Adapter) -> Reader:
    blocks, radii = sides(book), book.radii.split(book.rule.size)

    def read(x: Tensor) -> Read:
        nearest = [(side.parts(x) / own.to(x)).amax(-1) for side, own in zip(blocks, radii, strict=True)]
        share, block = torch.stack(nearest).max(0)
        changes = torch.stack([side.whole(x) for side in blocks])
        return Read(share >= 1, changes[block, torch.arange(len(x), device=x.device)])

    return read


def masks(book: Adapter, x: Float[Tensor, "token d_in"]) -> Bool[Tensor, "token d_in"]:
    """The inputs that a token's largest ones choose, by their distance from the mean of unrelated text: those at the
    same places of a fixed shuffle, so that the map does not live on the largest inputs alone (TopHash)."""
    size = x.shape[1]
    top = (x - _text(book).to(x).mean(0)).abs().topk(max(1, round(book.rule.share * size)), dim=-1).indices
    shuffle = torch.randperm(size, generator=torch.Generator().manual_seed(0)).to(x.device)
    return torch.zeros_like(x, dtype=torch.bool).scatter_(1, shuffle[top], True)


def _common(one: Bool[Tensor, "token d_in"], other: Bool[Tensor, "entry d_in"]) -> Float[Tensor, "token entry"]:
    """The share of a mask's inputs that another has too."""
    return one.float() @ other.float().T / other.float().sum(1)


def _overlap(book: Adapter) -> Reader:
    own = masks(book, book.keys)
    whole = least_map(book.keys * own, book.values)

    def read(x: Tensor) -> Read:
        share, entry = _common(masks(book, x), own.to(x.device)).max(-1)
        met = share >= book.radii.to(x)[entry]
        value = torch.zeros(len(x), book.values.shape[1]).to(x)
        value[met] = whole(x[met] * own.to(x.device)[entry[met]])
        return Read(met, value)

    return read


def _reach_distance(book: Adapter, x: Tensor) -> Tensor:
    """(ε_i + ε) / d: from 1 on, the balls meet."""
    distance = torch.cdist(x.double(), book.keys.double(), compute_mode=EXACT)
    return (book.radii.double() + book.radius) / distance.clamp(min=1e-9)


def _reach_part(book: Adapter, x: Tensor) -> Tensor:
    return torch.cat([side.parts(x.double()) for side in sides(book)], -1) / book.radii.double()


def _reach_overlap(book: Adapter, x: Tensor) -> Tensor:
    return _common(masks(book, x), masks(book, book.keys)).double() / book.radii.double()


READERS: dict[str, Callable[[Adapter], Reader]] = {
    "replace": _replace,
    "blocks": _blocks,
    "part": _part,
    "overlap": _overlap,
}
REACH = {
    "replace": _reach_distance,
    "blocks": _reach_distance,
    "part": _reach_part,
    "overlap": _reach_overlap,
}
