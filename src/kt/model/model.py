"""`TracedModel`: one handle that reads, patches and writes any causal language model through nnsight.

Sites have one meaning in every family: a linear map of a block (`layout.linears`), or `hidden`, the residual stream
after the block. The *key* of a map is its input, the *value* its output. `attn` alone is W_o and `mlp` alone down_proj,
whose values are their modules' own outputs; for GQA the key of W_o has n_heads * head_dim columns. Weights are always
seen as (d_out, d_in).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial, reduce
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .._util.kinds import Wanted
from ..errors import BadFact, KtError, UnknownModel, UnknownSite
from .chat import Chat, ChatReader, choose
from .devices import execution_device, refuse_wrapped, require_gradients, require_start
from .effects import Effect, effects_of
from .explained import Explained, explained, settle
from .finding import find_layout, most_positions
from .head import is_widened, wide_linear
from .layout import Layout, unwrap_tuple
from .mixture import MixtureSite
from .packed import is_packed, keep_as_stored
from .sampling import continued
from .sites import Kind, Site
from .tokens import Batch, encode
from .validation import last_called, understood, validate
from .weights import Weights

__all__ = ["TracedModel"]

Point = tuple[Any, Literal["input", "output"]]
"""An envoy and the side of it on which a tensor stands."""


class LinearIO(NamedTuple):
    """Inputs of a linear map and the gradients of a loss with respect to its outputs; on the CPU.

    The loss's gradient with respect to the map's weight is the sum over positions of gradient ⊗ key.
    """

    keys: Float[Tensor, "*position d_in"]
    gradients: Float[Tensor, "*position d_out"]


class TracedModel(Weights):
    """An nnsight model plus named sites. Made by `kt.load`."""

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        name: str,
        revision: str | None = None,
        layout: Mapping[str, str] | None = None,
        borrowed: bool = True,
    ) -> None:
        """`borrowed`: the module is the caller's, who gets its training flags back; else it is at rest for good."""
        require_start(module)
        refuse_wrapped(module)
        keep_as_stored(module)
        if not getattr(module, "can_generate", lambda: False)():
            raise UnknownModel(
                f"{type(module).__name__} is no language model that generates (transformers' GenerationMixin); load "
                "one with AutoModelForCausalLM"
            )
        from .at_rest import RestingModel, SharedModel, padding_kept

        self.module: Any = module if borrowed else module.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        if isinstance(said := getattr(tokenizer, "deprecation_warnings", None), dict):
            said["sequence-length-is-longer-than-the-specified-maximum"] = True  # kt checks lengths, and says which
        self.name = name
        self.revision = revision
        self.borrowed = borrowed
        self.given_layout = None if layout is None else dict(layout)
        with self.at_rest(), padding_kept(tokenizer):
            self.layout: Layout = find_layout(module, layout)
            with _only_critical():  # text generation with a multimodal wrapper works, and is called an error
                kind = RestingModel if borrowed else SharedModel
                self.root: Any = kind(module, tokenizer=tokenizer, task="text-generation")
            with understood(module):
                self.layout = self.layout if layout else last_called(self)
                self.layout = validate(self)
                self.layout = settle(self)

    # Where it runs ----------------------------------------------------------------------------------------------
    remote = False
    borrowed = False
    given_layout: Mapping[str, str] | None = None
    """The paths of parts that the caller named."""
    chat: ChatReader | None = None
    """How prompts stand in a chat template; None for prompts that are read as they stand."""

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """The module in evaluation mode, its weights without gradients, inside the block; see at_rest.py."""
        from .at_rest import at_rest

        with at_rest(self.module) if self.borrowed else nullcontext():
            yield

    @contextmanager
    def one_forward(self) -> Iterator[None]:
        """No other thread runs the module inside the block; see at_rest.py. Traces see to it themselves."""
        from .at_rest import one_forward

        with one_forward(self.module):
            yield

    @property
    def nnsight(self) -> Any:
        """The nnsight model, for traces that run here alone.

        A trace that a remote model may be sent is opened on `root` with `backend()`, and its block names nothing but
        envoys, tensors, plain values and functions of torch: what it names travels with it.
        """
        return self.root

    def backend(self) -> Any:
        """What runs the traces on `root`; None is this process."""
        return None

    def require_weights(self, what: str) -> None:
        """Refuse, before any work, what needs the weights here; a model whose weights are here refuses nothing."""

    @property
    def reader(self) -> Any:
        """What turns prompts into tokens: the tokenizer, inside a chat template where `chat` is set."""
        return self.chat or self.tokenizer

    def asked(self, chat: Chat | str | None) -> TracedModel:
        """The same model and weights, asked in another way: a handle beside this one.

        Args:
            chat: as for `kt.load`: `auto`, `always`, `never`, or a `Chat`.

        Raises:
            UnknownModel: there is no chat template, or it has no place for a setting.
        """
        other = copy.copy(self)
        other.chat = choose(self, chat)[0]
        return other

    # What it is -------------------------------------------------------------------------------------------------
    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.layout.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.layout.d_model

    @property
    def device(self) -> torch.device:
        """Where inputs go: with a device_map, where the embedding computes."""
        return execution_device(self.embedding)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding's weights."""
        return self.embedding.weight.dtype

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the logits are over."""
        return int(self.head.out_features if is_packed(self.head) else self.head.weight.shape[0])

    @property
    def embedding(self) -> Any:
        """The token embedding's module."""
        return self.module.get_submodule(self.layout.embed)

    @property
    def head(self) -> Any:
        """The unembedding's module."""
        return self.module.get_submodule(self.layout.unembed)

    def __repr__(self) -> str:
        return f"TracedModel({self.name}: {self.layout.describe()})"

    @property
    def effects(self) -> tuple[Effect, ...]:
        """What the edits that are applied add beside the weights, in order; setting it puts their hooks into
        modules' forwards and takes them out."""
        return effects_of(self.module).applied

    @effects.setter
    def effects(self, effects: Sequence[Effect]) -> None:
        effects_of(self.module).become(self, effects)

    # Where things are (envoys: use inside a trace) --------------------------------------------------------------
    def envoy(self, path: str) -> Any:
        """The nnsight envoy at a module path."""
        step = lambda at, part: at[int(part)] if part.isdigit() else getattr(at, part)  # noqa: E731
        return reduce(step, path.split("."), self.root)

    def block(self, layer: int) -> Any:
        """The nnsight envoy of the block at `layer`, counted from 0."""
        return self._blocks[self.checked(layer)]

    def projection(self, kind: Kind | str | Site, layer: int | None = None) -> Any:
        """The envoy of a site's linear map: `.input` is the key, `.output` the value.

        Args:
            kind: A site; or a kind or a role (`mlp.up_proj`) with its `layer`.

        Raises:
            UnknownSite: the residual stream, or the model has no such layer or linear map.
            KtError: the module was changed after it was loaded, at this site.
        """
        site = kind if isinstance(kind, Site) else Site(kind, int(layer or 0))
        if site not in self._projections:
            mixture = self.mixture_of(site)
            if mixture is None:
                self.linear(site)
            self._projections[site] = (
                self.envoy(self.layout.path(site))
                if mixture is None
                else MixtureSite(self, mixture, site.layer, site.name if site.role else None)
            )
        found = self._projections[site]
        if not isinstance(found, MixtureSite) and not self.remote and found._module is not self.linear(site):
            raise KtError(  # the map inside a LoRA, say, whose values are not the site's
                f"the module was changed after kt.load ({found._module.__class__.__name__} at {site} is not in its "
                "place any more); load it again with kt.load(module, tokenizer=tokenizer), or take out what was put in"
            )
        return found

    @cached_property
    def embed(self) -> Any:
        return self.envoy(self.layout.embed)

    @cached_property
    def _blocks(self) -> list[Any]:
        return [self.envoy(f"{self.layout.blocks}.{i}") for i in range(self.n_layers)]

    @cached_property
    def explained(self) -> list[Explained]:
        """How attention and MLP make up every block's change, by running two tokens (see explained.py).

        Run once: an edit changes neither the norms behind W_o and down_proj nor a block's multiplier.
        """
        return explained(self)

    @cached_property
    def _projections(self) -> dict[Site, Any]:
        return {}

    def value(self, site: Site, rows: int) -> Float[Tensor, "row pos d_out"]:
        """The value at a site inside a trace: a live tensor, for reading or in-place patching.

        `rows` is the batch size there: OPT's MLP works on flattened rows, which this undoes (as a view).
        """
        if site.kind is Kind.RESID:
            return unwrap_tuple(self.block(site.layer).output)
        return _unflattened(self.projection(site).output, rows)

    def key(self, site: Site, rows: int) -> Float[Tensor, "row pos d_in"]:
        """The key at `site` inside a trace of `rows` rows: the input of its linear map."""
        return _unflattened(self.projection(site).input, rows)

    def set_hidden(self, layer: int, hidden: Float[Tensor, "row pos d_model"]) -> None:
        """Put `hidden` in the place of the residual stream after the block at `layer`, inside a trace."""
        block = self.block(layer)
        block.output = (hidden, *block.output[1:]) if self.layout.tuple_output else hidden

    # Running ----------------------------------------------------------------------------------------------------
    def why_unreadable(self, ids: Sequence[int]) -> str | None:
        """Why the model cannot read a row of token `ids`, with its count and the limit; None if it can."""
        return self._why_unreadable(len(ids), max(ids, default=0))

    def _why_unreadable(self, length: int, token: int) -> str | None:
        limit, rows = self.most_positions, len(self.embedding.weight)
        if limit is not None and limit < length:
            return f"the prompt has {length} tokens, and the model {limit} positions"
        return f"the tokenizer gives token {token}, and the embedding has {rows} rows" if token >= rows else None

    @property
    def most_positions(self) -> int | None:
        """The longest row that the configuration says the model reads, in tokens; None where it names no limit."""
        return most_positions(self.module)

    def inputs(self, batch: Batch, keep: int | None = 1, cache: Any = None) -> dict[str, Any]:
        """Keyword arguments of one forward: mask and the positions that follow from it, cache, few logits.

        Args:
            batch: the rows to run.
            keep: number of last positions whose logits are computed; None for all.
            cache: a key-value cache to read and extend.

        Raises:
            BadFact: a row has more tokens than the model has positions, or a token that the embedding lacks.
        """
        read = batch.ids.numel() > 0
        if problem := read and self._why_unreadable(int(batch.lengths.max()), int(batch.ids.max())):
            raise BadFact(f"{self.name}: {problem}; leave it out, or use the model's own tokenizer")
        batch = batch.to(self.device)
        arguments: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask}
        if "position_ids" in self._forward_parameters:
            arguments["position_ids"] = batch.positions
        if keep is not None and "logits_to_keep" in self._forward_parameters:
            arguments["logits_to_keep"] = keep
        return arguments | self.cache_arguments(cache)

    @cached_property
    def cache_keyword(self) -> str | None:
        """The name under which `forward` takes a `DynamicCache`, or None when it takes none.

        Transformers renamed `past_key_values` to `cache` within version 5, and a model with code of its own may have
        either. Models with state-space layers take a cache of their own kind under the same name.
        """
        takes_default = getattr(self.module, "_supports_default_dynamic_cache", lambda: True)
        if not takes_default():
            return None
        return next((name for name in ("past_key_values", "cache") if name in self._forward_parameters), None)

    def cache_arguments(self, cache: Any) -> dict[str, Any]:
        """Keyword arguments of a forward that reads and extends a key-value cache; None asks for no cache."""
        if cache is None:
            return {"use_cache": False}
        assert self.cache_keyword is not None, "prefix_is_reusable says that this model takes no cache"
        return {self.cache_keyword: cache, "use_cache": True}

    @cached_property
    def _forward_parameters(self) -> set[str]:
        return set(inspect.signature(self.module.forward).parameters)

    @torch.no_grad()
    def logits(self, batch: Batch, keep: int = 1) -> Float[Tensor, "row keep vocab"]:
        """Logits of the last `keep` positions of every row of `batch`, float32."""
        root, head, read = self.root, self.envoy(self.layout.unembed), self._read_head
        with root.trace(**self.inputs(batch, keep), backend=self.backend()):
            states = head.input[:, -keep:].contiguous()  # see head_logits
            if read is None:
                head.input = states
            else:
                head.skip(read(states))
            out = root.output.logits[:, -keep:].save()
        return out.float()

    def last_logits(self, keep: int = 1) -> Any:
        """Inside a trace: logits of the last `keep` positions, the only ones that the head is given."""
        return self.head_logits(self.envoy(self.layout.unembed).input[:, -keep:].contiguous())

    def head_logits(self, states: Float[Tensor, "row pos d_model"]) -> Any:
        """Inside a trace: the model's logits with these states in the place of the head's input.

        They must be dense: on the strided view that `logits_to_keep` makes, torch multiplies row by row and reads the
        whole head once for each. The head of a 16-bit model is read in float32, and so is what the model does with
        the logits then (scales, soft-caps); see head.py.
        """
        head, read = self.envoy(self.layout.unembed), self._read_head
        if read is None:
            head.input = states
        else:
            head.skip(read(states))
        return self.nnsight.output.logits[:, -states.shape[1] :]

    @property
    def _read_head(self) -> Callable[[Tensor], Tensor] | None:
        """What reads the head in float32; None where the model's own forward does as well, or runs elsewhere."""
        with self.at_rest():  # only what is being trained takes gradients there
            widened = not self.remote and is_widened(self.head)
        return partial(wide_linear, self.head) if widened else None

    @torch.no_grad()
    def read(
        self,
        batch: Batch,
        sites: Iterable[Site],
        end: Literal["key", "value"] = "value",
        at: Int[Tensor, " row"] | None = None,
    ) -> dict[Site, Float[Tensor, "row d"]]:
        """Keys or values at sites, at one column of each row (`at`) or at all of them.

        Args:
            batch: the rows to run.
            sites: where to read.
            end: `key` is the input of a site's linear map, `value` its output.
            at: one column of each row; None reads all columns.

        Returns:
            By site, (row, d), or (row, pos, d) of all columns.
        """
        sites = self.in_order(sites)
        return dict(zip(sites, self.gather(batch, [self.point(site, end) for site in sites], at), strict=True))

    def point(self, site: Site, end: Literal["key", "value"] = "value") -> Point:
        """Where a site's value or key (`end`) is seen."""
        if site.kind is Kind.RESID:
            return self.block(site.layer), "output"
        return self.projection(site), "input" if end == "key" else "output"

    @torch.no_grad()
    def gather(
        self, batch: Batch, points: Sequence[Point], at: Int[Tensor, "row ..."] | None = None
    ) -> list[Float[Tensor, "row ... d"]]:
        """What stands on the sides of modules, named in forward order: at some columns of each row, or at all.

        Args:
            batch: the rows to read, in one forward.
            points: inputs or outputs of modules, in the order in which a forward reaches them.
            at: columns of each row; None takes all.

        Returns:
            One tensor a point, (row, ..., width).
        """
        n, columns = len(batch), at if at is not None else torch.zeros(0)
        rows = torch.arange(n).view(n, *[1] * (columns.dim() - 1))
        with self.root.trace(**self.inputs(batch), backend=self.backend()) as tracer:
            found: Any = []
            for envoy, end in points:
                if isinstance(envoy, MixtureSite) and end == "input" and len(columns):  # wide: only what is read
                    places = (rows * batch.ids.shape[1] + columns.cpu()).flatten()
                    found.append(envoy.read(places)[0].view(*columns.shape, -1).clone())
                    continue
                full = getattr(envoy, end)
                full = full[0] if isinstance(full, tuple) else full
                full = full if full.dim() == 3 else full.view(n, -1, full.shape[-1])
                found.append(full[rows.to(full.device), columns.to(full.device)] if len(columns) else full.clone())
            found.save()
            tracer.stop()
        return found

    @torch.no_grad()
    def routing(self, batch: Batch, layers: Iterable[int]) -> dict[int, Float[Tensor, "row pos expert"]]:
        """What a router sends where: by layer, the weight of each expert for each token, zero where it gets none of it.

        Args:
            batch: the rows to run; padding is routed too.
            layers: layers whose MLP is a mixture of experts.

        Raises:
            UnknownSite: a layer has none.
        """
        sites = {layer: self.projection(Site(Kind.MLP, layer)) for layer in sorted(set(layers))}
        for layer, site in sites.items():
            if not isinstance(site, MixtureSite):
                raise UnknownSite(f"block {layer} of {self.name} has no mixture of experts; print(model) shows them")
        with self.root.trace(**self.inputs(batch), backend=self.backend()) as tracer:
            found: Any = {layer: site.gates().view(*batch.ids.shape, -1).clone() for layer, site in sites.items()}
            found.save()
            tracer.stop()
        return dict(found)

    def linear_io(
        self,
        batch: Batch,
        sites: Iterable[Site],
        loss: Callable[[Float[Tensor, "row keep vocab"]], Float[Tensor, ""]],
        keep: int = 1,
        at: tuple[Int[Tensor, " position"], Int[Tensor, " position"]] | None = None,
    ) -> dict[Site, LinearIO]:
        """Inputs and output-gradients of linear maps, from one forward and one backward for all of them.

        A zero is added to each output; its gradient is the output's. No parameter gets a gradient. With a loss that is
        a sum over rows, a row's numbers do not depend on its batch.

        Args:
            batch: Token rows.
            sites: Linear maps, in any order (see `site`).
            loss: Takes the logits of the last `keep` positions, float32 (float64 in a float64 model), and gives a
                scalar.
            keep: Number of last positions whose logits the loss reads.
            at: Rows and columns of the positions to read, one pair a position. None reads all, padding included (whose
                gradients are zero).

        Returns:
            For each site keys and gradients in the model's dtype, (position, d) in the order of `at`, or (row, column,
            d) of all positions.

        Raises:
            UnknownSite: a site is the residual stream, or the model has no such layer or linear map.
            KtError: the model is remote.
        """
        require_gradients("linear_io")
        sites, size = self.in_order(sites), len(batch)
        where = at if at is not None else (slice(None), slice(None))
        shape = (len(at[0]),) if at is not None else tuple(batch.ids.shape)
        zeros = {s: torch.zeros(*shape, self.value_size(s), dtype=self.dtype, requires_grad=True) for s in sites}
        keys: dict[Site, Tensor] = {}
        with torch.enable_grad():
            with self.nnsight.trace(**self.inputs(batch, keep)):
                for site in sites:
                    key: Any = self.key(site, size)
                    keys[site] = key[where].detach().clone().save()
                    value: Any = self.value(site, size)
                    moved = value.clone()  # a view of a forward's own tensor cannot be made part of the graph in place
                    moved[where] += zeros[site].to(value)
                    projection: Any = self.projection(site)
                    projection.output = moved.view_as(projection.output)
                logits = self.last_logits(keep).save()
            scalar = loss(logits.to(torch.promote_types(logits.dtype, torch.float32)))
            gradients = torch.autograd.grad(scalar, list(zeros.values()))
        return {s: LinearIO(keys[s].cpu(), g) for s, g in zip(sites, gradients, strict=True)}

    @torch.no_grad()
    def embedded(self, ids: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos d_embed"]:
        """What the embedding module makes of token `ids`."""
        with self.one_forward():
            return self.embedding(ids.to(self.device))

    @torch.no_grad()
    def unembed(
        self,
        hidden: Float[Tensor, "row d_model"],
        final_norm: bool = True,
        then: Callable[[Tensor], Any] | None = None,
    ) -> Any:
        """Logits of residual-stream vectors by the model's own tail: final norm, head, scales and soft-caps.

        Every block is skipped and the last one's output replaced, so nothing of the tail is written again here.
        Without `final_norm` that norm passes its input on; the rest of the tail stays. With `then`, a function of
        torch alone, what that makes of the (row, vocab) logits: less than they are to be sent.

        Args:
            hidden: residual-stream vectors, one a row.
            final_norm: apply the model's final norm first.
            then: a function of torch alone that is given the (row, vocab) logits.

        Returns:
            Logits (row, vocab), or what `then` makes of them.
        """
        root, embed, blocks, rows, as_tuple = self.root, self.embed, self._blocks, hidden, self.layout.tuple_output
        norm = None if final_norm or self.layout.norm is None else self.envoy(self.layout.norm)
        head, read = self.envoy(self.layout.unembed), self._read_head
        dummy = torch.zeros((len(rows), 1), dtype=torch.long, device=self.device)
        with root.trace(input_ids=dummy, use_cache=False, backend=self.backend()):
            like = embed.output
            stream = rows.to(like.device, like.dtype)[:, None]
            for block in blocks:
                block.skip((stream, None) if as_tuple else stream)
            if norm is not None:
                norm.output = norm.input.clone()
            if read is not None:
                head.skip(read(head.input))
            logits = root.output.logits[:, 0].float()
            found = logits if then is None else then(logits)
            found.save()
        return found

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        do_sample: bool = False,
        top_k: int | None = None,
        seed: int = 0,
    ) -> list[str]:
        """Continuations only, greedy or sampled. A sampled row depends on its prompt and the seed, not on its batch.

        Args:
            prompts: texts to continue.
            max_new_tokens: most tokens of a continuation.
            do_sample: draw each token; False takes the most probable one.
            top_k: draw among this many; None among all.
            seed: of the draws.

        Returns:
            The continuation of each prompt, without the prompt.
        """
        limits = [max_new_tokens] * len(prompts)
        rows = continued(self, prompts, limits, do_sample=do_sample, top_k=top_k, seed=seed)
        return [row.text(self.tokenizer) for row in rows]

    def encode(self, texts: Sequence[str]) -> Batch:
        """The `texts` as one batch of token rows, padded as the tokenizer does."""
        return encode(self.reader, texts).to(self.device)


@contextmanager
def _only_critical() -> Iterator[None]:
    """Silence transformers' log but for critical messages."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _unflattened(tensor: Tensor, rows: int) -> Tensor:
    return tensor if tensor.dim() == 3 else tensor.view(rows, -1, tensor.shape[-1])


A_MODEL: Wanted = ((TracedModel,), "the model that kt.load returns")
"""The model of a public function."""
