"""Score a model on edit requests: ask everything in few batches, keep the raw responses, compute the metrics.

>>> before = evaluate(model, requests)                    # the unedited model, frozen
>>> with edit.applied(model):
...     after = evaluate(model, requests, before=before)  # adds what locality needs
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .._util.progress import Progress
from ..errors import BadFact
from ..facts.corpus import Corpus
from ..facts.fact import Fact
from ..facts.load import facts_from
from ..model.model import TracedModel
from ..model.sampling import GenerationRequest, continuations
from ..model.scoring import Question, Row, TeacherForced, answer_row, teacher_force
from ..model.tokens import target_ids
from ..runs import parallel as ranks
from .distributions import Distributions, divergences, near_prompts
from .judge import JudgedAnswer, Verdicts
from .metrics import COMPOSITES, PROTOCOLS, record_values, says
from .perplexity import Heldout, Text, heldout_corpus, ppl_protocol, windows
from .samples import Key, Sample, samples_of
from .scores import Scores
from .text import WILD_TOKENS, has_chat, room, up_to_stop, wild_protocol, wish_for

# All that a model is asked for a list of samples: each question once, in few batches, and the responses put back.

LONGER_TOKENS = 10
"""Tokens of the "longer" greedy continuation; an answer with more tokens gets as many as it has."""
TEXT_TOKENS = 100
"""Tokens of a text whose fluency is measured, its prompt included, as in EasyEdit (here up to nine fewer)."""
TEXT_TOP_K = 5

_ANSWERED = ("edit", "paraphrase", "neighbourhood", "portability")
"""Roles whose answers the model may also give as text."""


class Wanted(NamedTuple):
    """What is asked: the protocols, and what some of them need."""

    protocols: Collection[str]
    wild_tokens: int
    corpus: Corpus | None = None
    reference: Distributions | None = None


class Work(NamedTuple):
    """All that the model is asked, each question once, in an order that does not change between runs.

    `rows` holds the tokens of every question, `forced` those of them that a forward is to answer, `rivals` those that
    another answer is compared with; `wild` has the wish for each prompt that is asked freely, `near` the prompts for
    KL.
    """

    rows: dict[Question, Row]
    rivals: frozenset[Question]
    forced: tuple[Row, ...]
    greedy: dict[GenerationRequest, None]
    sampled: dict[GenerationRequest, None]
    wild: dict[str, GenerationRequest]
    near: tuple[str, ...]
    text: Text | None

    @property
    def total(self) -> int:
        """Units of progress."""
        asked = (self.forced, self.written, self.sampled, self.near)
        return sum(map(len, asked)) + (len(self.text.rows) if self.text else 0)

    @property
    def written(self) -> dict[GenerationRequest, None]:
        """All greedy text: free answers are longer continuations, often of prompts that are continued anyway."""
        return dict.fromkeys([*self.greedy, *self.wild.values()])


class Responses(NamedTuple):
    """What came back, by question, wish or prompt."""

    forced: dict[Question, TeacherForced]
    greedy: dict[GenerationRequest, str]
    sampled: dict[str, str]
    wild: dict[str, str]
    kl: dict[str, float]
    heldout: Heldout | None


def plan_work(model: TracedModel, asked: Sequence[Sample], wanted: Wanted) -> Work:
    """Every question that the samples ask under the wanted protocols."""
    protocols = wanted.protocols
    questions = dict.fromkeys((s.prompt, s.answer) for s in asked if s.role != "generation")
    rivals = dict.fromkeys((s.prompt, s.rival) for s in asked if s.rival is not None and "prob" in protocols)
    rows = {question: answer_row(model, question) for question in questions | rivals}
    forced = tuple(rows.values()) if {"tf", "prob"} & set(protocols) else ()
    greedy: dict[GenerationRequest, None] = {}
    sampled: dict[GenerationRequest, None] = {}
    if "gen" in protocols:
        answered = (s for s in asked if s.role in _ANSWERED)
        greedy = dict.fromkeys(wish for s in answered for wish in _wishes(model, s, rows[s.prompt, s.answer]))
        texts = dict.fromkeys(s.prompt for s in asked if s.role == "generation")
        free = ((prompt, room(model, prompt, TEXT_TOKENS)) for prompt in texts)
        sampled = dict.fromkeys(wish for wish in free if wish[1])
    wild: dict[str, GenerationRequest] = {}
    if "wild" in protocols:
        prompts = dict.fromkeys(s.prompt for s in asked if s.role in _ANSWERED and s.answer is not None)
        wishes = {prompt: wish_for(model, prompt, wanted.wild_tokens) for prompt in prompts}
        wild = {prompt: wish for prompt, wish in wishes.items() if wish[1]}
    near = tuple(near_prompts(asked)) if wanted.reference is not None else ()
    text = windows(model, wanted.corpus) if wanted.corpus is not None else None
    return Work(rows, frozenset(rivals), forced, greedy, sampled, wild, near, text)


def _wishes(model: TracedModel, sample: Sample, row: Row) -> list[GenerationRequest]:
    """A continuation of the answer's own length, if there is an answer, one of each alias', and the longer one."""
    prompt, n = sample.prompt, len(row.target)
    own = [(prompt, len(target_ids(model.tokenizer, prompt, alias))) for alias in sample.aliases]
    return [(prompt, n)] * bool(n) + own + [(prompt, max(n, LONGER_TOKENS))]


def ask_model(
    model: TracedModel, work: Work, wanted: Wanted, batch_size: int | str, seed: int, progress: Progress | None
) -> Responses:
    """Ask the model everything."""
    done = 0

    def tick(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, work.total)

    forced = teacher_force(model, work.forced, batch_size, tick)
    written = continuations(model, work.written, batch_size, tick)
    sampling = {"do_sample": True, "top_k": TEXT_TOP_K, "seed": seed}
    sampled = continuations(model, work.sampled, batch_size, tick, **sampling)
    chat = has_chat(model.tokenizer)
    kl: dict[str, float] = {}
    if wanted.reference is not None:
        kl = divergences(model, wanted.reference, work.near, batch_size, tick)
    heldout = None
    if work.text is not None:
        heldout = work.text.losses(teacher_force(model, work.text.rows, batch_size, tick))
    return Responses(
        forced,
        {wish: written[wish] for wish in work.greedy},
        {prompt: text for (prompt, _), text in sampled.items()},
        {prompt: up_to_stop(written[wish], chat) for prompt, wish in work.wild.items()},
        kl,
        heldout,
    )


def with_responses(model: TracedModel, asked: Sequence[Sample], work: Work, found: Responses) -> list[Sample]:
    """The questions with their responses."""
    samples = []
    for s in asked:
        if s.role == "generation":
            samples.append(replace(s, text=found.sampled.get(s.prompt)))
            continue
        question = (s.prompt, s.answer)
        known = _forced(s, work, found)
        if s.role in _ANSWERED:
            n = len(work.rows[question].target)
            known |= {
                "exact_text": found.greedy.get((s.prompt, n)) if n else None,
                "text": found.greedy.get((s.prompt, max(n, LONGER_TOKENS))),
                "alias_texts": _alias_texts(model, s, found),
                "wild_text": None if s.answer is None else found.wild.get(s.prompt),
            }
        if s.role == "neighbourhood":
            known["kl"] = found.kl.get(s.prompt)
        samples.append(replace(s, target_ids=work.rows[question].target, **known))
    return samples


def _forced(sample: Sample, work: Work, found: Responses) -> dict[str, Any]:
    """What teacher forcing says of the answer and of its rival, as far as it was asked."""
    known: dict[str, Any] = {}
    if (forced := found.forced.get((sample.prompt, sample.answer))) is not None:
        known |= {"predicted_ids": forced.predicted, "log_prob": forced.log_prob}
    rival = (sample.prompt, sample.rival)
    if rival in work.rivals:
        known |= {"rival_ids": work.rows[rival].target, "rival_log_prob": found.forced[rival].log_prob}
    return known


def _alias_texts(model: TracedModel, sample: Sample, found: Responses) -> tuple[str, ...]:
    if not found.greedy:
        return ()
    lengths = (len(target_ids(model.tokenizer, sample.prompt, alias)) for alias in sample.aliases)
    return tuple(found.greedy[sample.prompt, n] for n in lengths)


GENERATION = (
    "greedy; the longer continuation has {longer} tokens, or the answer's number if that is more; "
    "texts for fluency have up to {text} tokens, prompt included, or as many as the model has positions, "
    "those after the prompt a multiple of ten, sampled from the top {top} with seed {seed}, the same noise "
    "for the same prompt"
)


def evaluate(
    model: TracedModel,
    requests: Sequence[Fact | Mapping[str, Any]],
    before: Scores | None = None,
    generate: bool = True,
    batch_size: int | str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    *,
    protocols: Sequence[str] | None = None,
    heldout: str | Path | None = None,
    reference: Distributions | None = None,
    judge: Verdicts | None = None,
    max_new_tokens: int = WILD_TOKENS,
) -> Scores:
    """Score the model as it stands now.

    Args:
        model: unedited, or with an edit written into it.
        requests: facts with a target (else the foil is the target); one with neither is scored on its answer.
        before: what this function returned for the unedited model; without it, locality metrics are absent.
        generate: also generate text; without it the `gen` metrics are absent, and it is much faster.
        batch_size: rows per forward, or "auto" for a budget of tokens.
        seed: of the sampled texts and of the bootstrap.
        progress: called with (done, total).
        protocols: ways to ask, among `PROTOCOLS`; None is tf and gen, or tf alone without `generate`.
        heldout: text for the protocol ppl: a file with one document a line, or what `Corpus.open` takes; the demo
            model has its own.
        reference: what `distributions` returned for the unedited model; with it, neighbourhood_kl is there.
        judge: a `Judge`, or any function of cases; it reads the answers of the protocol wild.
        max_new_tokens: most tokens of an answer in the protocol wild.

    Raises:
        BadFact: no requests, a request that asks for nothing new, a `before` or `reference` that does not fit, an
            unknown protocol, or one that lacks what it needs.
    """
    _check_batch_size(batch_size)
    chosen = _chosen(protocols, generate, judge, max_new_tokens)
    facts = facts_from(requests)
    if not facts:
        raise BadFact("no requests to evaluate; give at least one fact")
    asked = samples_of(facts)
    corpus = heldout_corpus(heldout, model.name) if "ppl" in chosen else None
    wanted = Wanted(chosen, max_new_tokens, corpus, reference)
    work = plan_work(model, asked, wanted)
    old = {} if before is None else _matching(before, asked, work)
    found = ask_model(model, work, wanted, batch_size, seed, progress)
    samples = with_responses(model, asked, work, found)
    if judge is not None:
        samples = _judged(samples, judge)
    values = record_values(samples, old, {*chosen, "kl"})
    return Scores(
        model=model.name,
        records=tuple(fact.id for fact in facts),
        samples=tuple(samples),
        values=values,
        protocol=_protocol(model, values, wanted, seed, before, found.heldout),
        seed=seed,
        compared=before is not None,
        heldout=found.heldout,
    )


def _judged(samples: Sequence[Sample], judge: Verdicts) -> list[Sample]:
    """The samples with a verdict on each free answer."""
    places = [i for i, s in enumerate(samples) if s.wild_text is not None and s.answer is not None]
    free = [samples[i] for i in places]
    cases = [JudgedAnswer(s.prompt, (str(s.answer), *s.aliases), str(s.wild_text)) for s in free]
    judged = list(samples)
    verdicts = ranks.on_rank_zero("verdicts", lambda: list(judge(cases)))  # a judge may be a paid service
    for i, sample, verdict in zip(places, free, verdicts, strict=True):
        judged[i] = replace(sample, verdict=verdict)
    return judged


def _matching(before: Scores, samples: Sequence[Sample], work: Work) -> dict[Key, Sample]:
    """The unedited model's samples, after making sure that they answer the same questions."""
    if before.compared:
        raise BadFact("`before` was itself compared with another run; give the scores of the unedited model")
    old = {sample.key: sample for sample in before.samples}
    asked = [s for s in samples if s.role == "neighbourhood"]
    missing = [s for s in asked if s.key not in old]
    if missing:
        raise BadFact(
            f"`before` lacks {len(missing)} of {len(asked)} neighbourhood prompts, the first "
            f"{missing[0].prompt!r}; evaluate the unedited model on the same facts"
        )
    if any(work.rows[s.prompt, s.answer].target != old[s.key].target_ids for s in asked):
        raise BadFact("`before` comes from a model with another tokenizer; evaluate the unedited model itself")
    return old


def _protocol(
    model: TracedModel,
    values: Mapping[str, object],
    wanted: Wanted,
    seed: int,
    before: Scores | None,
    heldout: Heldout | None,
) -> dict[str, str]:
    """One sentence for every metric that is there, and how all were measured."""
    figures = {name: says(name) for name in values}
    figures |= {name: c.says for name, c in COMPOSITES.items() if set(c.parts) <= set(values)}
    if heldout is not None:
        figures["perplexity_heldout"] = ppl_protocol(heldout)
    generation = GENERATION.format(longer=LONGER_TOKENS, text=TEXT_TOKENS, top=TEXT_TOP_K, seed=seed)
    settings = {
        "records": "a record's value is the mean over its prompts, a metric the mean over n records",
        "intervals": f"95%, percentile bootstrap over records, 2000 resamples, seed {seed}",
        "answers": "after one space (none behind a bracket or quote); tokens: the suffix of the joint tokenisation",
        "aliases": "count as right where text is compared; teacher forcing and probabilities use the first spelling",
        "padding": "left, masked, positions from the first real token; no result depends on the batch size",
        "normalisation": "NFKC, lower case, no ASCII punctuation, no a/an/the, single spaces",
        "words": "runs of letters, digits, underscores; other visible characters by themselves (not nltk's)",
        "locality": f"compared with the unedited model {before.model}"
        if before is not None
        else "absent: no scores of the unedited model were given",
        "generation": generation if "gen" in wanted.protocols else "off",
    }
    if "wild" in wanted.protocols:
        settings["wild"] = wild_protocol(model.tokenizer, wanted.wild_tokens)
    return figures | settings


def _chosen(
    protocols: Sequence[str] | None, generate: bool, judge: Verdicts | None, max_new_tokens: int
) -> tuple[str, ...]:
    """The protocols to ask under, in the order of their table."""
    if protocols is None:
        protocols = ("tf", "gen") if generate else ("tf",)
    unknown = [name for name in protocols if name not in PROTOCOLS]
    if unknown or not protocols:
        named = f"protocol {unknown[0]!r} is unknown" if unknown else "no protocol is named"
        raise BadFact(f"{named}; choose among {', '.join(PROTOCOLS)}")
    if judge is not None and "wild" not in protocols:
        raise BadFact("a judge reads free answers; add wild to the protocols")
    if max_new_tokens < 1:
        raise BadFact(f"max_new_tokens {max_new_tokens} must be at least 1")
    return tuple(name for name in PROTOCOLS if name in protocols)


def _check_batch_size(batch_size: int | str) -> None:
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size > 0):
        raise BadFact(f"batch size {batch_size!r} is not understood; give a number from 1, or auto")
