"""Fine-tuning as an edit: Adam steps on the chosen weights, over the requests and nothing else.

    FT      Adam until the loss is small (Zhu et al. 2020; the baselines of Meng et al. 2022, and EasyEdit's code)
    FT-L    after each step every weight is put back into [w₀ - ε, w₀ + ε] (Zhu et al. 2020, L∞; Meng et al. 2022)
    LocFT   FT-M of one layer, with the end of sequence in the target and the order drawn anew in each epoch
    FT-WD   all parameters of the chosen blocks, with weight decay in Adam (JEEP's baseline, of one block; its D.1)
    LoRA    the steps go to an adapter instead (`adapter.py`)

A request's loss is a mean over its target's tokens, a mini-batch's the mean over its requests:

    prompt_last   -log p(token) of all of them at the prompt's last token: a bag of tokens (original FT, FT-L)
    target_new    -log p(token) given the prompt and the target's tokens before it: teacher forcing (EasyEdit's FT-M)

Up to `num_steps` epochs over mini-batches in the requests' order, or (`shuffle`) in one that is drawn anew in each. A
mini-batch whose loss is below `stop_loss` makes no step; an epoch whose mean loss is below it is the last. With `eos`
the end of sequence is the last token of each target.

**Automatic steps.** `lr="auto"` is `rate` (`RATE`) times the root mean square (RMS) of a weight's numbers, each weight
its own, and `norm_constraint="auto"` is `BOX` times it. Of an adapter the first step, B's, changes the weight by as
much: with A drawn of RMS 1/√(3 d_in), ΔW = scale · B A has RMS scale · lr · √(rank / (3 d_in)). A vector (gain, bias)
takes the median rate of the matrices.

**Precision.** bfloat16 and float16 weights are trained as float32 copies, which the optimiser moves, the box clamps and
the update is taken from; after each step the model gets them rounded, and its gradients come in its own dtype. So steps
far below a weight's rounding still add up. Weights in float32 or wider are trained themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .._util.progress import Progress
from .._util.text import count
from ..errors import KtError, WorkFailed, warn_user
from ..facts.fact import Fact
from ..model.sites import Kind, Site
from ..model.tokens import Batch, encode_ids, ending, joint_ids, pad_id, target_ids
from ..model.update import Dense, Update
from .adapter import Adapter, adapted
from .config import linear_maps
from .plan import PlanText, SolveContext, SolveResult, WeightUpdate

if TYPE_CHECKING:
    from ..model.model import TracedModel


OBJECTIVES = ("prompt_last", "target_new")
RATE = 0.003
"""An automatic learning rate, in RMS of the weight. The papers' 5e-4 is that on SmolLM2 (RMS 0.18)."""
BOX = 0.02
"""An automatic norm_constraint, in RMS of the weight."""


@dataclass(frozen=True)
class FineTune:
    """A plan of gradient steps; `modules` says what is trained at each of `layers`: `mlp` (down_proj), `attn` (W_o),
    `both`, linear maps by name (`attn.q_proj,attn.v_proj`), or `block` (every parameter of it)."""

    layers: tuple[int, ...]
    modules: str = "mlp"
    objective: str = "prompt_last"
    num_steps: int = 25
    lr: float | Literal["auto"] = 5e-4
    weight_decay: float = 0.0
    norm_constraint: float | Literal["auto"] | None = None
    batch_size: int = 8
    stop_loss: float = 1e-2
    adapter: Adapter | None = None
    shuffle: bool = False
    eos: bool = False
    rate: float = RATE

    def __post_init__(self) -> None:
        if self.modules != "block":
            linear_maps(self.modules, ("block",))
        if self.objective not in OBJECTIVES:
            raise KtError(f"objective {self.objective!r} is unknown; choose among {', '.join(OBJECTIVES)}")
        if self.adapter and self.modules == "block":
            raise KtError("an adapter stands on projections, not on a whole block; choose modules mlp, attn or both")
        if self.adapter and self.norm_constraint is not None:
            raise KtError("norm_constraint bounds weights, and with an adapter none is trained; leave it out")

    @property
    def moment_sites(self) -> list[Site]:
        return []

    @property
    def keeps_keys(self) -> bool:
        return False

    @property
    def has_targets(self) -> bool:
        return False

    @property
    def whole_blocks(self) -> bool:
        return self.modules == "block"

    @property
    def sites(self) -> list[Site]:
        return [Site(name, layer) for layer in self.layers for name in linear_maps(self.modules)]

    def require_room(self, model: TracedModel) -> None:
        """No check of memory, which only a backward pass needs; experts are trained by their down projections alone."""
        if self.modules == "block":
            model.require_linear([Site("mlp", layer) for layer in self.layers], "training of whole blocks")
        elif self.adapter is not None:
            model.require_linear(self.sites, "an adapter")

    def describe(self) -> PlanText:
        rank = "" if self.adapter is None else f" of an adapter of rank {self.adapter.rank}"
        within = f"{BOX:g} of its RMS" if self.norm_constraint == "auto" else f"{self.norm_constraint or 0:g}"
        box = "" if self.norm_constraint is None else f", each weight within {within}"
        decay = f", weight decay {self.weight_decay:g}" if self.weight_decay else ""
        order = self.objective + ", end of sequence" * self.eos + ", shuffled" * self.shuffle
        return PlanText("no search", self.modules, f"Adam on the weights{rank}{box}{decay}", order)

    def names(self, model: TracedModel) -> list[str]:
        if self.modules == "block":
            return [name for layer in self.layers for name in model.block_weights(layer)]
        return [name for site in self.sites for name in model.parameter_names(site)]

    def solve(self, context: SolveContext, facts: Sequence[Fact], progress: Progress | None = None) -> SolveResult:
        """Train, compute the update, restore the weights.

        Notes: `loss`, the mean over the last epoch (before its last step), `losses` of all epochs, `steps` made.

        Raises:
            WorkFailed: the loss is not finite.
            KtError: an adapter is asked for and peft is not installed.
        """
        if self.objective == "prompt_last":
            self._warn_of_bags(context.model, facts)
        return self._trained(context, facts, progress)

    def _warn_of_bags(self, model: TracedModel, facts: Sequence[Fact]) -> None:
        lengths = [len(target_ids(model.reader, fact.prompt, fact.target or "", fact.target_prefix)) for fact in facts]
        if several := sum(length > 1 for length in lengths):
            warn_user(
                f"{count(several, 'target')} of {len(facts)} {'has' if several == 1 else 'have'} several tokens, and "
                "prompt_last teaches them as a bag, without their order (as the original FT does); method ft-m, or "
                "objective_optimization=target_new, teaches each behind the ones before"
            )

    def update_history(self, context: SolveContext, facts: Sequence[Fact]) -> None:
        """No history: fine-tuning has no keys."""

    def _trained(
        self, context: SolveContext, facts: Sequence[Fact], progress: Progress | None, *wanted: Tensor
    ) -> SolveResult:
        """`wanted`: values that outputs are to take, where the lessons ask for them."""
        updates, notes = context.journal.take("descent", self._solve, context, facts, progress, *wanted)
        return SolveResult({name: WeightUpdate.of(part) for name, part in updates.items()}, notes=notes)

    def _solve(
        self, context: SolveContext, facts: Sequence[Fact], progress: Progress | None, *wanted: Tensor
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Updates and notes, as a journal keeps them."""
        epochs, projections = self._epochs(context, facts, *wanted), self._projections(context)
        strides = self._strides(context.model)
        with self._training(context, list(strides.values())) as training:
            training.weights.projections = projections
            losses, steps = self._descend(context.model, epochs, training.weights, progress)
            updates = training.updates()
        chosen = {name: self._chosen(stride) for name, stride in strides.items()}
        written = {name: WeightUpdate(update, chosen=chosen[name]).as_dict() for name, update in updates.items()}
        return written, {"loss": losses[-1], "losses": losses, "steps": steps}

    def _strides(self, model: TracedModel) -> dict[str, Stride]:
        """By weight name: Adam's learning rate and the box, the automatic ones from the weight as it is."""
        weights = {name: model.weight(name) for name in self.names(model)}
        rms = {name: float(w.float().square().mean().sqrt()) for name, w in weights.items()}
        typical = median(rms[name] for name, w in weights.items() if w.dim() > 1)
        strides = {}
        for name, weight in weights.items():
            scale = rms[name] if weight.dim() > 1 else typical
            first_step = 1.0 if self.adapter is None else self.adapter.first_step(weight.shape[1])
            lr = self.rate * scale / first_step if self.lr == "auto" else self.lr
            strides[name] = Stride(lr, BOX * scale if self.norm_constraint == "auto" else self.norm_constraint)
        return strides

    def _chosen(self, stride: Stride) -> dict[str, float] | None:
        """For the manifest: the values that no setting gave."""
        return {n: value for n, value in stride._asdict().items() if getattr(self, n) == "auto"} or None

    @contextmanager
    def _training(self, context: SolveContext, strides: Sequence[Stride]) -> Iterator[Training]:
        model = context.model
        if self.adapter is None:
            with unfrozen(model, self.names(model), strides) as training:
                yield training
        else:
            with adapted(model, self.sites, self.adapter, context.seed) as (parameters, updates):
                yield Training(Weights(parameters, [stride for stride in strides for _ in ("A", "B")]), updates)

    def _descend(
        self, model: TracedModel, epochs: Iterator[Sequence[Lesson | Any]], weights: Weights, progress: Progress | None
    ) -> tuple[list[float], int]:
        """Every epoch's mean loss and the number of steps."""
        groups = [{"params": [w], "lr": stride.lr} for w, stride in zip(weights.wide, weights.strides, strict=True)]
        optimizer = self._optimizer(groups)
        losses: list[float] = []
        steps = 0
        for epoch, lessons in enumerate(epochs, start=1):
            total, requests = 0.0, sum(len(lesson.batch) for lesson in lessons)
            for lesson in lessons:
                with torch.enable_grad():
                    loss = lesson.loss(model)
                value = loss.item()
                if not math.isfinite(value):
                    raise WorkFailed(f"the loss is not finite in epoch {epoch} of fine-tuning; try a smaller lr")
                total += value * len(lesson.batch)
                if value >= self.stop_loss:
                    loss.backward()
                    weights.step(optimizer)
                    steps += 1
            losses.append(total / requests)
            if progress:
                progress(epoch, self.num_steps)
            if losses[-1] < self.stop_loss:
                break
        return losses, steps

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, weight_decay=self.weight_decay)

    def _projections(self, context: SolveContext) -> list[Projection]:
        """Of each weight's gradient; none: as it is."""
        return []

    def _epochs(
        self, context: SolveContext, facts: Sequence[Fact], *wanted: Tensor
    ) -> Iterator[Sequence[Lesson | Any]]:
        """The mini-batches of each epoch."""
        if not self.shuffle or len(facts) <= self.batch_size:
            return repeat(self._lessons(context.model, facts), self.num_steps)
        draw = Random(context.seed)
        orders = (draw.sample(facts, len(facts)) for _ in range(self.num_steps))
        return (self._lessons(context.model, order, start=0) for order in orders)

    def _lessons(self, model: TracedModel, facts: Sequence[Fact], start: int | None = None) -> list[Lesson]:
        """Lessons that run from block `start` on; of lessons that are used once, all blocks run once anyway."""
        size, last = self.batch_size, self.objective == "prompt_last"
        asked = [(fact.prompt, fact.target or "", fact.target_prefix) for fact in facts]
        batches = [asked[at : at + size] for at in range(0, len(asked), size)]
        start, end = min(self.layers) if start is None else start, end_id(model.tokenizer) if self.eos else None
        return [lesson_of(model, batch, last, start, end) for batch in batches]


Question = tuple[str, str, str | None]
"""A prompt, the answer to predict, and the text between them (None: what `prompt_gap` finds)."""


class Lesson(NamedTuple):
    """A mini-batch: the rows, the targets' tokens (padded on the left like the rows), how many of the last columns
    predict them, and what enters block `start`, the lowest that is trained: the blocks below it run once."""

    batch: Batch
    targets: Batch
    keep: int
    start: int
    below: Float[Tensor, "row pos d_model"] | None

    def loss(self, model: TracedModel) -> Float[Tensor, ""]:
        """-log p(token): a mean over a target's tokens, then over requests."""
        return self.mean(-self.picked(self.log_probs(model)))

    def log_probs(self, model: TracedModel) -> Float[Tensor, "row token vocab"]:
        """log p of every token where the targets' tokens are predicted."""
        # With prompt_last the one column that is kept predicts every token.
        return self._logits(model).log_softmax(-1).expand(-1, self.targets.ids.shape[1], -1)

    def picked(self, log_probs: Float[Tensor, "row token vocab"]) -> Float[Tensor, "row token"]:
        """Those of the targets' tokens."""
        return log_probs.gather(-1, self.targets.ids.to(log_probs.device)[..., None])[..., 0]

    def mean(self, numbers: Float[Tensor, "row token"]) -> Float[Tensor, ""]:
        """A mean over a target's tokens, then over rows."""
        targets = self.targets.to(numbers.device)
        return ((numbers * targets.mask).sum(-1) / targets.lengths).mean()

    def _logits(self, model: TracedModel) -> Float[Tensor, "row keep vocab"]:
        with model.nnsight.trace(**model.inputs(self.batch, self.keep)):
            if self.below is not None:
                enter_at(model, self.start, self.below)
            logits = model.last_logits(self.keep).save()
        return _widened(logits)


def end_id(tokenizer: Any) -> int:
    """The id of the end of sequence.

    Raises:
        KtError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise KtError("the tokenizer has no end of sequence to put behind the targets; give eos=false")
    return int(tokenizer.eos_token_id)


def lesson_of(
    model: TracedModel, questions: Sequence[Question], last: bool = False, start: int = 0, end: int | None = None
) -> Lesson:
    """The questions as rows.

    Args:
        last: predict all of an answer's tokens at the prompt's last one.
        start: the first block whose weights are trained; 0 runs all blocks every time.
        end: a token behind every answer, where no chat template closes it (which it does unless `last`).
    """
    tokenizer = model.reader
    rows, answers = [], []
    for prompt, target, join in questions:
        before, own = joint_ids(tokenizer, prompt, target, join)
        closing = ending(tokenizer, prompt) or (() if end is None else (end,))
        answer = list(own) if last and end is None else [*own, *closing]
        rows.append(before if last else [*before, *answer[:-1]])
        answers.append(answer)
    batch, targets = encode_ids(rows, pad_id(tokenizer)), encode_ids(answers, 0)
    below = entering(model, batch, start) if start else None
    return Lesson(batch, targets, 1 if last else targets.ids.shape[1], start, below)


@torch.no_grad()
def entering(model: TracedModel, batch: Batch, start: int) -> Float[Tensor, "row pos d_model"]:
    """The residual stream that enters a block above the first, kept on the CPU: there may be many requests."""
    with model.nnsight.trace(**model.inputs(batch)) as tracer:
        stream: Any = model.value(Site(Kind.RESID, start - 1), len(batch)).clone()
        below = stream.save()
        tracer.stop()
    return below.cpu()


def enter_at(model: TracedModel, start: int, below: Float[Tensor, "row pos d_model"]) -> None:
    """Inside a trace: run from block `start` on, which `below` enters."""
    stream = below.to(model.device, copy=True)
    for layer in range(start):
        model.block(layer).skip((stream, None) if model.layout.tuple_output else stream)


class Stride(NamedTuple):
    """A weight's learning rate, and how far from its start any of its numbers may get."""

    lr: float
    norm_constraint: float | None = None


Projection = Callable[[Tensor], Tensor]


class Weights:
    """The tensors that the forward reads (`live`), and those that Adam moves (`wide`): the same ones in float32 or
    wider, float32 copies of narrower ones. `strides`: one for each; `projections`: of each one's gradient, or none."""

    @torch.no_grad()
    def __init__(self, live: Sequence[Tensor], strides: Sequence[Stride]) -> None:
        self.live, self.strides = list(live), list(strides)
        self.wide = [_widened(w) for w in self.live]
        self.start = [w.detach().clone() for w in self.wide]
        self.projections: Sequence[Projection] = ()

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step along the gradients that a backward pass left, which are gone afterwards."""
        copies = [(live, wide) for live, wide in zip(self.live, self.wide, strict=True) if wide is not live]
        for live, wide in copies:
            wide.grad = None if live.grad is None else live.grad.to(wide.dtype)
            live.grad = None
        for wide, project in zip(self.wide, self.projections, strict=False):
            wide.grad = None if wide.grad is None else project(wide.grad)
        optimizer.step()
        optimizer.zero_grad()
        for wide, start, (_, box) in zip(self.wide, self.start, self.strides, strict=True):
            if box is not None:
                wide.clamp_(start - box, start + box)
        for live, wide in copies:
            live.copy_(wide)

    def moved(self) -> list[Tensor]:
        return [wide.detach() - start for wide, start in zip(self.wide, self.start, strict=True)]


class Training(NamedTuple):
    weights: Weights
    updates: Callable[[], Mapping[str, Update]]


@contextmanager
def unfrozen(model: TracedModel, names: Sequence[str], strides: Sequence[Stride]) -> Iterator[Training]:
    """The named weights open to training; on exit, also after an exception, bytes, flags and gradients of before."""
    with model.at_rest(), model.opened(names):
        live = [model.own(name) for name in names]
        gradients = [weight.grad for weight in live]
        try:
            for weight in live:
                weight.requires_grad_().grad = None
            weights = Weights(live, strides)
            yield Training(weights, lambda: _updates(model, names, weights))
        finally:
            for weight, gradient in zip(live, gradients, strict=True):
                weight.requires_grad_(False).grad = gradient


def _updates(model: TracedModel, names: Sequence[str], weights: Weights) -> dict[str, Dense]:
    # Laid out like its parameter, a difference is seen as (d_out, d_in) through the strides that `model.weight` has.
    views = [model.weight(name) for name in names]
    moved = zip(names, views, weights.moved(), strict=True)
    return {name: Dense(m.as_strided(v.shape, v.stride())).to(torch.float32) for name, v, m in moved}


def _widened(tensor: Tensor) -> Tensor:
    """The tensor itself in float32 or wider, else a float32 copy."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
