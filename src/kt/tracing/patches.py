"""Kinds of patches (a module's output, the residual stream, one attention head) and the data of patched runs.

mlp, attn          the output of down_proj, of W_o
hidden             the residual stream after a block
attn.h3            one head: its columns of W_o's input (with GQA too, W_o reads head_dim columns for every query head)
hidden-no-mlp      the residual stream with the MLP severed: in all later blocks its output at the patched token keeps
                   the value of the base run
hidden-no-attn     the same with attention severed (Meng et al. 2022, MEMIT, Figure 3)
mlp.e3             one expert of a mixture: what it adds to the mixture's output (W_3 times its gated key); `mlp.s0` is
                   a shared one
attn.second        the output of a second mixer beside the attention (Falcon-H1); mlp.second that of a dense MLP beside
                   a mixture (Granite)

In a layer that lacks the patched part (an attention head in a layer of another mixer) nothing is patched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from ..errors import BadFact, UnknownSite
from ..model.layout import ATTENTION
from ..model.model import TracedModel
from ..model.prefix import Prefix
from ..model.sites import Kind, Site
from ..model.tokens import Batch

End = Literal["key", "value"]
MODULES = {"mlp": Kind.MLP, "attn": Kind.ATTN}
SEVERED = "hidden-no-"
EVERY_HEAD, EVERY_EXPERT = "heads", "experts"
SECONDS = ("attn.second", "mlp.second")
KINDS = ("mlp", "attn", "hidden", f"{SEVERED}mlp", f"{SEVERED}attn", EVERY_HEAD, EVERY_EXPERT, *SECONDS)
"""The values of `kinds`; besides them `attn.h3` is one head, `mlp.e3` one expert and `mlp.s0` a shared one. `heads` and
`experts` stand for all of them."""
EXPERTS = {"e": "experts", "s": "shared"}


class Source(NamedTuple):
    """A tensor of a forward: a projection's input (`key`) or output (`value`), or a block's output (`value`)."""

    site: Site
    end: End


@dataclass(frozen=True)
class Patch:
    """One kind of patch; `label` is its name in traces and on the command line."""

    kind: Kind
    head: int | None = None
    severed: Kind | None = None
    role: str = ""
    """Of an expert or a second part, as in its `Site`."""

    @property
    def label(self) -> str:
        """The patch's name, which `parse` reads."""
        if self.head is not None:
            return f"{self.kind}.h{self.head}"
        if self.role:
            part, _, number = self.role.rpartition(".")
            return f"{self.kind}.{part[0]}{number}" if part else f"{self.kind}.{self.role}"
        return str(self.kind) if self.severed is None else f"{SEVERED}{self.severed}"

    @property
    def end(self) -> End:
        """The side of the projection that is patched: W_o's input for a head, else an output."""
        return "value" if self.head is None else "key"

    @property
    def is_hidden(self) -> bool:
        """Whether the residual stream is patched."""
        return self.kind is Kind.RESID

    def source(self, layer: int) -> Source:
        """The patched tensor at a layer."""
        return Source(Site(self.kind, layer, self.role), self.end)

    @classmethod
    def parse(cls, label: str) -> Patch:
        """The patch of a label.

        Raises:
            BadFact: the label is unknown.
        """
        if label.startswith(SEVERED) and (module := MODULES.get(label.removeprefix(SEVERED))):
            return cls(Kind.RESID, severed=module)
        if match := re.fullmatch(r"attn\.h(\d+)", label):
            return cls(Kind.ATTN, head=int(match[1]))
        if match := re.fullmatch(r"mlp\.([es])(\d+)", label):
            return cls(Kind.MLP, role=f"{EXPERTS[match[1]]}.{match[2]}")
        if label in SECONDS:
            return cls(Kind(label.partition(".")[0]), role="second")
        if label in ("mlp", "attn", "hidden"):
            return cls(Kind(label))
        raise BadFact(f"kinds {label}: choose among {', '.join(KINDS)}, or one head as attn.h0")


def check_kinds(kinds: Sequence[str]) -> None:
    """Ask no model: are these words of `kinds`?

    Raises:
        BadFact: one of them is unknown.
    """
    for kind in kinds:
        if kind not in (EVERY_HEAD, EVERY_EXPERT):
            Patch.parse(kind)


def labels(model: TracedModel, kinds: Sequence[str]) -> tuple[str, ...]:
    """The labels of `kinds`, each once, with `heads` and `experts` replaced by the label of every one of them.

    Raises:
        UnknownSite: the model has no such head, expert or second part, or its heads do not divide W_o's input.
    """
    names: list[str] = []
    for kind in kinds:
        if kind == EVERY_HEAD:
            names += [f"attn.h{head}" for head in range(heads(model)[0])]
        elif kind == EVERY_EXPERT:
            names += experts(model)
        else:
            names.append(kind)
    for patch in map(Patch.parse, names):
        if patch.head is not None and patch.head >= (count := heads(model)[0]):
            raise UnknownSite(f"{model.name} has heads 0 to {count - 1}, not {patch.head}; choose among these")
        if not any(model.layout.has(patch.source(layer).site) for layer in range(model.n_layers)):
            has = experts(model) if patch.role.startswith(tuple(EXPERTS.values())) else ()
            *first, last = [str(kind) for kind in (Kind.MLP, Kind.ATTN, Kind.RESID) if model.layers_with(kind)]
            hint = f"it has {', '.join(has)}" if has else f"trace {', '.join(first)} or {last}"
            raise UnknownSite(f"no layer of {model.name} has {patch.label}; {hint}")
    return tuple(dict.fromkeys(names))


def experts(model: TracedModel) -> list[str]:
    """The labels of all experts, of the layer that has the most.

    Raises:
        UnknownSite: no layer is a mixture of experts.
    """
    mixtures = [parts.mixture for parts in model.layout.kinds.values() if parts.mixture is not None]
    if not mixtures:
        raise UnknownSite(f"{model.name} has no mixture of experts; trace mlp")
    routed = [f"mlp.e{number}" for number in range(max(mixture.count for mixture in mixtures))]
    return routed + [f"mlp.s{number}" for number in range(max(len(mixture.shared) for mixture in mixtures))]


def heads(model: TracedModel) -> tuple[int, int]:
    """The number of query heads, and the columns of W_o's input that each head has.

    Raises:
        UnknownSite: the heads do not divide W_o's input.
    """
    count = int(getattr(model.module.config.get_text_config(), "num_attention_heads", 0) or 0)
    layer = next((n for n, mixer in enumerate(model.layout.mixers) if mixer == ATTENTION), None)
    if layer is None or not count:
        raise UnknownSite(f"{model.name} has no attention, and so no heads; trace attn")
    columns = model.key_size(Site(Kind.ATTN, layer))
    if columns % count:
        raise UnknownSite(f"{model.name}: W_o reads {columns} columns, which {count} heads do not divide; trace attn")
    return count, columns // count


class Prompts(NamedTuple):
    """A run's rows, kept to run them again: token ids, and the noise added to the embeddings."""

    ids: Int[Tensor, "row pos"]
    noise: Float[Tensor, "row pos d_embed"] | None


def sources_at(
    model: TracedModel, patches: Sequence[Patch], layer: int, patched: bool = True, severed: bool = True
) -> list[Source]:
    """The sources of patches at a layer, and of what they sever, that the layer has, in the order of a forward: inside
    a trace, nnsight needs this order."""
    found = {patch.source(layer) for patch in patches if patched}
    found |= {Source(Site(patch.severed, layer), "value") for patch in patches if severed and patch.severed}
    there = [source for source in found if _has(model, source)]
    places = {site: number for number, site in enumerate(model.in_order(source.site for source in there))}
    return sorted(there, key=lambda source: (places[source.site], source.end == "value"))


def _has(model: TracedModel, source: Source) -> bool:
    """Whether the model has it; heads stand in attention only."""
    layout = model.layout
    return layout.has(source.site) and (source.end == "value" or layout.at(source.site.layer).mixer == ATTENTION)


class Run(NamedTuple):
    """The kept tensors of a forward: one row for each fact, or facts x samples rows (samples innermost).

    `inputs` holds every block's input, `prefixes` every block's keys and values (None where they cannot be reused).
    """

    inputs: list[Float[Tensor, "row pos d_model"]]
    prefixes: list[Prefix] | None
    values: dict[Source, Float[Tensor, "row pos d"]]
    scores: Float[Tensor, "metric row"]
    prompts: Prompts | None = None  # remote models only, which keep nothing else (see remote_patch.py)


def unpadded_batch(ids: Int[Tensor, "row pos"]) -> Batch:
    """Rows of equal length as a batch without padding."""
    return Batch(ids, torch.ones_like(ids))


def readout(
    logits: Float[Tensor, "row keep vocab"], answers: Int[Tensor, "row keep"], foils: Int[Tensor, " row"] | None
) -> Float[Tensor, "metric row"]:
    """The scores of every row, in float32: p(r), logit(r) - logit(r') and log p(r) of one token r.

    Without foils the log-probability of all answer tokens together, each at the position where it is due.
    """
    logits = logits.float()
    right = logits.gather(2, answers.to(logits.device)[..., None])[..., 0]
    log_probs = right - logits.logsumexp(-1)
    if foils is None:
        return log_probs.sum(1)[None]
    wrong = logits[:, -1].gather(1, foils.to(logits.device)[:, None])[:, 0]
    return torch.stack([log_probs[:, -1].exp(), right[:, -1] - wrong, log_probs[:, -1]])


def live_tensor(model: TracedModel, source: Source, rows: int) -> Any:
    """The tensor of a source inside a trace, (row, pos, d); writing into it changes the forward."""
    return model.key(source.site, rows) if source.end == "key" else model.value(source.site, rows)


class PatchSource(NamedTuple):
    """One of the two runs of a batch, base or donor: `samples` rows for each fact, or one row for all samples."""

    run: Run
    samples: int

    def run_rows(self, rows: PatchRows, like: Tensor) -> Int[Tensor, " row"]:
        """For each patched row, the index of its row in this run, on the device of `like`."""
        return torch.as_tensor(rows.fact * self.samples + rows.sample % self.samples, device=like.device)

    def read(self, source: Source, rows: PatchRows, token: int) -> Float[Tensor, "row d"]:
        """For each patched row, this run's value of a source at `token`."""
        values = self.run.values[source]
        return values[self.run_rows(rows, values), token]


@dataclass(frozen=True)
class PatchBatch:
    """Facts with equal token counts: patched runs start from `base` and take the patched-in values from `donor`.

    `answers`, `foils`: see `readout`. `length` counts all tokens that are read: the prompt's, which are patched, and
    behind them all of the answer but its last.
    """

    base: PatchSource
    donor: PatchSource
    answers: Int[Tensor, "fact keep"]
    foils: Int[Tensor, " fact"] | None
    length: int
    samples: int
    patches: tuple[Patch, ...]
    head_size: int = 0
    grow: bool = True

    @property
    def keep(self) -> int:
        """The number of last positions that are scored."""
        return self.answers.shape[1]

    @property
    def prompt_length(self) -> int:
        """The number of tokens that are patched."""
        return self.length - self.keep + 1

    def asked(self, rows: PatchRows) -> tuple[Int[Tensor, "row keep"], Int[Tensor, " row"] | None]:
        """Each row's answer and foil."""
        facts = torch.as_tensor(rows.fact)
        return self.answers[facts], None if self.foils is None else self.foils[facts]


@dataclass(frozen=True)
class PatchRows:
    """Patched runs, one entry a row, sorted by the layer at which they enter."""

    fact: Int[ndarray, " row"]
    patch: Int[ndarray, " row"]  # index into the batch's patches
    hidden: Int[ndarray, " row"]  # 1 where the patch is of the residual stream
    layer: Int[ndarray, " row"]  # the window's centre
    first: Int[ndarray, " row"]  # the window's first layer
    stop: Int[ndarray, " row"]  # one past the window's last layer
    sample: Int[ndarray, " row"]

    def __len__(self) -> int:
        return len(self.fact)

    def __getitem__(self, at: slice | ndarray) -> PatchRows:
        return PatchRows(*(getattr(self, name)[at] for name in self.__dataclass_fields__))

    @property
    def enters(self) -> Int[ndarray, " row"]:
        """The first block to run. A patched block output is the next block's input."""
        return self.first + self.hidden


def patched_at(group: PatchBatch, rows: PatchRows, source: Source, from_layer: ndarray) -> Int[ndarray, " patched"]:
    """Indices of the rows that patch `source`: layers from each row's `from_layer` to the end of its window."""
    layer = source.site.layer
    patches = [i for i, patch in enumerate(group.patches) if patch.source(layer) == source]
    return np.flatnonzero((from_layer <= layer) & (layer < rows.stop) & np.isin(rows.patch, patches))


def severed_at(group: PatchBatch, rows: PatchRows, source: Source) -> Int[ndarray, " severed"]:
    """Indices of the rows that keep `source` at its value in the base run."""
    site, layer = source.site, source.site.layer
    severs = source.end == "value" and not site.role
    patches = [i for i, patch in enumerate(group.patches) if severs and patch.severed is site.kind]
    return np.flatnonzero((rows.enters <= layer) & np.isin(rows.patch, patches))


def columns_of(group: PatchBatch, rows: PatchRows, end: End, width: int) -> Int[ndarray, "row_or_1 d"]:
    """The patched columns: all of a value, and each row's head's columns of W_o's input."""
    if end == "value":
        return np.arange(width)[None]
    head = np.array([patch.head or 0 for patch in group.patches])[rows.patch]
    return head[:, None] * group.head_size + np.arange(group.head_size)[None]
