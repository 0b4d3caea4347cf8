"""`TracedModel`: one handle that reads, patches and writes any causal language model through nnsight.

Sites have one meaning in every family. The *key* of a module is the input of its output projection (W_o or
down_proj), the *value* that projection's output; for GQA the key of W_o has n_heads * head_dim columns. `hidden` is
the residual stream after a block. Weights are always seen as (d_out, d_in).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, reduce
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import KtError, UnknownSite
from .layout import Layout, find_layout, first, linear_shape, validate
from .prompts import Batch, encode
from .sampling import continue_greedily_or_sample
from .sites import Kind, Site, Update, fingerprint_of

Address = Site | str


class TracedModel:
    """An nnsight model plus named sites. Made by `kt.load`."""

    def __init__(self, module: nn.Module, tokenizer: Any, name: str, revision: str | None = None) -> None:
        from nnsight import TransformersModel

        self.module: Any = module.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.layout: Layout = find_layout(module)
        self.nns: Any = TransformersModel(module, tokenizer=tokenizer, task="text-generation")
        self.layout = validate(self)

    # What it is -------------------------------------------------------------------------------------------------
    @property
    def n_layers(self) -> int:
        return self.layout.n_layers

    @property
    def d_model(self) -> int:
        return self.layout.d_model

    @property
    def device(self) -> torch.device:
        return self.module.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.get_input_embeddings().weight.dtype

    @property
    def vocab_size(self) -> int:
        return int(self.module.get_output_embeddings().weight.shape[0])

    def __repr__(self) -> str:
        return f"TracedModel({self.name}: {self.layout.describe()})"

    # Where things are (envoys: use inside a trace) --------------------------------------------------------------
    def envoy(self, path: str) -> Any:
        """The nnsight envoy at a module path."""
        step = lambda at, part: at[int(part)] if part.isdigit() else getattr(at, part)  # noqa: E731
        return reduce(step, path.split("."), self.nns)

    def block(self, layer: int) -> Any:
        return self._blocks[self.checked(layer)]

    def w(self, kind: Kind | Site, layer: int | None = None) -> Any:
        """W_o or down_proj: `.input` is the key, `.output` the value."""
        site = kind if isinstance(kind, Site) else Site(Kind(kind), int(layer or 0))
        return self._projections[Site(site.kind, self.checked(site.layer))]

    @cached_property
    def embed(self) -> Any:
        return self.envoy(self.layout.embed)

    @cached_property
    def _blocks(self) -> list[Any]:
        return [self.envoy(f"{self.layout.blocks}.{i}") for i in range(self.n_layers)]

    @cached_property
    def _projections(self) -> dict[Site, Any]:
        kinds = (Kind.ATTN, Kind.MLP)
        return {Site(k, i): self.envoy(self.layout.path(k, i)) for k in kinds for i in range(self.n_layers)}

    def checked(self, layer: int) -> int:
        if not 0 <= layer < self.n_layers:
            raise UnknownSite(f"{self.name} has layers 0 to {self.n_layers - 1}, not {layer}; choose among these")
        return layer

    def value(self, site: Site, rows: int) -> Float[Tensor, "row pos d_model"]:
        """The value at a site inside a trace: a live tensor, for reading or in-place patching.

        `rows` is the batch size there: OPT's MLP works on flattened rows, which this undoes (as a view).
        """
        if site.kind is Kind.RESID:
            return first(self.block(site.layer).output)
        return _unflattened(self.w(site).output, rows)

    def key(self, site: Site, rows: int) -> Float[Tensor, "row pos d_in"]:
        """The key at a site inside a trace."""
        return _unflattened(self.w(site).input, rows)

    def set_hidden(self, layer: int, hidden: Float[Tensor, "row pos d_model"]) -> None:
        """Replace the residual stream after a block, inside a trace."""
        block = self.block(layer)
        block.output = (hidden, *block.output[1:]) if self.layout.tuple_output else hidden

    # Running ----------------------------------------------------------------------------------------------------
    def inputs(self, batch: Batch, keep: int | None = 1, **extra: Any) -> dict[str, Any]:
        """Keyword arguments of one forward: mask and the positions that follow from it, no cache, few logits."""
        batch = batch.to(self.device)
        arguments: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
        if "position_ids" in self._forward_parameters:
            arguments["position_ids"] = batch.positions
        if keep is not None and "logits_to_keep" in self._forward_parameters:
            arguments["logits_to_keep"] = keep
        return arguments | extra

    @cached_property
    def _forward_parameters(self) -> set[str]:
        return set(inspect.signature(self.module.forward).parameters)

    @torch.no_grad()
    def logits(self, batch: Batch, keep: int = 1) -> Float[Tensor, "row keep vocab"]:
        """Logits of the last `keep` positions of every row, float32."""
        with self.nns.trace(**self.inputs(batch, keep)):
            out = self.last_logits(keep).save()
        return out.float()

    def last_logits(self, keep: int = 1) -> Any:
        """Inside a trace: logits of the last `keep` positions, the only ones that the head is given.

        As a dense matrix: on the strided view that `logits_to_keep` makes, torch multiplies row by row and reads the
        whole head once for each.
        """
        head = self.envoy(self.layout.unembed)
        head.input = head.input[:, -keep:].contiguous()
        return self.nns.output.logits[:, -keep:]

    @torch.no_grad()
    def read(
        self,
        batch: Batch,
        sites: Iterable[Site],
        end: Literal["key", "value"] = "value",
        at: Int[Tensor, " row"] | None = None,
    ) -> dict[Site, Float[Tensor, "row d"]]:
        """Keys or values at sites, at one column of each row (`at`) or at all of them."""
        sites = sorted(set(sites), key=lambda s: (s.layer, (Kind.ATTN, Kind.MLP, Kind.RESID).index(s.kind)))
        rows = torch.arange(len(batch), device=self.device)
        found: dict[Site, Any] = {}
        with self.nns.trace(**self.inputs(batch)) as tracer:
            for site in sites:
                full: Any = self.key(site, len(batch)) if end == "key" else self.value(site, len(batch))
                found[site] = (full.clone() if at is None else full[rows, at.to(full.device)]).save()
            tracer.stop()
        return found

    @torch.no_grad()
    def unembed(self, hidden: Float[Tensor, "row d_model"], final_norm: bool = True) -> Float[Tensor, "row vocab"]:
        """Logits of residual-stream vectors by the model's own tail: final norm, head, scales and soft-caps.

        Every block is skipped and the last one's output replaced, so nothing of the tail is written again here.
        Without `final_norm` that norm passes its input on; the rest of the tail stays.
        """
        rows = hidden.to(self.device, self.dtype)[:, None]
        dummy = torch.zeros((len(rows), 1), dtype=torch.long, device=self.device)
        filler = (rows, None) if self.layout.tuple_output else rows
        with self.nns.trace(input_ids=dummy, use_cache=False):
            for block in self._blocks:
                block.skip(filler)
            if not final_norm and self.layout.norm is not None:
                norm = self.envoy(self.layout.norm)
                norm.output = norm.input.clone()
            out = self.nns.output.logits.save()
        return out[:, 0].float()

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        do_sample: bool = False,
        top_k: int | None = None,
        seed: int = 0,
    ) -> list[str]:
        """Continuations only, greedy or sampled. A sampled row depends on its prompt and the seed, not on its batch."""
        return continue_greedily_or_sample(self, prompts, max_new_tokens, do_sample, top_k, seed)

    def encode(self, texts: Sequence[str]) -> Batch:
        return encode(self.tokenizer, texts).to(self.device)

    # Weights (an address is a site, for its projection, or any parameter's name) ----------------------------------
    def projection(self, site: Site) -> nn.Module:
        if site.kind is Kind.RESID:
            raise UnknownSite(f"{site} has no weight; edits go to attn.{site.layer} or mlp.{site.layer}")
        return self.module.get_submodule(self.layout.path(site.kind, self.checked(site.layer)))

    def weight_name(self, site: Site) -> str:
        self.projection(site)
        return self.layout.path(site.kind, site.layer) + ".weight"

    def site_of(self, weight_name: str) -> Site:
        """The site behind a weight's (or its module's) name."""
        path = weight_name.removesuffix(".weight")
        for site in self._projections:
            if self.layout.path(site.kind, site.layer) == path:
                return site
        raise UnknownSite(f"{self.name} has no W_o or down_proj called {weight_name!r}")

    def block_weights(self, layer: int) -> list[str]:
        """The names of every parameter of a block."""
        block = self.layout.path(Kind.RESID, self.checked(layer))
        return [f"{block}.{name}" for name, _ in self.module.get_submodule(block).named_parameters()]

    def weight(self, address: Address) -> Float[Tensor, "*shape"]:
        """The live weight: a linear map's as (d_out, d_in), a view, its orientation from the module's type."""
        weight = self.own(address)
        owner = self.module.get_submodule(self.name_of(address).rpartition(".")[0])
        return weight.T if isinstance(owner, Conv1D) and weight.dim() == 2 else weight

    def key_size(self, site: Site) -> int:
        return linear_shape(self.projection(site))[1]

    @torch.no_grad()
    def write(self, address: Address, update: Update | Float[Tensor, "*shape"]) -> None:
        """Add an update: summed in float32 (float64 weights in float64), rounded to the weight's dtype once."""
        weight = self.weight(address)
        wide = torch.promote_types(weight.dtype, torch.float32)
        dense = update if isinstance(update, Tensor) else update.dense()
        if tuple(dense.shape) != tuple(weight.shape):
            raise KtError(f"{address}: the update is {tuple(dense.shape)}, the weight {tuple(weight.shape)}")
        weight.copy_((weight.to(wide) + dense.to(weight.device, wide)).to(weight.dtype))

    @contextmanager
    def restored(self, addresses: Iterable[Address]) -> Iterator[None]:
        """On exit, also after an exception, the weights hold the exact bytes that they held on entry."""
        kept = self.copies(addresses)
        try:
            yield
        finally:
            try:
                self.put_back(kept)
            except BaseException:  # a second Ctrl-C must not leave half of it
                self.put_back(kept)
                raise

    def copies(self, addresses: Iterable[Address]) -> dict[str, Tensor]:
        """The weights' bytes, by name, for `put_back`."""
        return {name: self.own(name).detach().clone() for name in dict.fromkeys(map(self.name_of, addresses))}

    @torch.no_grad()
    def put_back(self, copies: Mapping[str, Tensor]) -> None:
        for name, weight in copies.items():
            self.own(name).copy_(weight)

    def name_of(self, address: Address) -> str:
        return address if isinstance(address, str) else self.weight_name(address)

    def own(self, address: Address) -> Tensor:
        """The parameter itself, in the module's own orientation."""
        name = self.name_of(address)
        try:
            weight: Any = self.module.get_parameter(name)
        except AttributeError:
            raise UnknownSite(
                f"{self.name} has no weight called {name!r}; name one of its own, or load the model that has it"
            ) from None
        if weight.is_meta:
            raise KtError(
                f"{name} is offloaded, and a write there would be lost; "
                "load with a device_map that keeps it on a device"
            )
        if not weight.is_floating_point():
            raise KtError(f"{name} is quantised ({weight.dtype}); load the model unquantised to edit it")
        return weight

    def fingerprint(self, addresses: Iterable[Address] | None = None) -> str:
        """SHA-256 over the names, dtypes, shapes and bytes of all weights, or of those addressed."""
        if addresses is None:
            named: Iterable[tuple[str, Tensor]] = self.module.state_dict().items()
        else:
            named = ((self.name_of(a), self.own(a)) for a in addresses)
        return fingerprint_of(named)


def _unflattened(tensor: Tensor, rows: int) -> Tensor:
    return tensor if tensor.dim() == 3 else tensor.view(rows, -1, tensor.shape[-1])
