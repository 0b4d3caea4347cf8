"""Score a model on edit requests: each question is put once, in few batches; the raw responses are kept.

>>> before = evaluate(model, requests)                    # the unedited model, frozen
>>> with edit.applied(model):
...     after = evaluate(model, requests, before=before)  # adds the locality metrics
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from .._util.kinds import NAMES_OR_NONE, takes
from .._util.notebook_bar import with_bar
from .._util.progress import Progress, counter
from .._util.text import count, words
from ..errors import BadFact
from ..facts.corpus import Corpus
from ..facts.load import FactsLike, distinct_facts, facts_from
from ..model.batches import BatchSize, checked_size
from ..model.chat import Verbatim
from ..model.model import TracedModel
from ..model.sampling import GenerationRequest, continuations
from ..model.scoring import Question, Row, TeacherForced, answer_row, first_tokens, teacher_force, warn_of_joins
from ..model.tokens import reader, target_ids, token_ids
from ..runs import parallel
from . import mello
from .distributions import Distributions, divergences, near_prompts
from .judge import JudgedAnswer, Verdicts
from .metrics import COMPOSITES, PERPLEXITY, PROTOCOLS, record_values, says
from .perplexity import Heldout, Windows, heldout_corpus, ppl_protocol, windows
from .samples import Key, Sample, readable_facts, samples_of
from .scores import Scores
from .text import WILD_TOKENS, has_chat, room, up_to_stop, wild_protocol, wild_request

LONGER_TOKENS = 10
"""Tokens of the "longer" greedy continuation; an answer with more tokens gets as many as it has."""
TEXT_TOKENS = 100
"""Tokens of a text whose fluency is measured, its prompt included, as in EasyEdit (here up to nine fewer)."""
TEXT_TOP_K = 5

_ANSWERED = ("edit", "paraphrase", "neighbourhood", "portability")
"""Roles whose answers the model may also give as text."""


@runtime_checkable
class Edited(Protocol):
    """An edit or a stack: its requests, as dicts."""

    @property
    def requests(self) -> list[dict[str, Any]]: ...


class Options(NamedTuple):
    """How an evaluation is done; see `evaluate`."""

    protocols: tuple[str, ...]
    wild_tokens: int
    seed: int
    batch_size: BatchSize
    corpus: Corpus | None
    compared: bool
    reference: Distributions | None


class Plan(NamedTuple):
    """All that is computed for a list of samples, each question once, in an order that is the same in every run.

    Args:
        rows: the tokens of every question.
        rivals: the questions about an answer that another one is compared with.
        forced: the rows that are teacher-forced.
        greedy: the greedy continuations of the protocol gen.
        sampled: the sampled texts of the protocol gen.
        wild: prompt -> the free answer of the protocol wild.
        steps: the multi-hop questions that the protocol mello asks in steps.
        near: the prompts whose next-token distribution is compared with the unedited model's.
        heldout: the windows of the held-out text.
    """

    rows: dict[Question, Row]
    rivals: frozenset[Question]
    forced: tuple[Row, ...]
    greedy: dict[GenerationRequest, None]
    sampled: dict[GenerationRequest, None]
    wild: dict[str, GenerationRequest]
    steps: tuple[str, ...]
    near: tuple[str, ...]
    heldout: Windows | None

    @property
    def written(self) -> dict[GenerationRequest, None]:
        """All greedy text: free answers are longer continuations, often of prompts that are continued anyway."""
        return dict.fromkeys([*self.greedy, *self.wild.values()])

    @property
    def total(self) -> int:
        """Units of progress."""
        windows = self.heldout.rows if self.heldout else ()
        return sum(map(len, (self.forced, self.written, self.sampled, self.steps, self.near, windows)))


class Responses(NamedTuple):
    """The model's responses by question, generation request or prompt."""

    forced: dict[Question, TeacherForced]
    written: dict[GenerationRequest, str]
    sampled: dict[str, str]
    steps: dict[str, str]
    kl: dict[str, float]
    heldout: Heldout | None


def plan_questions(model: TracedModel, samples: Sequence[Sample], options: Options) -> Plan:
    """The questions of the samples under the chosen protocols."""
    protocols = options.protocols
    questions = dict.fromkeys(s.question for s in samples if s.role != "generation")
    rivals = dict.fromkeys(s.about(s.rival) for s in samples if s.rival is not None and "prob" in protocols)
    rows = {question: answer_row(model, question) for question in questions | rivals}
    forced = tuple(rows.values()) if {"tf", "prob"} & set(protocols) else ()
    answered = [s for s in samples if s.role in _ANSWERED]
    greedy: dict[GenerationRequest, None] = {}
    sampled: dict[GenerationRequest, None] = {}
    if "gen" in protocols:
        for s in answered:
            greedy |= dict.fromkeys(_continuations(model, s, len(rows[s.question].target)))
        prompts = dict.fromkeys(s.prompt for s in samples if s.role == "generation")
        sampled = {(prompt, n): None for prompt in prompts if (n := room(model, prompt, TEXT_TOKENS))}
    wild: dict[str, GenerationRequest] = {}
    if "wild" in protocols:
        prompts = dict.fromkeys(s.prompt for s in answered if s.answer is not None)
        requests = {prompt: wild_request(model, prompt, options.wild_tokens) for prompt in prompts}
        wild = {prompt: request for prompt, request in requests.items() if request[1]}
    hops = dict.fromkeys(s.prompt for s in samples if s.role == "portability" and s.kind == "multi_hop")
    steps = tuple(hops) if "mello" in protocols else ()
    near = tuple(near_prompts(samples)) if options.reference is not None else ()
    heldout = windows(model, options.corpus) if options.corpus is not None else None
    return Plan(rows, frozenset(rivals), forced, greedy, sampled, wild, steps, near, heldout)


def _continuations(model: TracedModel, sample: Sample, length: int) -> list[GenerationRequest]:
    """A continuation of the answer's own length, if there is an answer, one of each alias', and the longer one."""
    lengths = [*([length] if length else []), *_alias_lengths(model, sample), max(length, LONGER_TOKENS)]
    return [(sample.prompt, n) for n in lengths]


def _alias_lengths(model: TracedModel, sample: Sample) -> list[int]:
    return [len(target_ids(reader(model), sample.prompt, alias, sample.join)) for alias in sample.aliases]


def run_plan(model: TracedModel, plan: Plan, options: Options, progress: Progress | None) -> Responses:
    """Run the model: answers teacher-forced, greedy text, sampled text, distributions, held-out text, in that order.

    Each part has its own batches, which the processes of a run share (all but the distributions).
    """
    size, tick = options.batch_size, counter(progress, plan.total)
    forced = teacher_force(model, plan.forced, size, tick)
    if not options.compared:
        warn_of_joins(first_tokens(forced))
    written = continuations(model, plan.written, size, tick)
    texts = continuations(model, plan.sampled, size, tick, do_sample=True, top_k=TEXT_TOP_K, seed=options.seed)
    sampled = {prompt: text for (prompt, _), text in texts.items()}
    steps = in_steps(model, plan.steps, size)
    tick(len(steps))
    kl = divergences(model, options.reference, plan.near, size, tick) if options.reference is not None else {}
    heldout = None
    if plan.heldout is not None:
        heldout = plan.heldout.losses(teacher_force(model, plan.heldout.rows, size, tick))
    return Responses(forced, written, sampled, steps, kl, heldout)


def in_steps(model: TracedModel, questions: Sequence[str], batch_size: BatchSize) -> dict[str, str]:
    """The final answers of the protocol mello; its texts are continued as they are, the memory is theirs alone."""

    def write(texts: Sequence[str]) -> dict[str, str]:
        requests: dict[str, GenerationRequest] = {}
        for text in texts:
            asked = Verbatim(text)
            requests[text] = (asked, room(model, asked, len(token_ids(reader(model), text)) + mello.TOKENS))
        written = continuations(model, [request for request in requests.values() if request[1]], batch_size)
        return {text: written.get(request, "") for text, request in requests.items()}

    return mello.answers(questions, mello.memory_of(model), write) if questions else {}


def with_responses(model: TracedModel, samples: Sequence[Sample], plan: Plan, responses: Responses) -> list[Sample]:
    """The samples with the model's responses in them."""
    chat = has_chat(model.tokenizer)

    def respond(s: Sample) -> Sample:
        if s.role == "generation":
            return replace(s, text=responses.sampled.get(s.prompt))
        row = plan.rows[s.question]
        values = _answer_scores(s, plan, responses)
        if s.role in _ANSWERED:
            n = len(row.target)
            if plan.greedy:
                values["exact_text"] = responses.written[s.prompt, n] if n else None
                values["text"] = responses.written[s.prompt, max(n, LONGER_TOKENS)]
                values["alias_texts"] = tuple(responses.written[s.prompt, m] for m in _alias_lengths(model, s))
            if s.answer is not None and s.prompt in plan.wild:
                values["wild_text"] = up_to_stop(responses.written[plan.wild[s.prompt]], chat)
        if s.role == "portability" and s.prompt in responses.steps:
            values["mello_text"] = responses.steps[s.prompt]
        if s.role == "neighbourhood":
            values["kl"] = responses.kl.get(s.prompt)
        return replace(s, target_ids=row.target, **values)

    return [respond(s) for s in samples]


def _answer_scores(sample: Sample, plan: Plan, responses: Responses) -> dict[str, Any]:
    """The teacher-forced scores of the answer and of its rival, where they were computed."""
    scores: dict[str, Any] = {}
    if (forced := responses.forced.get(sample.question)) is not None:
        scores |= {"predicted_ids": forced.predicted, "log_prob": forced.log_prob}
    rival = sample.about(sample.rival)
    if rival in plan.rivals:
        scores |= {"rival_ids": plan.rows[rival].target, "rival_log_prob": responses.forced[rival].log_prob}
    return scores


@runtime_checkable
class Reader(Protocol):
    """Whatever has a tokenizer can be asked: a `TracedModel`, or a stand-in for one."""

    tokenizer: Any


@takes(
    model=((Reader,), "the model that kt.load returns"),
    before=((Scores, NoneType), "Scores, or None"),
    protocols=NAMES_OR_NONE,
)
@with_bar("scoring")
def evaluate(
    model: TracedModel,
    requests: FactsLike,
    before: Scores | None = None,
    generate: bool = True,
    batch_size: BatchSize = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    *,
    protocols: Sequence[str] | None = None,
    heldout: str | Path | None = None,
    reference: Distributions | None = None,
    judge: Verdicts | None = None,
    max_new_tokens: int = WILD_TOKENS,
    edited: Edited | FactsLike | None = None,
) -> Scores:
    """Score the model as it stands now.

    Args:
        model: unedited, or with an edit written into it.
        requests: facts with a target (else the foil is the target), one or many, as `Fact`s or dicts, or what
            `load_facts` reads by name; one with neither is scored on its answer.
        before: what this function returned for the unedited model; without it, locality metrics are absent.
        generate: also generate text; without it the `gen` metrics are absent, and it is much faster.
        batch_size: rows per forward, or "auto" for a budget of tokens.
        seed: of the sampled texts and of the bootstrap.
        progress: called with (done, total).
        protocols: ways to ask, among `PROTOCOLS`; None is tf and gen, or tf alone without `generate`.
        heldout: text for the protocol ppl: a file with one document a line, or what `Corpus.open` takes; None is
            the text that ships with kt (docs/data.md).
        reference: what `distributions` returned for the unedited model; with it, neighbourhood_kl is there.
        judge: a `Judge`, or any function of cases; it reads the answers of the protocol wild.
        max_new_tokens: most tokens of an answer in the protocol wild.
        edited: the edit (or stack) that is written in, or its requests. Success, paraphrase and portability are then
            those of the records that it was asked for, and the scores say how many these are.

    Returns:
        Every metric with its mean and 95% interval over records, the values of each record, and the raw responses.
        Shares and probabilities lie between 0 and 1, entropies are in bits, divergences in nats.

    Raises:
        BadFact: no requests, a request that asks for nothing new, a `before` or `reference` that does not fit, an
            unknown protocol, or one that lacks what it needs.
        WorkFailed: the model's logits are NaN.

    Examples:
        >>> scores = kt.evaluate(model, facts, generate=False)
        >>> scores.metrics["edit_success_tf_exact"].mean, scores.metrics["edit_success_tf_exact"].n
        (0.0, 4)
    """
    batch_size = checked_size(batch_size)
    chosen = _chosen(protocols, generate, judge, max_new_tokens, heldout)
    facts = distinct_facts(facts_from(requests), whole=True)
    if not facts:
        raise BadFact("no requests to evaluate; give at least one fact")
    given, facts = len(facts), readable_facts(model, facts, LONGER_TOKENS if "gen" in chosen else 0)
    samples = samples_of(facts)
    corpus = heldout_corpus(heldout, model.name) if "ppl" in chosen else None
    options = Options(chosen, max_new_tokens, seed, batch_size, corpus, before is not None, reference)
    plan = plan_questions(model, samples, options)
    old = {} if before is None else _matching(before, samples, plan)
    responses = run_plan(model, plan, options, progress)
    samples = with_responses(model, samples, plan, responses)
    if judge is not None:
        samples = _judged(samples, judge)
    values = record_values(samples, old, {*chosen, "kl"})
    scores = Scores(
        model=model.name,
        records=tuple(fact.id for fact in facts),
        samples=tuple(samples),
        values=values,
        protocol=_protocol(model, values, options, before, responses.heldout, given - len(facts)),
        seed=seed,
        compared=before is not None,
        heldout=responses.heldout,
    )
    if edited is None:
        return scores
    return scores.of_edited(facts, facts_from(edited.requests if isinstance(edited, Edited) else edited))


def _judged(samples: Sequence[Sample], judge: Verdicts) -> list[Sample]:
    """The samples with a verdict on each free answer."""
    cases = {
        i: JudgedAnswer(s.prompt, (s.answer, *s.aliases), s.wild_text)
        for i, s in enumerate(samples)
        if s.wild_text is not None and s.answer is not None
    }
    # On one process alone: a judge may be a paid service.
    verdicts = parallel.on_rank_zero("verdicts", lambda: list(judge(list(cases.values()))))
    judged = list(samples)
    for i, verdict in zip(cases, verdicts, strict=True):
        judged[i] = replace(samples[i], verdict=verdict)
    return judged


def _matching(before: Scores, samples: Sequence[Sample], plan: Plan) -> dict[Key, Sample]:
    """The unedited model's samples, after making sure that they answer the same questions."""
    if before.compared:
        raise BadFact("`before` was itself compared with another run; give the scores of the unedited model")
    old = {sample.key: sample for sample in before.samples}
    near = [s for s in samples if s.role == "neighbourhood"]
    missing = [s for s in near if s.key not in old]
    if missing:
        raise BadFact(
            f"`before` lacks {len(missing)} of {len(near)} neighbourhood prompts, the first "
            f"{missing[0].prompt!r}; evaluate the unedited model on the same facts"
        )
    if any(plan.rows[s.question].target != old[s.key].target_ids for s in near):
        raise BadFact("`before` comes from a model with another tokenizer; evaluate the unedited model itself")
    return old


def _chosen(
    protocols: Sequence[str] | None, generate: bool, judge: Verdicts | None, max_new_tokens: int, heldout: object
) -> tuple[str, ...]:
    """The protocols to ask under, in the order of their table."""
    if protocols is None:
        protocols = ("tf", "gen") if generate else ("tf",)
    protocols = words(protocols)
    unknown = [name for name in protocols if name not in PROTOCOLS]
    if unknown or not protocols:
        named = f"protocol {unknown[0]!r} is unknown" if unknown else "no protocol is named"
        raise BadFact(f"{named}; choose among {', '.join(PROTOCOLS)}")
    if judge is not None and "wild" not in protocols:
        raise BadFact("a judge reads free answers; add wild to the protocols")
    if max_new_tokens != WILD_TOKENS and "wild" not in protocols:
        raise BadFact("max_new_tokens is for free answers; add wild to the protocols, or leave it out")
    if heldout is not None and "ppl" not in protocols:
        raise BadFact("heldout is the text of ppl; add ppl to the protocols, or leave it out")
    if max_new_tokens < 1:
        raise BadFact(f"max_new_tokens {max_new_tokens} must be at least 1")
    return tuple(name for name in PROTOCOLS if name in protocols)


def _protocol(
    model: TracedModel,
    values: Mapping[str, object],
    options: Options,
    before: Scores | None,
    heldout: Heldout | None,
    unread: int,
) -> dict[str, str]:
    """One sentence for every metric present, and the protocol of all."""
    figures = {name: says(name) for name in values}
    figures |= {name: c.says for name, c in COMPOSITES.items() if set(c.parts) <= set(values)}
    if heldout is not None:
        figures[PERPLEXITY] = ppl_protocol(heldout)
    settings = {
        "records": "a record's value is the mean over its prompts, a metric the mean over n records",
        "intervals": f"95%, percentile bootstrap over records, 2000 resamples, seed {options.seed}",
        "answers": "after one space (none behind a bracket or quote); tokens: the suffix of the joint tokenisation",
        "aliases": "count as right where text is compared; teacher forcing and probabilities use the first spelling",
        "padding": "left, masked, positions from the first real token; no result depends on the batch size",
        "normalisation": "NFKC, lower case, no ASCII punctuation, no a/an/the, single spaces",
        "words": "runs of letters, digits, underscores; other visible characters by themselves (not nltk's)",
        "locality": "absent: no scores of the unedited model were given",
        "generation": "off",
    }
    if unread:
        settings["left out"] = f"{count(unread, 'record')} with a question that the model cannot read"
    if before is not None:
        settings["locality"] = f"compared with the unedited model {before.model}"
    if "gen" in options.protocols:
        settings["generation"] = (
            f"greedy; the longer continuation has {LONGER_TOKENS} tokens, or the answer's number if that is more; "
            f"texts for fluency have up to {TEXT_TOKENS} tokens, prompt included, or as many as the model has "
            f"positions, those after the prompt a multiple of ten, sampled from the top {TEXT_TOP_K} with seed "
            f"{options.seed}, the same noise for the same prompt"
        )
    if (asked := getattr(model, "chat", None)) is not None:
        settings["chat"] = asked.frame.chat.words()
    if "wild" in options.protocols:
        settings["wild"] = wild_protocol(model.tokenizer, options.wild_tokens)
    if "mello" in options.protocols:
        found_by = mello.retriever_of(model)
        settings["mello"] = (
            f"greedy, two worked examples, up to {mello.HOPS} subquestions, {found_by} over the edit's facts"
        )
    return figures | settings
