"""`kt.train_editor`: train MEND's or MALMEN's networks on records of an edit, its paraphrases and unrelated prompts.

A step draws from `min_edits` to `edits` training records, a paraphrase and an unrelated prompt of each, makes ΔW of
the edits' gradients at the unedited weights, writes it, and reads the outer loss there:

    L = c_edit · mean -log p(target | paraphrase; W + ΔW)
      + c_loc · mean KL(p(· | unrelated; W) ‖ p(· | unrelated; W + ΔW))

Its gradient in ΔW goes through the method's mathematics by hand (network.py), and Adam moves the networks. An unrelated
prompt that names a subject of the same step's edits is left out of it.

Every `check_every` steps the same is read for held-out records, of other subjects, with what greedy decoding gives:
always the same, and no more than `edits` or `rows` of them, whichever is larger. The networks of the check with the
least held-out loss are kept: they were chosen by these records, so a third share of the subjects, the test, is left
alone altogether. A resumed run gives the same bytes: a step's draw depends on the seed and
its number alone.

A record keeps its one target and prompt however often it is drawn, and a network could learn them by heart. So
`variety` of the draws take the target of another training record of the same relation (or template), and as many change
the prompt with a paraphrase. The number of records of a step is spread evenly over its logarithm: a network that has
seen only large steps edits a lone request badly, and the other way round.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..._util.kinds import TEXT, takes
from ..._util.notebook_bar import with_bar
from ..._util.progress import Progress, reused
from ..._util.text import count
from ...errors import BadFact, Diverged, KtError, WorkFailed, warn_user
from ...facts.fact import Fact, n_places
from ...facts.load import facts_from
from ...model.devices import require_gradients
from ...model.identity import about
from ...model.sites import Site
from ...model.tokens import joint_ids
from ...runs.journal import Journal
from ...runs.provenance import versions
from ...stats import bootstrap_mean
from ..config import linear_maps, one_of
from ..fine_tune import Lesson, Question, lesson_of, unfrozen
from ..method_names import MethodName
from ..methods import method_named
from ..resolve import default_layers
from ..ultraedit import Running
from .editor import NETWORKS, Editor, chat_of, new_networks, refuse_effects, shape_of, site_pairs, subject_of
from .settings import TrainingSettings

if TYPE_CHECKING:
    from ...model.model import TracedModel


FEWEST, FEWEST_HELD_OUT = 16, 4
"""Records to train on, and held out, at least."""
STATISTICS = 1024
"""Training records whose pairs the inputs are normalised by, at most."""
BLOCKS = 3
"""Blocks that are written unless others are given, at least; MEND's, and half of MALMEN's in GPT-J."""
RATES = 10.0
"""log η and log λ learn so many times faster than the networks: they have further to go (MEND's code: 100 times)."""


class Records(NamedTuple):
    """Records to train on, and of other subjects to check with and to test on; how many were left out, by reason."""

    train: list[Fact]
    held_out: list[Fact]
    test: list[Fact]
    left_out: dict[str, int]

    def subjects(self) -> dict[str, list[str]]:
        """Of each side, as `Editor.seen` compares them."""
        sides = {"train": self.train, "held_out": self.held_out, "test": self.test}
        return {side: subjects_of(facts) for side, facts in sides.items()}


def subjects_of(facts: Sequence[Fact]) -> list[str]:
    return sorted({subject_of(fact) for fact in facts})


class Lot(NamedTuple):
    """The records of a step with what was drawn for each."""

    facts: list[Fact]
    paraphrases: list[Question]
    unrelated: list[Question]

    @classmethod
    def drawn(
        cls,
        records: Sequence[Fact],
        size: int,
        draw: random.Random,
        vary: Callable[[Fact, random.Random], Fact] = lambda fact, draw: fact,
    ) -> Lot:
        facts = [vary(fact, draw) for fact in draw.sample(list(records), min(size, len(records)))]
        alike: list[Question] = [(draw.choice(f.paraphrases), f.target or "", f.target_prefix) for f in facts]
        names = [fact.subject for fact in facts]
        near: list[Question] = []
        for fact in facts:
            prompt = draw.choice(fact.neighbours)
            if not any(name in prompt.prompt for name in names):
                near.append((prompt.prompt, prompt.answer or fact.answer or fact.target or "", prompt.target_prefix))
        return cls(facts, alike, near)


class Reading(NamedTuple):
    """What an edit of a lot did: the outer loss; for each record or prompt, the share of the answer's tokens that are
    greedy (or stay so); and the loss's gradient in each site's ΔW."""

    loss: float
    success: list[float]
    paraphrase: list[float]
    locality: list[float]
    gradients: dict[Site, Tensor]


@takes(method=TEXT)
@with_bar("training steps")
def train_editor(
    model: TracedModel,
    facts: Sequence[Fact | Mapping[str, Any]],
    method: Literal["malmen", "mend"] | MethodName = "malmen",
    layers_mlp: Sequence[int] | None = None,
    modules: str | None = None,
    *,
    seed: int = 0,
    journal: Journal | None = None,
    progress: Progress | None = None,
    on_check: Callable[[dict[str, Any]], Any] | None = None,
    exclude: Sequence[Fact | Mapping[str, Any]] = (),
    **settings: Any,
) -> Editor:
    """Train an editor for a model.

    Args:
        model: the loaded model, as `kt.load` returns it.
        facts: records with a target (or a foil), a paraphrase and an unrelated prompt (a neighbour) at least.
        method: `malmen` or `mend`.
        layers_mlp: whose maps it will write; None: the last blocks that the authors took of GPT-J, by relative depth,
            three at least.
        modules: those maps, as in `Site`; None: down_proj (MALMEN), all maps of the MLP (MEND).
        seed: of every draw of the training.
        journal: keeps the last check, from which an interrupted training goes on.
        on_check: called with each check's numbers.
        exclude: facts that will be edited; records of their subjects are left out of training and checks.
        settings: fields of `TrainingSettings`.

    Returns:
        The editor; `save` writes its file, which `kt.edit(model, facts, method, editor=FILE)` takes.

    Raises:
        KtError: an unknown method or setting, too few records, or an edit stands in the model beside its weights.
        UnknownSite: a layer or a map that the model does not have, or a mixture of experts.
        WorkFailed: the loss is not finite.
    """
    one_of(method, NETWORKS, "method that learns")
    model.require_weights("training an editor")
    require_gradients("training an editor")
    refuse_effects(model, "an editor is trained for the model alone; take that back first")
    chosen = TrainingSettings.of(method, settings)
    sites = _sites(model, method, layers_mlp, modules)
    model.require_linear(sites, "a trained editor")
    records = split_records(model, facts_from(facts), chosen.held_out, seed, chosen.test, facts_from(exclude))
    for name in ("edits", "min_edits"):
        if (given := settings.get(name)) is not None and given > len(records.train):
            warn_user(f"{name} {given:,}: a step edits at most the {len(records.train):,} records that there are")
    return _Training(model, method, sites, records, chosen, seed, journal or Journal()).run(progress, on_check)


def _sites(model: TracedModel, method: str, layers: Sequence[int] | None, modules: str | None) -> list[Site]:
    modules = modules or NETWORKS[method].recipe.modules
    if layers is None:
        layers = default_layers(model, method_named(method)(), "layers_mlp")
        last = layers[-1]
        layers = range(max(0, min(layers[0], last + 1 - BLOCKS)), last + 1)
    if not layers:
        raise KtError("no layers to write; give at least one")

    def maps(layer: int) -> Sequence[str]:
        if modules is not None:
            return linear_maps(modules)
        parts = model.layout.at(model.checked(layer))
        return ["mlp"] if parts.mixture is not None else [name for name in parts.linears if name.startswith("mlp.")]

    return model.in_order(model.site(name, layer) for layer in layers for name in maps(layer))


def split_records(
    model: TracedModel,
    facts: Sequence[Fact],
    held_out: float,
    seed: int,
    test: float = 0.0,
    exclude: Sequence[Fact] = (),
) -> Records:
    """The records that have all parts, split by subject; `held_out` and `test` are shares of the subjects.

    Raises:
        KtError: too few.
    """
    never = {subject_of(fact) for fact in exclude}
    usable: dict[str, Fact] = {}
    left_out: Counter[str] = Counter()
    for fact in facts:
        try:
            request = fact.as_request()
        except BadFact:
            left_out["without a target"] += 1
            continue
        apart = [near for near in request.neighbours if request.subject not in near.prompt]
        if not request.paraphrases or not apart:
            left_out["without a paraphrase" if not request.paraphrases else "without an unrelated prompt"] += 1
        elif subject_of(request) in never:
            left_out["of an excluded subject"] += 1
        elif request.prompt in usable:
            left_out["with an earlier one's prompt"] += 1
        elif _too_long(model, request):
            left_out["longer than the model reads"] += 1
        else:
            usable[request.prompt] = replace(request, neighbours=tuple(apart))
    subjects = sorted({subject_of(fact) for fact in usable.values()})
    random.Random(f"{seed}-split").shuffle(subjects)
    first, last = round(held_out * len(subjects)), round((held_out + test) * len(subjects))
    sides = dict.fromkeys(subjects[:first], 1) | dict.fromkeys(subjects[first:last], 2)
    train, checked, tested = (
        [fact for fact in usable.values() if sides.get(subject_of(fact), 0) == side] for side in range(3)
    )
    if len(train) < FEWEST or len(checked) < FEWEST_HELD_OUT:
        why = "".join(f", {n} {reason}" for reason, n in left_out.items())
        raise KtError(
            f"{count(len(usable), 'record')} of {len(facts)} can train an editor ({len(train)} to train on, "
            f"{len(checked)} held out{why}); it needs {FEWEST} and {FEWEST_HELD_OUT}, each with a target, a "
            "paraphrase and an unrelated prompt"
        )
    return Records(train, checked, tested, dict(left_out))


def _too_long(model: TracedModel, fact: Fact) -> bool:
    asked = [(prompt, fact.target or "", fact.target_prefix) for prompt in (fact.prompt, *fact.paraphrases)]
    asked += [(near.prompt, near.answer or fact.answer or "", near.target_prefix) for near in fact.neighbours]
    rows = (joint_ids(model.reader, *question) for question in asked)
    return any(model.why_unreadable((*before, *answer)) for before, answer in rows)


class _Training:
    """One training: the networks and Adam, and how far they have come."""

    def __init__(
        self,
        model: TracedModel,
        method: str,
        sites: Sequence[Site],
        records: Records,
        settings: TrainingSettings,
        seed: int,
        journal: Journal,
    ) -> None:
        self.model, self.records, self.settings, self.seed, self.journal = model, records, settings, seed, journal
        checked = self._checked()[0]
        shapes = ["x".join(map(str, model.weight(site).shape)) for site in sites]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks = new_networks(method, shapes, settings.rank, settings.layers)
        manifest = {
            "method": method,
            "model": model.name,
            "revision": model.revision,
            "dtype": str(model.dtype).removeprefix("torch."),
            "fingerprint": model.fingerprint(),
            "identity": about(model),
            "chat": chat_of(model),
            "versions": versions(),
            "sites": [str(site) for site in sites],
            "shapes": shapes,
            "settings": asdict(settings),
            "seed": seed,
            "n_train": len(records.train),
            "n_held_out": len(records.held_out),
            "n_checked": len(checked),
            "n_test": len(records.test),
            "subjects": records.subjects() | {"checked": subjects_of(checked)},
            "left_out": records.left_out,
            "history": [],
            "best_step": 0,
        }
        self.editor = Editor(networks, {}, manifest)
        named = list(networks.named_parameters())
        rates = [p for name, p in named if name.rpartition(".")[2].startswith("log_")]
        others = [p for name, p in named if not name.rpartition(".")[2].startswith("log_")]
        self.adam = torch.optim.Adam([{"params": others, "times": 1.0}, {"params": rates, "times": RATES}])
        self.targets: dict[str, list[str]] = {}
        for fact in records.train:
            self.targets.setdefault(fact.relation or fact.template, []).append(fact.target or "")
        self.step = 0
        self.best: dict[str, Tensor] = {}

    def run(self, progress: Progress | None, on_check: Callable[[dict[str, Any]], Any] | None) -> Editor:
        statistics = self.journal.take("statistics", self._statistics)
        self.editor.running = {shape: Running(**its) for shape, its in statistics.items()}
        kept = self.journal.checkpoint("training")
        if kept is None:
            self._begin()
            self._check(math.nan)
        else:
            self._load(kept[0])
            reused()
        tell = on_check or (lambda check: None)
        for check in self.editor.history:
            tell(check)
        while not self._is_done():
            losses = []
            for _ in range(min(self.settings.check_every, self.settings.steps - self.step)):
                losses.append(self._learn())
                if progress:
                    progress(self.step, self.settings.steps)
            self._check(sum(losses) / len(losses))
            self.journal.replace("training", self._state())
            tell(self.editor.history[-1])
        self.editor.networks.load_state_dict(self.best)
        return self.editor

    def _is_done(self) -> bool:
        since = sum(check["step"] > self.editor.manifest["best_step"] for check in self.editor.history)
        return self.step >= self.settings.steps or since >= self.settings.patience

    # How far it has come ----------------------------------------------------------------------------------------
    def _statistics(self) -> dict[str, dict[str, Any]]:
        """Mean and scatter of the training records' pairs, by shape."""
        running: dict[str, Running] = {}
        some = self._draw("statistics").sample(self.records.train, min(STATISTICS, len(self.records.train)))
        for at in range(0, len(some), self.settings.rows):
            pairs, _ = self._pairs(some[at : at + self.settings.rows])
            for its in pairs.values():
                seen = Running.of(its.features)
                running[shape_of(its)] = running[shape_of(its)].merged(seen) if shape_of(its) in running else seen
        return {shape: vars(its) for shape, its in running.items()}

    @torch.no_grad()
    def _begin(self) -> None:
        """λ from the keys of a first lot, and the rate at which its update takes the loss away, to first order."""
        lot = Lot.drawn(self.records.train, self._edits, self._draw("begin"))
        pairs, losses = self._pairs(lot.facts)
        for site, its in pairs.items():
            network, _, weight = self.editor.features(site, its)
            network.begin(its, weight)
        updates = self.editor.updates(pairs)
        fall = sum(float(its.falls(updates[site]).sum()) for site, its in pairs.items())
        if not fall > 0:
            raise WorkFailed("to first order a new editor does not raise these targets; give other layers or records")
        each: Any
        for each in self.editor.networks.values():
            each.log_rate.fill_(math.log(float(losses.sum()) / fall))

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "networks": dict(self.editor.networks.state_dict()),
            "best": self.best,
            "adam": {str(n): its for n, its in self.adam.state_dict()["state"].items()},
            "history": self.editor.history,
            "best_step": self.editor.manifest["best_step"],
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.step, self.best = state["step"], state["best"]
        self.editor.networks.load_state_dict(state["networks"])
        adam = {int(n): its for n, its in state["adam"].items()}
        self.adam.load_state_dict({**self.adam.state_dict(), "state": adam})
        self.editor.manifest |= {"history": state["history"], "best_step": state["best_step"]}

    # Steps and checks -------------------------------------------------------------------------------------------
    @property
    def _edits(self) -> int:
        assert self.settings.edits is not None
        return self.settings.edits

    def _size(self, draw: random.Random) -> int:
        fewest = min(self.settings.min_edits, self._edits)
        return round(math.exp(draw.uniform(math.log(fewest), math.log(self._edits))))

    def _varied(self, fact: Fact, draw: random.Random) -> Fact:
        """The record, or one with another prompt or target."""
        peers = self.targets[fact.relation or fact.template]
        others = [n for n, text in enumerate(fact.rephrasings) if n_places(text) == 1]
        if others and draw.random() < self.settings.variety:
            texts, n = list(fact.rephrasings), draw.choice(others)
            template, texts[n] = texts[n], fact.template
            fact = replace(fact, template=template, rephrasings=tuple(texts))
        if draw.random() < self.settings.variety:
            target = draw.choice(peers)
            fact = replace(fact, target=fact.target if target == fact.answer else target, target_aliases=())
        return fact

    def _draw(self, what: object) -> random.Random:
        return random.Random(f"{self.seed}-{what}")

    def _pairs(self, facts: Sequence[Fact]) -> Any:
        return site_pairs(self.model, facts, self.editor.sites, self.editor.network.recipe.prompts)

    def _learn(self) -> float:
        """One step; the outer loss before it."""
        self.step += 1
        draw = self._draw(self.step)
        lot = Lot.drawn(self.records.train, self._size(draw), draw, self._varied)
        pairs, _ = self._pairs(lot.facts)
        reading = self._read(lot, pairs, learns=True)
        self.adam.zero_grad()
        with torch.enable_grad():
            self.editor.surrogate(pairs, reading.gradients).backward()
        torch.nn.utils.clip_grad_norm_(self.editor.networks.parameters(), self.settings.clip or math.inf)
        for group in self.adam.param_groups:
            group["lr"] = self.settings.lr * group["times"] * (1 - (self.step - 1) / self.settings.steps)
        self.adam.step()
        return reading.loss

    def _checked(self) -> tuple[list[Fact], random.Random]:
        """The held-out records that every check reads, and the draw that goes on from there. A check costs no more than
        a step or two, however many are held out."""
        draw, held_out = self._draw("check"), list(self.records.held_out)
        draw.shuffle(held_out)
        return held_out[: max(self._edits, self.settings.rows)], draw

    def _check(self, loss: float) -> None:
        """Read held-out records, and keep the networks if no check was better."""
        held_out, draw = self._checked()
        readings, at = [], 0
        while at < len(held_out):
            size = self._size(draw)
            lot = Lot.drawn(held_out[at : at + size], size, draw)
            at += size
            readings.append((len(lot.facts), self._read(lot, self._pairs(lot.facts)[0], learns=False)))
        found = sum(n * reading.loss for n, reading in readings) / len(held_out)
        scores = {
            score: bootstrap_mean([x for _, reading in readings for x in getattr(reading, score)]).as_dict()
            for score in ("success", "paraphrase", "locality")
        }
        history = self.editor.history
        check = {"step": self.step, "loss": found if math.isnan(loss) else loss, "held_out_loss": found, **scores}
        if all(found < earlier["held_out_loss"] for earlier in history):
            self.editor.manifest["best_step"] = self.step
            self.best = {name: value.clone() for name, value in self.editor.networks.state_dict().items()}
        history.append(check)

    def _read(self, lot: Lot, pairs: Any, learns: bool) -> Reading:
        """Edit a lot, and read what came of it; the model's bytes are back afterwards."""
        model, settings = self.model, self.settings
        names = {site: model.weight_name(site) for site in pairs}
        with torch.no_grad():
            near = list(self._lessons(lot.unrelated))
            before = [lesson.log_probs(model) for lesson in near]
            updates = self.editor.updates(pairs)
        total, success, paraphrase, locality = 0.0, [], [], []
        with unfrozen(model, list(names.values()), []), torch.set_grad_enabled(learns):
            for site, update in updates.items():
                model.write(names[site], update)
            for lesson in self._lessons(lot.paraphrases):
                logp = lesson.log_probs(model)
                loss = lesson.mean(-lesson.picked(logp)) * (settings.c_edit * len(lesson.batch) / len(lot.paraphrases))
                paraphrase += _greedy(lesson, logp.argmax(-1), lesson.targets.ids)
                total += self._went(loss, learns)
            for lesson, old in zip(near, before, strict=True):
                logp = lesson.log_probs(model)
                apart = (old.exp() * (old - logp)).sum(-1)
                loss = lesson.mean(apart) * (settings.c_loc * len(lesson.batch) / len(lot.unrelated))
                locality += _greedy(lesson, logp.argmax(-1), old.argmax(-1))
                total += self._went(loss, learns)
            if learns:
                gradients = {site: self._gradient(name) for site, name in names.items()}
            else:
                gradients = {}
                asked: list[Question] = [(f.prompt, f.target or "", f.target_prefix) for f in lot.facts]
                for lesson in self._lessons(asked):
                    success += _greedy(lesson, lesson.log_probs(model).argmax(-1), lesson.targets.ids)
        return Reading(total, success, paraphrase, locality, gradients)

    def _went(self, loss: Float[Tensor, ""], learns: bool) -> float:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(f"the loss is not finite at step {self.step} of the training; try a smaller lr")
        if learns:
            loss.backward()
        return value

    def _gradient(self, name: str) -> Float[Tensor, "d_out d_in"]:
        weight, view = self.model.own(name), self.model.weight(name)
        assert weight.grad is not None
        return weight.grad.as_strided(view.shape, view.stride())

    def _lessons(self, questions: Sequence[Question]) -> Iterator[Lesson]:
        start = min(site.layer for site in self.editor.sites)
        for at in range(0, len(questions), self.settings.rows):
            yield lesson_of(self.model, questions[at : at + self.settings.rows], start=start)


def _greedy(lesson: Lesson, found: Tensor, wanted: Tensor) -> list[float]:
    """By row, the share of the answer's tokens at which two rows of tokens agree."""
    targets = lesson.targets.to(found.device)
    same = (found == wanted.to(found.device)) * targets.mask
    return (same.sum(-1) / targets.lengths).tolist()
