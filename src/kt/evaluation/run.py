"""Score a model on edit requests: ask everything in few batches, keep the raw responses, compute the metrics.

>>> before = evaluate(model, requests)                    # the unedited model, frozen
>>> with edit.applied(model):
...     after = evaluate(model, requests, before=before)  # adds what locality needs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import ranks
from ..errors import BadFact
from ..facts.fact import Fact
from ..facts.load import facts_from
from ..model import TracedModel
from ..progress import Progress
from .composites import COMPOSITES
from .distributions import Distributions
from .judge import Case, Verdicts
from .metrics import PROTOCOLS, record_values, says
from .perplexity import Heldout, heldout_corpus, ppl_protocol
from .samples import Key, Sample, samples_of
from .scores import Scores
from .wild import WILD_TOKENS, wild_protocol
from .work import LONGER_TOKENS, TEXT_TOKENS, TEXT_TOP_K, Wanted, Work, ask_model, plan_work, with_responses

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
    cases = [Case(s.prompt, (str(s.answer), *s.aliases), str(s.wild_text)) for s in free]
    judged = list(samples)
    verdicts = ranks.by_main("verdicts", lambda: list(judge(cases)))  # a judge may be a paid service
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
