"""`residual_fact`: the same readings and the same questions for the unedited and the edited model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from .._util.kinds import takes
from .._util.notebook_bar import with_bar
from .._util.progress import Progress, counter
from ..editing.closed_form.contexts import memit_contexts
from ..editing.stack import ANY_EDIT, AnyEdit, EditStack
from ..errors import BadFact, UnknownSite, warn_user
from ..facts.fact import Fact
from ..facts.load import FactsLike, distinct_facts, facts_from
from ..model.batches import BatchSize, checked_size
from ..model.chat import in_turn
from ..model.effects import refuse_text, site_of
from ..model.model import TracedModel
from ..model.tokens import template_span, token_ids
from ..probing.controls import MOST, Control, ControlPrompt, Relations
from ..probing.lens import KINDS, POSITIONS, TOP, LensReading, read_lens
from ..probing.questions import ProbedFact, Question, ask
from ..probing.questions import described as described_model
from ..probing.stages import advantage
from ..tracing.prompts import SAME_TOKEN, LeftOut, why
from .attacks import (
    DISTRACTORS,
    PREFIXES,
    AttackPrompt,
    Attacks,
    Prepared,
    ask_model,
    asks,
    attack_names,
    checked_prefixes,
    prepare,
    shares,
)
from .score import Residual

NO_CONTROLS = "no other answer of its relation to hold it against"


def described(
    model: TracedModel,
    edit: AnyEdit,
    final_norm: bool,
    seed: int,
    n_boot: int,
    prefixes: Sequence[str],
    neutral: Sequence[str],
) -> dict[str, Any]:
    """The metadata of a residual: model, edit and settings."""
    edited: dict[str, list[int]] = defaultdict(list)
    effects = [each.effect for each in (edit.edits if isinstance(edit, EditStack) else (edit,))]
    sites = [site for effect in effects if (site := site_of(effect)) is not None]
    for name in edit.names:
        with suppress(UnknownSite):  # fine-tuning changes other weights, too
            sites.append(model.site_of(name))
    for site in sites:
        if site.layer not in edited[str(site.kind)]:
            edited[str(site.kind)].append(site.layer)
    return described_model(model, final_norm) | {
        "method": edit.manifest.get("method"),
        "alpha": edit.alpha,
        "control": edit.manifest.get("control"),
        "edited": dict(edited),
        "seed": seed,
        "n_boot": n_boot,
        "prefixes": list(prefixes),
        "neutral": list(neutral),
    }


def remarks(facts: Sequence[ProbedFact], controls: Sequence[Sequence[Control]], edit: AnyEdit) -> list[str]:
    """One line for each thing that a reader of the score must know."""
    lines, n = [], len(facts)
    same = [fact for fact in facts if fact.same_first_token]
    if same:
        lines.append(
            f"{len(same)} of {n} facts have an old and a new answer that begin with the same token "
            f"({same[0].prompt!r}: {same[0].original!r} and {same[0].target!r}); score and attacks leave them out"
        )
    nobody = [i for i, some in enumerate(controls) if not some]
    alone = len(nobody)
    if alone:
        lines.append(
            f"{alone} of {n} facts are left out of the score, such as {facts[nobody[0]].prompt!r}: {NO_CONTROLS}; "
            "give more records of their relations or with their templates (--pool FILE, pool= in Python), such as the "
            "whole data set"
        )
    if sum(bool(some) and not fact.same_first_token for fact, some in zip(facts, controls, strict=True)) == 1:
        lines.append("the score rests on a single fact: it has no interval, and its cells were chosen without one")
    requests = {_request(stored) for stored in edit.requests}
    other = [fact for fact in facts if (fact.prompt, fact.target) not in requests]
    if requests and other:
        lines.append(
            f"{len(other)} of {n} facts are no requests of the edit ({other[0].prompt!r}); it need not touch them"
        )
    return lines


def _request(stored: dict[str, Any]) -> tuple[str, str]:
    target = stored.get("target_new")
    text = target.get("str", "") if isinstance(target, dict) else str(target or "")
    return str(stored.get("prompt", "")).replace("{}", str(stored.get("subject", "")), 1), text


class _Plan(NamedTuple):
    """All readings and questions, fixed before the model is edited."""

    facts: list[Fact]
    questions: list[Question]
    controls: list[tuple[Control, ...]]
    elsewhere: list[tuple[ControlPrompt, ...]]
    left_out: list[LeftOut]

    @property
    def tokens(self) -> Int[ndarray, "fact token"]:
        """Old, new, controls; -1 where a fact has fewer."""
        rows = np.full((len(self.questions), 2 + MOST), -1, dtype=np.int64)
        for row, question, controls in zip(rows, self.questions, self.controls, strict=True):
            row[:2] = question.fact.original_id, question.fact.target_id
            row[2 : 2 + len(controls)] = [control.token for control in controls]
        return rows


@takes(edit=ANY_EDIT)
@with_bar("probing before and after the edit")
def residual_fact(
    model: TracedModel,
    edit: AnyEdit,
    facts: FactsLike,
    *,
    pool: FactsLike | None = None,
    final_norm: bool = True,
    before: Residual | None = None,
    prefixes: Sequence[str] = PREFIXES,
    neutral: bool = True,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    n_boot: int = 2000,
    progress: Progress | None = None,
) -> Residual:
    """The rest of the old facts after an edit: the contrast probe before and after, and attacks.

    The model is restored to the byte, also after an error.

    Args:
        model: the loaded model, as `kt.load` returns it.
        edit: solved for this model, and not written into it.
        facts: the edited facts; the old answer is a fact's `answer`, the new one its `target` or `foil`.
        pool: further facts whose answers may serve as controls, such as the whole data set, or a file of them;
            `facts` alone by default. Controls of a fact are taken from its relation, or from its template where it
            names none.
        final_norm: as in `contrast_probe`.
        before: an earlier result for the same facts and settings on the same unedited model, which is then not run
            again: for several edits of the same facts.
        prefixes: adversarial texts before the prompt, with the slots {old}, {new}, {third} and {subject}.
        neutral: also put texts that the unedited model writes before the prompt.
        seed: of controls, texts and bootstrap.
        batch_size: prompts in one forward pass; results do not depend on it beyond rounding.
        n_boot: resamples behind each interval.
        progress: called with (prompts done, prompts in all).

    Returns:
        Both models' readings, the attacks' outcomes and the metadata, from which the score follows.

    Raises:
        BadFact: there are no facts or none is left, a prefix has an unknown slot, or `before` is of something else.
        KtError: the edit is of another model, or is already written into this one, or an edit puts text before prompts.
        WorkFailed: a number is not finite.

    Examples:
        >>> residual = kt.residual_fact(model, edit, facts[:2], neutral=False, prefixes=(), n_boot=100)
        >>> residual.score.n
        2
    """
    edit.require_updates("a residual, which reads bare prompts,", ("context",))
    refuse_text(model, "a residual")
    templates, batch_size = checked_prefixes(prefixes), checked_size(batch_size)
    facts = distinct_facts(facts_from(facts))
    plan = _plan(model, facts, None if pool is None else facts_from(pool), seed, batch_size)
    if before is not None:
        _refuse_other(before, model, plan, final_norm, templates, seed)
        written = tuple(before.metadata["neutral"])
    else:
        written = memit_contexts(model, seed).groups[1] if neutral else ()
    prompts = [_attack_prompt(*each) for each in zip(plan.facts, plan.questions, plan.controls, strict=True)]
    names = attack_names(templates, written)
    alike = {i for i, q in enumerate(plan.questions) if q.fact.same_first_token}
    prepared = prepare(model, [a for a in asks(prompts, templates, written) if a.fact not in alike])
    tick = counter(progress, _n_prompts(plan, prepared, before is None))
    run = _Run(model, plan, prepared, names, final_norm, batch_size, tick)
    if before is None:
        was, elsewhere, answered = run.lens(), run.elsewhere(), run.attacks()
    else:
        was, elsewhere, answered = before.readings["before"], before.elsewhere, before.attacks.before
    with edit.applied(model):
        now, answered_now = run.lens(), run.attacks()
    about = described(model, edit, final_norm, seed, n_boot, templates, written) | {"n_given": len(facts)}
    about["tokens"] = was.texts(model.tokenizer) | now.texts(model.tokenizer)
    about["warnings"] = remarks([q.fact for q in plan.questions], plan.controls, edit)
    for text in about["warnings"]:
        warn_user(text)
    return Residual(
        tuple(q.fact for q in plan.questions),
        tuple(tuple(c) for c in plan.controls),
        tuple(range(model.n_layers)),
        {"before": was, "after": now},
        elsewhere,
        Attacks(names, answered, answered_now),
        tuple(plan.left_out),
        about,
    )


# The plan of the questions ----------------------------------------------------------------------------------------
def _plan(
    model: TracedModel, facts: Sequence[Fact], pool: Iterable[Fact] | None, seed: int, batch_size: BatchSize
) -> _Plan:
    if not facts:
        raise BadFact("there are no facts to measure; give those that were edited")
    questions, left_out = ask(model, list(enumerate(facts)), batch_size)
    if not questions:
        raise BadFact(f"no fact is left to measure ({why(left_out)}); give facts with a target or a foil")
    relations = Relations.of(facts, pool)
    kept = [facts[q.fact.index] for q in questions]
    controls, elsewhere = [], []
    for fact, question in zip(kept, questions, strict=True):
        pair = question.fact.original_id, question.fact.target_id
        controls.append(relations.controls(model.reader, fact, *pair, seed))
        elsewhere.append(relations.elsewhere(model.reader, fact, *pair, seed) if controls[-1] else ())
        if question.fact.same_first_token:
            left_out.append(LeftOut(question.fact.index, fact.id, SAME_TOKEN.replace("foil", "target")))
        elif not controls[-1]:
            left_out.append(LeftOut(question.fact.index, fact.id, NO_CONTROLS))
    return _Plan(kept, questions, controls, elsewhere, sorted(left_out))


def _attack_prompt(fact: Fact, question: Question, controls: Sequence[Control]) -> AttackPrompt:
    probed, distractors = question.fact, tuple(control.text for control in controls[:DISTRACTORS])
    answers = probed.original, probed.target, distractors
    return AttackPrompt(probed.prompt, probed.subject, *answers, fact.paraphrases, fact.target_prefix)


def _refuse_other(
    before: Residual, model: TracedModel, plan: _Plan, final_norm: bool, prefixes: Sequence[str], seed: int
) -> None:
    """Refuse a `before` of other facts, controls or settings."""
    about = before.metadata
    same = (about["model"], about["final_norm"], tuple(about["prefixes"]), about["seed"])
    planned = tuple(q.fact for q in plan.questions), tuple(plan.controls)
    if same != (model.name, final_norm, tuple(prefixes), seed) or (before.facts, before.controls) != planned:
        raise BadFact("before= is of other facts, another model or other settings; leave it out to measure again")


# Measuring -------------------------------------------------------------------------------------------------------
class _Run(NamedTuple):
    """The measurements, on the model as it stands when they are called."""

    model: TracedModel
    plan: _Plan
    prepared: Prepared
    names: tuple[str, ...]
    final_norm: bool
    batch_size: BatchSize
    tick: Callable[[int], None]

    def lens(self) -> LensReading:
        ids = [q.ids for q in self.plan.questions]
        return self._read(ids, [q.subject_last for q in self.plan.questions], self.plan.tokens, TOP)

    def elsewhere(self) -> Float[ndarray, "fact position kind layer"]:
        """The old answer's advantage where the prompt is about other subjects, their mean."""
        where = [(i, other) for i, others in enumerate(self.plan.elsewhere) for other in others]
        layers = self.model.n_layers
        means = np.full((len(self.plan.questions), len(POSITIONS), len(KINDS), layers), np.nan)
        if not where:
            return means
        tokens = self.plan.tokens[[i for i, _ in where]]
        # An answer that is true of the other subject is no control there.
        tokens[:, 2:][tokens[:, 2:] == np.array([other.token for _, other in where])[:, None]] = -1
        tokenizer, facts = self.model.reader, self.plan.facts
        ids = [token_ids(tokenizer, in_turn(tokenizer, other.prompt, facts[i].prompt)) for i, other in where]
        templates = [in_turn(tokenizer, facts[i].template, facts[i].prompt) for i, _ in where]
        spans = [template_span(tokenizer, t, other.subject) for t, (_, other) in zip(templates, where, strict=True)]
        leads = advantage(self._read(ids, [s.last for s in spans], tokens).rank, self.model.vocab_size)
        by_fact: dict[int, list[ndarray]] = defaultdict(list)
        for (i, _), values in zip(where, leads, strict=True):
            if not np.isnan(values).any():
                by_fact[i].append(values)
        for i, several in by_fact.items():
            means[i] = np.mean(several, 0)
        return means

    def attacks(self) -> Float[ndarray, "fact attack who measure"]:
        measures = ask_model(self.model, self.prepared, self.batch_size, self.tick)
        return shares(self.prepared.questions, measures, self.names, len(self.plan.questions))

    def _read(
        self, ids: Sequence[Sequence[int]], last: Sequence[int], tokens: Int[ndarray, "fact token"], top: int = 0
    ) -> LensReading:
        told = 0

        def progress(done: int, _: int) -> None:
            nonlocal told
            self.tick(done - told)
            told = done

        options: dict[str, Any] = {"final_norm": self.final_norm, "batch_size": self.batch_size}
        return read_lens(self.model, ids, last, tokens, top=top, progress=progress, **options)


def _n_prompts(plan: _Plan, prepared: Prepared, with_before: bool) -> int:
    once = len(plan.questions) + len(prepared.rows)
    return once + with_before * (once + sum(map(len, plan.elsewhere)))
