"""A mixture of experts as one linear map onto the residual stream.

The output of a mixture is  Σ_j g_j W_j k_j + shared,  with the router's weight g_j of expert j (zero where a token is
not sent to it), the expert's key k_j (what its down projection reads) and its down projection W_j. With the *gated*
keys g_j k_j side by side as one key, and the W_j side by side as one weight, that is one linear map: its key is read,
its output patched and its weight written like those of any down_proj. A shared expert is one more part, its key times
its own gate where it has one.

Transformers keeps the experts of a block as parameters with an axis over experts. A part's weight is one slice of such
a parameter, named `mlp.experts.down_proj[3]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UnknownModel
from .packed import is_packed

EVERY = "[*]"
"""Behind the name of the experts' parameter: the weights of all parts, side by side."""


@dataclass(frozen=True)
class Shared:
    """An expert that every token is sent to: the path of its down projection in the block, its width, and the path of
    the linear map whose sigmoid weighs it."""

    path: str
    width: int
    gate: str | None = None


@dataclass(frozen=True)
class Mixture:
    """Where a block's experts are; all paths are inside the block.

    Attributes:
        path: the module whose output is the mixture's.
        experts: the module that owns the experts' weights, in `down` and `up` with an axis over experts.
        count, width: number of experts, and of the numbers in an expert's key.
        transposed: an expert's weight is kept as (d_in, d_out).
        shared: the shared experts.
        order: paths of experts and shared down projections, in the order of a forward.
    """

    path: str
    experts: str
    down: str
    up: str
    count: int
    width: int
    transposed: bool
    shared: tuple[Shared, ...] = ()
    order: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def roles(self) -> dict[str, slice]:
        """The parts by role (`mlp.experts.0`, ..., `mlp.shared.0`), with their columns of the whole key."""
        widths = {f"mlp.experts.{number}": self.width for number in range(self.count)}
        widths |= {f"mlp.shared.{number}": each.width for number, each in enumerate(self.shared)}
        columns, start = {}, 0
        for role, width in widths.items():
            columns[role] = slice(start, start + width)
            start += width
        return columns

    @property
    def roles_in_order(self) -> list[str]:
        """The parts' roles as a forward comes to them."""
        shared = [role for role in self.roles if role.startswith("mlp.shared.")]
        experts = [role for role in self.roles if role.startswith("mlp.experts.")]
        first = [role for role in shared if self.precedes_experts(self.shared[self.part(role)[1]])]
        return [*first, *experts, *(role for role in shared if role not in first)]

    def precedes_experts(self, shared: Shared) -> bool:
        """Whether a forward comes to a shared expert before the others."""
        return self.order.index(shared.path) < self.order.index(self.experts)

    @property
    def size(self) -> int:
        """The numbers in the whole key."""
        return self.count * self.width + sum(each.width for each in self.shared)

    def weight(self, role: str) -> str:
        """The name of a part's weight inside the block; of the whole map with `EVERY`."""
        part, number = self.part(role)
        if part == "shared":
            return f"{self.shared[number].path}.weight"
        return f"{self.experts}.{self.down}{f'[{number}]' if part == 'experts' else EVERY}"

    def part(self, role: str) -> tuple[str | None, int]:
        """`experts` or `shared`, and which one; None for the whole map."""
        part, _, number = role.removeprefix("mlp.").rpartition(".")
        return (part, int(number)) if role in self.roles else (None, 0)

    def describe(self) -> str:
        also = f" and {len(self.shared)} shared" if self.shared else ""
        return f"{self.count} experts{also} at {self.experts}"


def find_mixture(block: nn.Module, d_model: int) -> Mixture | None:
    """The block's mixture of experts, if it is one of parameters with an axis over experts; else None."""
    for name, owner in block.named_modules():
        stacked = {n: p for n, p in owner.named_parameters(recurse=False) if p.dim() == 3}
        down = next((n for n in stacked if n.startswith("down")), None)
        up = next((n for n in stacked if n != down), None)
        if "." not in name or isinstance(owner, nn.Conv1d) or down is None or up is None:
            continue
        count, one, other = stacked[down].shape
        if count < 2 or stacked[up].shape[0] != count or d_model not in (one, other):
            continue
        transposed = bool(getattr(owner, "is_transposed", other == d_model != one or not hasattr(owner, "_apply_gate")))
        path = name.rpartition(".")[0]
        whole = block.get_submodule(path)
        routed_by = any(f"{path}.{n}" != name and _routes(m, count) for n, m in whole.named_children())
        if not routed_by:
            continue
        width = one if transposed else other
        return Mixture(path, name, down, up, count, width, transposed, _shared(whole, path, name, d_model))
    return None


def _routes(module: nn.Module, count: int) -> bool:
    return any(count in parameter.shape[:1] for parameter in module.parameters() if parameter.dim() == 2)


def _shared(whole: nn.Module, path: str, experts: str, d_model: int) -> tuple[Shared, ...]:
    """The parts of a mixture beside its experts that write the residual stream, with the gate that weighs them."""
    found = []
    linear: dict[str, Any] = {n: m for n, m in whole.named_modules() if isinstance(m, nn.Linear) or is_packed(m)}
    for name, child in whole.named_children():
        inside = {n: m for n, m in linear.items() if n.startswith(f"{name}.") and m.out_features == d_model}
        if f"{path}.{name}" != experts and inside and list(child.children()):
            down, module = list(inside.items())[-1]
            gate = next((n for n, m in linear.items() if m.out_features == 1 and "." not in n), None)
            found.append(Shared(f"{path}.{down}", int(module.in_features), gate and f"{path}.{gate}"))
    return tuple(found)


class Routed(NamedTuple):
    """What the experts are given: tokens, and (token, expert) weights of the router; zero: not sent there.

    `applied`: the tokens come once for each expert, multiplied by its weight already (Llama 4).
    """

    tokens: Float[Tensor, "token d_model"] | Float[Tensor, "expert token d_model"]
    gates: Float[Tensor, "token expert"]
    applied: bool = False

    def at(self, places: Int[Tensor, " token"]) -> Routed:
        """The same for some tokens."""
        tokens = self.tokens[:, places] if self.applied else self.tokens[places]
        return self._replace(tokens=tokens, gates=self.gates[places])


def routed(mixture: Mixture, inputs: tuple[Sequence[Any], Mapping[str, Any]]) -> Routed:
    """The experts' arguments, whatever their order.

    Raises:
        UnknownModel: they are not tokens, experts and weights.
    """
    tensors = [each for each in (*inputs[0], *inputs[1].values()) if isinstance(each, Tensor)]
    tokens, rest = tensors[0].reshape(-1, tensors[0].shape[-1]), tensors[1:]
    chosen = next((each for each in rest if not each.is_floating_point()), None)
    weights = next((each for each in rest if each.is_floating_point()), None)
    if chosen is not None and weights is not None and chosen.shape == weights.shape:
        gates = weights.new_zeros(len(tokens), mixture.count + 1)  # one more: what is sent to no expert
        pairs = chosen.reshape(len(tokens), -1), weights.reshape(len(tokens), -1)
        return Routed(tokens, gates.scatter(1, pairs[0].clamp(max=mixture.count), pairs[1])[:, :-1])
    if not rest and len(tokens) % mixture.count == 0:
        each = tokens.view(mixture.count, -1, tokens.shape[-1])
        return Routed(each, (each != 0).any(-1).T.to(each.dtype), applied=True)
    shapes = ", ".join(f"{str(each.dtype).removeprefix('torch.')} {tuple(each.shape)}" for each in tensors)
    raise UnknownModel(f"the experts at {mixture.experts} are given {shapes}; not tokens, experts and their weights")


def gated_keys(
    owner: nn.Module, mixture: Mixture, given: Routed, experts: Sequence[int]
) -> Iterator[Float[Tensor, "token width"]]:
    """The gated keys of some experts: zero for tokens that are not sent there. Only those that are, are computed."""
    up, bias = getattr(owner, mixture.up), getattr(owner, f"{mixture.up}_bias", None)
    for expert in experts:
        gates = given.gates[:, expert]
        rows = gates.detach().nonzero()[:, 0]
        tokens = (given.tokens[expert] if given.applied else given.tokens)[rows]
        hidden = tokens @ (up[expert] if mixture.transposed else up[expert].mT)
        if bias is not None:
            hidden = hidden + bias[expert]
        keys = _activated(owner, hidden, mixture.width)
        if not given.applied:
            keys = keys * gates[rows, None]
        whole = keys.new_zeros(len(gates), mixture.width)
        yield whole.index_copy(0, rows, keys)


def _activated(owner: Any, hidden: Float[Tensor, "token up"], width: int) -> Float[Tensor, "token width"]:
    """By the module's own gate, where it has one; `settle_mixtures` proves it."""
    if hidden.shape[-1] == width:
        return owner.act_fn(hidden)
    if hasattr(owner, "_apply_gate"):
        return owner._apply_gate(hidden)
    gate, linear = hidden.chunk(2, dim=-1)
    return owner.act_fn(gate) * linear


class MixtureSite:
    """A mixture, or one of its parts, inside a trace: `input` is its key, `output` its value, as of an envoy.

    The value of a part is what it adds to the mixture's: it is computed, and writing into it changes nothing.
    """

    def __init__(self, model: Any, mixture: Mixture, layer: int, role: str | None = None) -> None:
        block = f"{model.layout.blocks}.{layer}"
        self.mixture, self.role = mixture, role
        self._module = model.module.get_submodule(f"{block}.{mixture.experts}")
        self._whole = model.envoy(f"{block}.{mixture.path}")
        self._inner = {path: model.envoy(f"{block}.{path}") for path in mixture.order}
        gates = [each.gate for each in mixture.shared if each.gate is not None]
        self._gates: dict[str, Any] = {path: model.module.get_submodule(f"{block}.{path}") for path in gates}
        self._weight = None if role is None else model.weight(f"{block}.{mixture.weight(role)}")

    @property
    def input(self) -> Float[Tensor, "token d_in"]:
        """The gated key: of all parts, or of the one that `role` names."""
        return self.read()[0]

    def read(self, at: Int[Tensor, " token"] | None = None) -> tuple[Float[Tensor, "token d_in"], Routed | None]:
        """The gated key, and what the experts are given (None for a shared expert's).

        Args:
            at: the tokens to compute it for, by their places in the flattened batch; None takes all.
        """
        part, number = (None, 0) if self.role is None else self.mixture.part(self.role)
        given = self._given(part, number)
        if at is not None:
            given = {path: each.at(at) if isinstance(each, Routed) else each[at] for path, each in given.items()}
        keys: list[Tensor] = []
        if part != "shared":
            experts = range(self.mixture.count) if part is None else [number]
            keys += gated_keys(self._module, self.mixture, given[self.mixture.experts], experts)
        keys += [given[each.path] for each in self.mixture.shared if each.path in given]
        return (keys[0] if len(keys) == 1 else torch.cat(keys, -1)), given.get(self.mixture.experts)

    def gates(self) -> Float[Tensor, "token expert"]:
        """The router's weights."""
        tokens = self._whole.input.flatten(0, -2)
        given = routed(self.mixture, self._inner[self.mixture.experts].inputs)
        if not given.applied:
            return given.gates
        return (given.tokens * tokens).sum(-1).T / tokens.square().sum(-1, keepdim=True)

    def _given(self, part: str | None, number: int) -> dict[str, Any]:
        """What the experts are given and the keys of shared ones, in the order in which a forward comes to them."""
        mixture = self.mixture
        wanted = {None: mixture.shared, "experts": (), "shared": mixture.shared[number : number + 1]}[part]
        shared = {each.path: each for each in wanted}
        found: dict[str, Any] = {}
        for path, envoy in self._inner.items():
            if path == mixture.experts and part != "shared":
                found[path] = routed(mixture, envoy.inputs)
            elif path in shared:
                weight = self._gate(shared[path])
                key = envoy.input.flatten(0, -2)
                found[path] = key if weight is None else weight * key
        return found

    def _gate(self, shared: Shared) -> Float[Tensor, "token 1"] | None:
        """The weight of a shared expert, by its gate's own weights: a forward may run the gate much later."""
        if shared.gate is None:
            return None
        gate = self._gates[shared.gate]
        if self.mixture.precedes_experts(shared):
            tokens = self._whole.input.flatten(0, -2)
        else:
            tokens = routed(self.mixture, self._inner[self.mixture.experts].inputs).tokens
        return torch.sigmoid(functional.linear(tokens, gate.weight, gate.bias))

    @property
    def output(self) -> Any:
        """The mixture's output, or what the part that `role` names adds to it (without its bias)."""
        if self._weight is not None:
            return self.input @ self._weight.T
        whole = self._whole.output
        return whole[0] if isinstance(whole, tuple | list) else whole

    @output.setter
    def output(self, value: Any) -> None:
        whole = self._whole.output
        self._whole.output = (value, *whole[1:]) if isinstance(whole, tuple | list) else value


def settle_mixture(model: Any, mixture: Mixture, layers: Sequence[int], ids: Int[Tensor, "1 2"]) -> Mixture:
    """The mixture of these layers with the order in which a forward runs its parts, proved by running two tokens.

    Raises:
        UnknownModel: the weights times the gated keys are not the output of some layer's mixture.
    """
    blocks = [f"{model.layout.blocks}.{layer}" for layer in layers]
    paths = [mixture.experts, *(each.path for each in mixture.shared)]
    seen: list[str] = []
    handles = [
        model.module.get_submodule(f"{blocks[0]}.{path}").register_forward_pre_hook(
            lambda *_, path=path: seen.append(path)
        )
        for path in paths
    ]
    try:
        with torch.no_grad():
            model.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if sorted(seen) != sorted(paths):
        raise UnknownModel(
            f"{type(model.module).__name__} is not a decoder that kt can read: in {blocks[0]} a forward runs "
            f"{', '.join(seen) or 'no expert'}, where the mixture of experts has {', '.join(paths)}"
        )
    mixture = replace(mixture, order=tuple(seen))
    sites = [MixtureSite(model, mixture, layer) for layer in layers]
    with torch.no_grad(), model.root.trace(input_ids=ids, use_cache=False, backend=model.backend()) as tracer:
        read: Any = []
        for site in sites:
            key, given = site.read()
            assert given is not None, "the whole mixture has its experts"
            read.append((key.clone(), given.gates.clone(), site.output.clone()))
        read.save()
        tracer.stop()
    for block, (key, gates, output) in zip(blocks, read, strict=True):
        value = output.reshape(len(key), -1).double()
        left = value - sum(
            key[:, columns].double() @ model.weight(f"{block}.{mixture.weight(role)}").double().T
            for role, columns in mixture.roles.items()
            if key[:, columns].any()
        )
        bias = getattr(model.module.get_submodule(f"{block}.{mixture.experts}"), f"{mixture.down}_bias", None)
        left = left if bias is None else left - gates.double() @ bias.double()
        missing = float((left.norm(dim=-1) / (value.norm(dim=-1) + 1e-300)).max())
        eps = max(torch.finfo(each.dtype).eps for each in (key, gates, output))  # a router may be in float32
        if missing > min(64 * eps, max(8 * eps, 1e-4)):
            raise UnknownModel(
                f"{type(model.module).__name__} is not a decoder that kt can read: the {mixture.describe()} of {block} "
                f"do not make its output: {missing:.1%} of it is not the sum of the experts' weights times their keys; "
                "docs/reliability.md lists the kinds of models that can be"
            )
    return mixture


def slice_of(name: str) -> tuple[str, int | None]:
    """A parameter's name, and which slice of it along its first axis `name` means: `experts.down_proj[3]`."""
    path, bracket, number = name.removesuffix("]").partition("[")
    return (path, int(number)) if bracket and number.isdigit() else (name, None)
