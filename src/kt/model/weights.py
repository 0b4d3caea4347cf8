"""The weights of a `TracedModel`: found, written, and put back to the byte.

An address is a site, for the weight of its linear map, or any parameter's name. Weights are seen as (d_out, d_in).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import KtError, UnknownSite, warn_user
from .devices import bring_home, content, contents
from .effects import Effect, effects_of
from .layout import Layout, linear_shape
from .packed import dequantised, is_packed, kind_of, plain_map, put, stored
from .sites import Kind, Site
from .update import Update, fingerprint_in_order, fingerprint_of
from .writer import Kept, leave, open_blocks, sole_writer

Address = Site | str
Copy = Tensor | nn.Module
"""What `put_back` brings back: a weight's bytes, or the packed linear map that stood in its place (see packed.py)."""


class Weights:
    """What `TracedModel` knows of its weights."""

    module: Any
    dtype: Any
    name: str
    layout: Layout
    effects: Any  # TracedModel's, a tuple of `Effect`

    def checked(self, layer: int) -> int:
        """The layer, if the model has it."""
        if not 0 <= layer < self.layout.n_layers:
            raise UnknownSite(
                f"{self.name} has layers 0 to {self.layout.n_layers - 1}, not {layer}; choose among these"
            )
        return layer

    def site(self, name: str, layer: int) -> Site:
        """The site of a linear map.

        Args:
            name: Its role (`mlp.up_proj`, `attn.q_proj`; `mlp` alone is down_proj, `attn` alone W_o), its module's own
                name in its part (`mlp.c_fc`), or its path inside the block (`self_attn.q_proj`). `hidden` is the
                residual stream.
            layer: Block number, from 0.

        Returns:
            The site by its role, the same however the map was named.

        Raises:
            UnknownSite: no such layer or linear map; the message lists the maps there are.
        """
        self.checked(layer)
        if name in tuple(Kind):
            return Site(name, layer)
        site = Site(self.layout.role(name), layer)
        self.linear(site)
        return site

    def linear(self, site: Site) -> nn.Module:
        """The module of a site's linear map.

        Raises:
            UnknownSite: the residual stream, or the model has no such layer or linear map.
        """
        if site.kind is Kind.RESID:
            raise UnknownSite(f"{site} has no weight; edits go to attn.{site.layer} or mlp.{site.layer}")
        self.checked(site.layer)
        path = self.layout.path(site)
        try:
            return self.module.get_submodule(path)
        except AttributeError:
            raise UnknownSite(f"block {site.layer} of {self.name} has no {site.name} ({path}); others do") from None

    def weight_name(self, site: Site) -> str:
        """The parameter name of a site's weight."""
        self.linear(site)
        return self.layout.path(site) + ".weight"

    def site_of(self, weight_name: str) -> Site:
        """The site whose linear map has a weight, or is the module, of the name `weight_name`.

        Raises:
            UnknownSite: no linear map of attention or MLP is called so.
        """
        path = weight_name.removesuffix(".weight")
        layer, _, inner = path.removeprefix(self.layout.blocks + ".").partition(".")
        for role, own_path in self.layout.linears.items():
            if own_path == inner and layer.isdigit() and int(layer) < self.layout.n_layers:
                site = Site(role, int(layer))
                if self.layout.path(site) == path:
                    return site
        raise UnknownSite(
            f"{self.name} has no linear map of attention or MLP called {weight_name!r}; model.layout.linears lists them"
        )

    dequantised: Mapping[str, str] = {}
    """How the checkpoint stores weights that were dequantised, by name."""

    def in_order(self, sites: Iterable[Site]) -> list[Site]:
        """Distinct sites in the order in which a forward pass reaches them, the order that a trace needs."""
        ranks = {role: rank for rank, role in enumerate(self.layout.linears)}
        place = lambda s: ranks[self.layout.role(s.name)] if s.kind is not Kind.RESID else len(ranks)  # noqa: E731
        return sorted(set(sites), key=lambda site: (site.layer, place(site)))

    def block_weights(self, layer: int) -> list[str]:
        """The names of every parameter of the block at `layer`."""
        block = self.layout.path(Kind.RESID, self.checked(layer))
        return [f"{block}.{name}" for name, _ in self.module.get_submodule(block).named_parameters()]

    def weight(self, address: Address) -> Float[Tensor, "*shape"]:
        """The live weight at `address`: a linear map's as (d_out, d_in), a view, its orientation from the module's
        type. It takes no gradient. Of a packed map it is the dequantised weight, no view; `unpack` makes it one.
        """
        weight = self.own(address).detach()
        owner = self.module.get_submodule(self.name_of(address).rpartition(".")[0])
        return weight.T if isinstance(owner, Conv1D) and weight.dim() == 2 else weight

    def key_size(self, site: Site) -> int:
        """d_in: columns of a site's weight, the width of its input."""
        return linear_shape(self.linear(site))[1]

    def value_size(self, site: Site) -> int:
        """d_out: rows of a site's weight, the width of its output."""
        return linear_shape(self.linear(site))[0]

    @torch.no_grad()
    def write(self, address: Address, update: Update | Float[Tensor, "*shape"]) -> None:
        """Add `update` to the weight at `address`: summed in float32 (float64 weights in float64), rounded to the
        weight's dtype once. A packed map becomes a plain one first.
        """
        self.unpack(address)
        weight = self.weight(address)
        wide = torch.promote_types(weight.dtype, torch.float32)
        dense = update if isinstance(update, Tensor) else update.dense()
        if tuple(dense.shape) != tuple(weight.shape):
            raise KtError(
                f"{address}: the update is {tuple(dense.shape)}, the weight {tuple(weight.shape)}; "
                "give it as (d_out, d_in)"
            )
        with self.writing():
            weight.copy_((weight.to(wide) + dense.to(weight.device, wide)).to(weight.dtype))
            effects_of(self.module).prompts.clear()

    def writing(self) -> AbstractContextManager[None]:
        """Keep other threads from writing these weights inside the block; they, and this one if late, get a KtError."""
        return sole_writer(self.module, self.name)

    @contextmanager
    def restored(self, addresses: Iterable[Address]) -> Iterator[None]:
        """Keep the weights at `addresses`: on exit, also after an exception, they hold the exact bytes that they held
        on entry, and the model has the effects that it had.

        Raises:
            KtError: another thread is writing them; or a block that began later is still open, and brings the bytes of
                weights that both write back when it ends.
        """
        with self.writing():
            kept, blocks = Kept(self.copies(addresses), self.effects), open_blocks(self.module)
            blocks.append(kept)
            ended = False
            try:
                yield
                ended = True
            finally:
                shared = leave(kept, self.identity_of, blocks, self.effects)
                try:
                    self._copy_back(kept.copies, kept.effects)
                except BaseException:  # a second Ctrl-C must not leave half of it
                    self._copy_back(kept.copies, kept.effects)
                    raise
                if shared:
                    say = (
                        f"edits of {self.name} were not left in the reverse of their order: {shared[0]} holds this one "
                        "until the later one is left, which brings back the bytes from before both; use a model a task"
                    )
                    if ended:
                        raise KtError(say)
                    warn_user(say)

    def copies(self, addresses: Iterable[Address]) -> dict[str, Copy]:
        """The bytes of the weights at `addresses` (sites or parameter names), by name, for `put_back`; of a packed map
        the map itself, which nothing writes into."""
        names = dict.fromkeys(map(self.name_of, addresses))
        return {name: self.packed(name) or self.own(name).detach().clone() for name in names}

    def holds(self, name: str, copy: Copy) -> bool:
        """Whether a weight is as `copies` found it."""
        return self.packed(name) is copy if isinstance(copy, nn.Module) else torch.equal(self.own(name), copy)

    def tensor_of(self, name: str, copy: Copy) -> Tensor:
        """The numbers of a weight as `copies` found it."""
        return dequantised(copy, self.dtype, name) if isinstance(copy, nn.Module) else copy

    def put_back(self, copies: Mapping[str, Copy], effects: Sequence[Effect] | None = None) -> None:
        """Write `copies`, weights by name, and the effects where they are given."""
        with self.writing():
            self._copy_back(copies, effects)

    @torch.no_grad()
    def _copy_back(self, copies: Mapping[str, Copy], effects: Sequence[Effect] | None) -> None:
        for name, kept in copies.items():
            if isinstance(kept, nn.Module):
                put(self.module, name.removesuffix(".weight"), kept)
            else:
                self.unpack(name)
                self.own(name).copy_(kept)
        if effects is not None and tuple(effects) != self.effects:
            self.effects = effects
        effects_of(self.module).prompts.clear()

    # Packed maps: see packed.py -------------------------------------------------------------------------------------
    def packed(self, address: Address) -> nn.Module | None:
        """The linear map that keeps the weight at `address` packed now; None for a plain weight."""
        path, _, part = self.name_of(address).rpartition(".")
        if part != "weight":
            return None
        try:
            module = self.module.get_submodule(path)
        except AttributeError:
            return None
        return module if is_packed(module) else None

    def packing(self, addresses: Iterable[Address]) -> dict[str, str]:
        """How the weights among `addresses` that are packed now are kept, by name: library and class."""
        found = {name: self.packed(name) for name in map(self.name_of, addresses)}
        return {name: kind_of(module) for name, module in found.items() if module is not None}

    def unpack(self, address: Address) -> None:
        """Put a plain linear map in a packed one's place, with its dequantised weight in the model's dtype.

        Raises:
            KtError: the dequantised weight does not give the map's outputs.
        """
        name, module = self.name_of(address), self.packed(address)
        if module is not None:
            put(self.module, name.removesuffix(".weight"), plain_map(module, self.dtype, name))

    @contextmanager
    def opened(self, addresses: Iterable[Address]) -> Iterator[None]:
        """Inside the block the weights are plain parameters, to be trained; then all is as before."""
        names = [self.name_of(address) for address in addresses]
        with self.restored(names):
            for name in names:
                self.unpack(name)
            yield

    def name_of(self, address: Address) -> str:
        """The parameter name of an `address`: a site, or a parameter name already."""
        return address if isinstance(address, str) else self.weight_name(address)

    def own(self, address: Address) -> Tensor:
        """The parameter at `address` itself, in the module's own orientation; an offloaded one comes home to its
        device. Of a packed map it is its dequantised weight, a copy.

        Raises:
            KtError: it is quantised and cannot be dequantised, or offloaded and there is no room for it.
        """
        name = self.name_of(address)
        if (module := self.packed(name)) is not None:
            return dequantised(module, self.dtype, name)
        weight: Any = self._parameter(name)
        if weight.is_meta:
            weight = bring_home(self.module, name)
        if not weight.is_floating_point():
            raise KtError(f"{name} is quantised ({weight.dtype}); load the model unquantised to edit it")
        return weight

    def identity_of(self, name: str) -> int:
        """A number that two names share only where they mean one weight."""
        return id(self.packed(name) or self.own(name))

    def read_only(self, name: str) -> Tensor:
        """The content of the parameter `name`, not to be written: an offloaded one stays where it is."""
        return content(self.module, name, self._parameter(name))

    def _parameter(self, name: str) -> nn.Parameter:
        try:
            return self.module.get_parameter(name)
        except AttributeError:
            raise UnknownSite(
                f"{self.name} has no weight called {name!r}; name one of its own, or load the model that has it"
            ) from None

    def fingerprint(self, addresses: Iterable[Address] | None = None) -> str:
        """SHA-256 over the names, dtypes, shapes and bytes of all weights, or of those addressed.

        Args:
            addresses: sites or parameter names; None takes all weights. Of a packed map its packed tensors count.
        """
        if addresses is None:
            return fingerprint_in_order(contents(self.module))
        return fingerprint_of(pair for name in map(self.name_of, addresses) for pair in self._stored(name))

    def _stored(self, name: str) -> Iterator[tuple[str, Tensor]]:
        if (module := self.packed(name)) is None:
            yield name, self.read_only(name)
        else:
            path = name.removesuffix("weight")
            yield from ((f"{path}{key}", tensor) for key, tensor in stored(module).items())
