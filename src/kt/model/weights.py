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
from .layout import W_MLP, Layout, linear_shape
from .mixture import EVERY, Mixture, slice_of
from .packed import dequantised, is_packed, kind_of, plain_map, put, stored
from .sites import Kind, Site
from .update import Dense, LowRank, Update, fingerprint_in_order, fingerprint_of
from .writer import Kept, for_good, leave, open_blocks, sole_writer

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
        self.key_size(site)
        return site

    def linear(self, site: Site) -> nn.Module:
        """The module of a site's linear map.

        Raises:
            UnknownSite: the residual stream, a mixture of experts, or the model has no such layer or linear map.
        """
        if self.mixture_of(site) is not None:
            raise UnknownSite(
                f"{site} of {self.name} is a mixture of experts, which has no one linear map; its parts are "
                f"{', '.join(map(str, [*self.parts(self.whole(site))][:2]))}, ..."
            )
        path = self.layout.path(site)
        try:
            return self.module.get_submodule(path)
        except AttributeError:
            raise UnknownSite(f"block {site.layer} of {self.name} has no {site.name} ({path}); others do") from None

    def require_linear(self, sites: Iterable[Site], what: str) -> None:
        """Refuse sites that are mixtures of experts.

        Raises:
            UnknownSite: one is.
        """
        for site in sites:
            if self.layout.has(site) and self.mixture_of(site) is not None:
                raise UnknownSite(
                    f"{site} of {self.name} is a mixture of experts, and {what} takes single linear maps; take memit, "
                    "ft or another method that solves for experts, or layers without them"
                )

    def layers_with(self, kind: Kind) -> tuple[int, ...]:
        """The layers whose block has an attention (or another mixer), or an MLP: nearly always all."""
        return tuple(layer for layer in range(self.layout.n_layers) if self.layout.has(Site(kind, layer)))

    def mixture_of(self, site: Site) -> Mixture | None:
        """The mixture of experts that a site is, or is a part of; None for a linear map.

        Raises:
            UnknownSite: the residual stream, or the model has no such layer.
        """
        if site.kind is Kind.RESID:
            raise UnknownSite(f"{site} has no weight; edits go to attn.{site.layer} or mlp.{site.layer}")
        parts = self.layout.at(self.checked(site.layer))
        if not self.layout.has(site):
            role = self.layout.role(site.name)
            raise UnknownSite(
                f"block {site.layer} of {self.name} has no {role}; it has {', '.join(parts.linears)}, others do"
            )
        mixture = parts.mixture
        whole = site.kind is Kind.MLP and not site.role
        return mixture if mixture is not None and (whole or site.name in mixture.roles) else None

    def parts(self, site: Site) -> dict[Site, slice]:
        """The sites of a mixture's parts with their columns of its key; of any other site itself with all of them."""
        mixture = self.mixture_of(site)
        if mixture is None or site.role:
            return {site: slice(None)}
        return {Site(role, site.layer): columns for role, columns in mixture.roles.items()}

    def is_expert(self, site: Site) -> bool:
        """Whether a site is an expert of a mixture, which not every token is sent to."""
        return site.role.startswith("experts.") and self.mixture_of(site) is not None

    def whole(self, site: Site) -> Site:
        """The mixture that a site is a part of, or the site itself."""
        return Site(Kind.MLP, site.layer) if site.role and self.mixture_of(site) is not None else site

    def weight_name(self, site: Site) -> str:
        """The parameter name of a site's weight; of a mixture of experts that of all its parts (`EVERY`)."""
        mixture = self.mixture_of(site)
        if mixture is not None:
            return f"{self.layout.path(Kind.RESID, site.layer)}.{mixture.weight(site.name)}"
        self.linear(site)
        return self.layout.path(site) + ".weight"

    def weight_names(self, address: Address) -> list[str]:
        """The names of the parameters, or of the slices of parameters, at an address."""
        name = self.name_of(address)
        if not name.endswith(EVERY):
            return [name]
        return [self.weight_name(part) for part in self.parts(self.site_of(name))]

    def site_of(self, weight_name: str) -> Site:
        """The site whose linear map has a weight, or is the module, of the name `weight_name`.

        Raises:
            UnknownSite: no linear map of attention or MLP is called so.
        """
        path = weight_name.removesuffix(".weight")
        number, _, inner = path.removeprefix(self.layout.blocks + ".").partition(".")
        if path.startswith(self.layout.blocks + ".") and number.isdigit() and int(number) < self.layout.n_layers:
            parts = self.layout.at(layer := int(number))
            roles = {own_path: role for role, own_path in parts.linears.items() if role != W_MLP or not parts.mixture}
            if parts.mixture is not None:
                names = {role: parts.mixture.weight(role) for role in (W_MLP, *parts.mixture.roles)}
                roles |= {name.removesuffix(".weight"): role for role, name in names.items()}
            if inner in roles:
                return Site(roles[inner], layer)
        raise UnknownSite(
            f"{self.name} has no linear map of attention or MLP called {weight_name!r}; model.layout.linears lists them"
        )

    dequantised: Mapping[str, str] = {}
    """How the checkpoint stores weights that were dequantised, by name."""

    def in_order(self, sites: Iterable[Site]) -> list[Site]:
        """Distinct sites in the order in which a forward pass reaches them, the order that a trace needs."""

        def place(site: Site) -> tuple[int, int]:
            parts = self.layout.at(site.layer)
            roles = [*parts.linears]
            if parts.mixture is not None:
                roles[roles.index(W_MLP) : roles.index(W_MLP)] = parts.mixture.roles_in_order
            at = len(roles) if site.kind is Kind.RESID else roles.index(self.layout.role(site.name))
            return site.layer, at

        return sorted(set(sites), key=place)

    def block_weights(self, layer: int) -> list[str]:
        """The names of every parameter of the block at `layer`."""
        block = self.layout.path(Kind.RESID, self.checked(layer))
        return [f"{block}.{name}" for name, _ in self.module.get_submodule(block).named_parameters()]

    def weight(self, address: Address) -> Float[Tensor, "*shape"]:
        """The live weight at `address`: a linear map's as (d_out, d_in), a view, its orientation from the module's
        type. It takes no gradient. Of a packed map it is the dequantised weight, no view; `unpack` makes it one.
        """
        name = self.name_of(address)
        if name.endswith(EVERY):
            return torch.cat([self.weight(each) for each in self.weight_names(name)], 1)
        weight = self.own(name).detach()
        path, number = slice_of(name)
        if number is not None:
            mixture = self.mixture_of(self.site_of(name))
            return weight.mT if mixture is not None and mixture.transposed else weight
        owner = self.module.get_submodule(path.rpartition(".")[0])
        return weight.T if isinstance(owner, Conv1D) and weight.dim() == 2 else weight

    def key_size(self, site: Site) -> int:
        """d_in: columns of a site's weight, the width of its input."""
        mixture = self.mixture_of(site)
        if mixture is not None:
            columns = mixture.roles[site.name] if site.role else slice(0, mixture.size)
            return columns.stop - columns.start
        return linear_shape(self.linear(site))[1]

    def value_size(self, site: Site) -> int:
        """d_out: rows of a site's weight, the width of its output."""
        return self.layout.d_model if self.mixture_of(site) is not None else linear_shape(self.linear(site))[0]

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
        if self.name_of(address).endswith(EVERY):
            with self.writing():
                for name, part in self.by_part(self.name_of(address), Dense(dense)).items():
                    self.write(name, part)
            return
        with self.writing():
            weight.copy_((weight.to(wide) + dense.to(weight.device, wide)).to(weight.dtype))
            effects_of(self.module).prompts.clear()

    def by_part(self, name: str, update: Update) -> dict[str, Update]:
        """An update by the names of the parameters, or the slices of them, that it changes.

        Of a mixture of experts only those experts are named whose columns are not all zero.
        """
        if len(update.shape) == 3:  # of the whole parameter, in the module's own orientation
            try:
                mixture = self.mixture_of(self.site_of(f"{name}{EVERY}"))
            except UnknownSite:  # of a convolution
                return {name: update}
            assert isinstance(update, Dense) and mixture is not None
            each = update.matrix.mT if mixture.transposed else update.matrix
            return {f"{name}[{number}]": Dense(part) for number, part in enumerate(each) if part.any()}
        if not name.endswith(EVERY):
            return {name: update}
        found: dict[str, Update] = {}
        for site, columns in self.parts(self.site_of(name)).items():
            if isinstance(update, Dense):
                part: Update = Dense(update.matrix[:, columns])
            else:
                part = LowRank(update.left, update.right[:, columns].contiguous())
            if part.norm() > 0:
                found[self.weight_name(site)] = part
        return found

    def by_whole(self, keys: Mapping[str, Float[Tensor, "d_in n"]]) -> dict[str, Float[Tensor, "d_in n"]]:
        """Keys by the names of maps, from keys by those of parameters: those of a mixture's parts as one, zero for
        parts that are not there."""
        found: dict[str, Tensor] = {}
        for name, each in keys.items():
            self._parameter(name)  # there
            site = self.site_of(name)
            whole = self.whole(site)
            if whole == site:
                found[name] = each
                continue
            key = found.setdefault(self.weight_name(whole), each.new_zeros(self.key_size(whole), each.shape[1]))
            key[self.parts(whole)[site]] = each
        return found

    def whole_updates(self, updates: Mapping[str, Update]) -> dict[str, Update]:
        """Updates by the names of maps, from updates by those of parameters (`by_part`)."""
        found: dict[str, Update] = {}
        for name, update in updates.items():
            try:
                site = self.site_of(name)
            except UnknownSite:  # of a norm, an embedding
                found[name] = update
                continue
            whole = self.whole(site)
            if whole == site:
                found[name] = update
                continue
            dense = torch.zeros(self.value_size(whole), self.key_size(whole), dtype=torch.float64)
            dense[:, self.parts(whole)[site]] = update.dense().to(dense)
            key = self.weight_name(whole)
            found[key] = found[key].plus(Dense(dense)) if key in found else Dense(dense)
        return found

    def writing(self) -> AbstractContextManager[None]:
        """Keep other threads from writing these weights inside the block; they, and this one if late, get a KtError."""
        return sole_writer(self.module, self.name)

    @contextmanager
    def restored(self, addresses: Iterable[Address]) -> Iterator[None]:
        """Keep the weights at `addresses`: on exit, also after an exception, they hold the exact bytes that they held
        on entry, and the model has the effects that it had, but for those that came or went for good (`apply_`).

        Raises:
            KtError: another thread is writing them; or a block that began later is still open, and brings the bytes of
                weights that both write back when it ends.
        """
        with self.writing():
            kept, ended = self.begin(self.copies(addresses), self.effects), False
            try:
                yield
                ended = True
            finally:
                self.end(kept, ended)

    def begin(self, copies: Mapping[str, Copy], effects: Sequence[Effect]) -> Kept:
        """A block that has weights and effects put back as they were at its beginning. `end` ends it, once. Both are
        called inside `writing`.
        """
        kept = Kept(dict(copies), tuple(effects))
        open_blocks(self.module).append(kept)
        return kept

    def end(self, kept: Kept, ended: bool = True) -> None:
        """End a block that `begin` began: its weights and effects are as they were then.

        Args:
            ended: whether the work inside came to its end; after an error of its own a warning says what is below.

        Raises:
            KtError: a block that began later is still open, and holds weights of this one until it ends.
        """
        shared = leave(kept, self.identity_of, open_blocks(self.module), self.effects)
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

    def require_free(self, names: Iterable[str], instead: str) -> None:
        """Refuse to write weights for good that an open block brings back when it ends: what is written would go.

        Args:
            names: of the weights.
            instead: what to do.

        Raises:
            KtError: an open block holds one of them.
        """
        held = {self.identity_of(name) for block in open_blocks(self.module) for name in block.copies}
        tensors = {tensor for tensor, _ in held}
        for name in names if held else ():
            tensor, part = self.identity_of(name)
            if {(tensor, part), (tensor, None)} & held or (part is None and tensor in tensors):
                raise KtError(
                    f"{name} is in a block that is open (`applied`, or a session), whose end brings its bytes back; "
                    f"{instead}"
                )

    def keep_effects(self, added: Sequence[Effect], gone: Sequence[Effect] = ()) -> None:
        """Note that effects came into the model, or went, for good: so they do when the open blocks end, each of which
        takes out its own alone."""
        for_good(open_blocks(self.module), added, gone)

    def copies(self, addresses: Iterable[Address]) -> dict[str, Copy]:
        """The bytes of the weights at `addresses` (sites or parameter names), by name, for `put_back`; of a packed map
        the map itself, which nothing writes into."""
        names = dict.fromkeys(name for address in addresses for name in self.weight_names(address))
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

    @contextmanager
    def undone_on_failure(self, addresses: Iterable[Address]) -> Iterator[tuple[dict[str, Copy], tuple[Effect, ...]]]:
        """The weights at `addresses` and the effects as they are (see `copies`), put back where the block fails."""
        with self.writing():
            before, effects = self.copies(addresses), self.effects
            try:
                yield before, effects
            except BaseException:
                self.put_back(before, effects)
                raise

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
        found = {name: self.packed(name) for each in addresses for name in self.weight_names(each)}
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

    def parameter_names(self, site: Site) -> list[str]:
        """The names of the whole parameters that hold a site's weight; experts have one for all of them."""
        return list(dict.fromkeys(slice_of(name)[0] for name in self.weight_names(site)))

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
            weight = bring_home(self.module, slice_of(name)[0])
            weight = weight if (number := slice_of(name)[1]) is None else weight[number]
        if not weight.is_floating_point():
            raise KtError(f"{name} is quantised ({weight.dtype}); load the model unquantised to edit it")
        return weight

    def identity_of(self, name: str) -> tuple[int, int | None]:
        """What two names share only where they mean one weight."""
        path, number = slice_of(name)
        return id(self.packed(name) or self.own(path)), number

    def read_only(self, name: str) -> Tensor:
        """The content of the parameter `name`, not to be written: an offloaded one stays where it is."""
        path, number = slice_of(name)
        whole = content(self.module, path, self._parameter(path))
        return whole if number is None else whole[number]

    def _parameter(self, name: str) -> Any:
        path, number = slice_of(name)
        try:
            whole = self.module.get_parameter(path)
            return whole if number is None else whole[number]
        except (AttributeError, IndexError):
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
        names = [name for address in addresses for name in self.weight_names(address)]
        return fingerprint_of(pair for name in names for pair in self._stored(name))

    def _stored(self, name: str) -> Iterator[tuple[str, Tensor]]:
        if (module := self.packed(name)) is None:
            yield name, self.read_only(name)
        else:
            path = name.removesuffix("weight")
            yield from ((f"{path}{key}", tensor) for key, tensor in stored(module).items())
