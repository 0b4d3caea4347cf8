"""`contrast_probe`: the original and the target answer in every layer, side by side (JEEP, section 4.1)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from .._util.kinds import takes
from .._util.notebook_bar import with_bar
from .._util.progress import Progress
from ..errors import BadFact, warn_user
from ..facts.fact import Fact
from ..facts.load import FactsLike, facts_from
from ..model.batches import BatchSize, checked_size
from ..model.effects import refuse_text
from ..model.model import TracedModel
from ..runs import parallel
from ..tracing.prompts import LeftOut, why
from .lens import POSITIONS, TOP, LensReading, read_lens
from .questions import ProbedFact, Question, ask, described
from .result import Probe
from .word_sets import Asked, SetReader, SetTokens, WordSets, open_sets

__all__ = ["Probe", "contrast_probe"]

_BLOCK = 512
"""Facts in memory at once; of the others only their numbers are kept."""


@takes()
@with_bar("probing")
def contrast_probe(
    model: TracedModel,
    facts: FactsLike,
    final_norm: bool = True,
    *,
    layers: Sequence[int] | None = None,
    sets: str | os.PathLike[str] | Mapping[str, Any] | WordSets | None = None,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    whole: bool = False,
    seed: int = 0,
) -> Probe:
    """Probability (eq. 5) and rank (eq. 6) of the first token of two answers, by layer, kind and position.

    Args:
        model: the loaded model, as `kt.load` returns it.
        facts: as for `causal_trace`; a generator is read in blocks, and is never in memory whole.
        final_norm: read values through the model's final norm, so that the last layer gives the model's own
            distribution. False is the formula of JEEP's text, W_lm(h), which skips the norm.
        layers: blocks to read, all by default. Stages need all.
        sets: word sets (appendix A): `demo`, a JSON file, or the content of one.
        batch_size: prompts in one forward pass; results do not depend on it beyond rounding.
        progress: called with (facts done, facts in all, as far as known).
        whole: also read all tokens of both answers (see `LensReading`), with a prompt more for each beyond the first.
        seed: of the intervals' bootstrap and of the stages' test; readings do not depend on it.

    Returns:
        Probabilities and ranks by fact, position, kind, layer and answer, and the facts that were left out.

    Raises:
        UnknownSite: the model has no such layer.
        BadFact: there are no facts, one cannot be probed as given, or none is left to probe.
        KtError: an edit that puts text before prompts is applied to the model; a probe reads bare prompts.
        BadFile: word sets that cannot be read, or that hold nothing for any fact.
        WorkFailed: a number is not finite.

    Examples:
        >>> probe = kt.contrast_probe(model, facts)
        >>> int(probe.to_dataframe()["rank"].min())  # 0: the top of the vocabulary
        0
    """
    refuse_text(model, "a probe")
    if layers is not None and (isinstance(layers, str) or not isinstance(layers, Iterable)):
        raise BadFact(f"layers {layers!r}: give a list of whole numbers, as [4, 5]")
    batch_size = checked_size(batch_size)
    wanted = None if layers is None else tuple(sorted({int(model.checked(layer)) for layer in layers}))
    words = None if sets is None else open_sets(sets)
    reader = None if words is None else SetReader(words, model.tokenizer)
    facts = facts if isinstance(facts, Iterator) else facts_from(facts)
    if words is not None and isinstance(facts, list):
        words.require_some(facts)
    n_known = len(facts) if isinstance(facts, list) else 0
    probed: list[ProbedFact] = []
    left_out: list[LeftOut] = []
    readings: list[LensReading] = []
    done = 0
    for block in _blocks(facts):

        def report(n: int, _: int, before: int = done, size: int = len(block)) -> None:
            if progress is not None:
                progress(before + n, max(n_known, before + size))

        questions, without = parallel.on_rank_zero("questions", ask, model, block, batch_size)
        left_out += without
        if questions:
            masks = None if reader is None else _masks(reader, block, questions)
            reading = _read(model, questions, wanted, final_norm, masks, batch_size, report)
            readings.append(_along(model, questions, reading, wanted, final_norm, batch_size) if whole else reading)
            probed += [question.fact for question in questions]
        done += len(block)
    _must_have(done, probed, left_out)
    warned = _warn(probed)
    names = () if words is None else words.names
    reading = LensReading.joined(readings)
    if words is not None and reading.sets is not None:
        words.require_read(reading.sets)
    metadata = described(model, final_norm) | {"n_given": done, "warnings": warned, "seed": int(seed)}
    metadata["tokens"] = reading.texts(model.tokenizer)
    return Probe(tuple(probed), wanted or tuple(range(model.n_layers)), reading, names, tuple(left_out), metadata)


def _blocks(records: Iterable[Fact | Mapping[str, Any]]) -> Iterator[list[tuple[int, Fact]]]:
    records, done = iter(records), 0
    while block := facts_from(islice(records, _BLOCK), first=done):
        yield list(enumerate(block, done))
        done += len(block)


def _masks(reader: SetReader, block: Sequence[tuple[int, Fact]], questions: Sequence[Question]) -> SetTokens:
    by_index = dict(block)
    return reader.tokens([Asked(by_index[q.fact.index], q.fact.original, q.answer_ids) for q in questions])


def _read(
    model: TracedModel,
    questions: Sequence[Question],
    layers: tuple[int, ...] | None,
    final_norm: bool,
    masks: SetTokens | None,
    batch_size: BatchSize,
    progress: Progress,
) -> LensReading:
    tokens = np.array([[q.fact.original_id, q.fact.target_id] for q in questions], dtype=np.int64)
    return read_lens(
        model,
        [q.ids for q in questions],
        [q.subject_last for q in questions],
        tokens,
        layers=layers,
        final_norm=final_norm,
        masks=masks,
        top=TOP,
        batch_size=batch_size,
        progress=progress,
    )


def _along(
    model: TracedModel,
    questions: Sequence[Question],
    first: LensReading,
    layers: tuple[int, ...] | None,
    final_norm: bool,
    batch_size: BatchSize,
) -> LensReading:
    """The reading of the first tokens with those of the whole answers; a probability counts as 1.2e-38 at least."""
    answers = [(i, a, ids) for i, q in enumerate(questions) for a, ids in enumerate((q.answer_ids, q.target_ids))]
    later = [(i, a, ids[:j], ids[j]) for i, a, ids in answers for j in range(1, len(ids))]
    least, at = np.finfo(np.float32).tiny, POSITIONS.index("prediction")
    log_prob, rank = np.log(np.maximum(first.prob[:, at], least)), first.rank[:, at].copy()
    if later:
        found = read_lens(
            model,
            [(*questions[i].ids, *before) for i, _, before, _ in later],
            [questions[i].subject_last for i, *_ in later],
            np.array([[token] for *_, token in later], dtype=np.int64),
            layers=layers,
            final_norm=final_norm,
            batch_size=batch_size,
        )
        for row, (i, a, *_) in enumerate(later):
            log_prob[i, :, :, a] += np.log(np.maximum(found.prob[row, at, :, :, 0], least))
            rank[i, :, :, a] = np.maximum(rank[i, :, :, a], found.rank[row, at, :, :, 0])
    return first._replace(whole_log_prob=log_prob, whole_rank=rank)


def _must_have(n_given: int, probed: Sequence[ProbedFact], left_out: Sequence[LeftOut]) -> None:
    if not n_given:
        raise BadFact("there are no facts to probe; give at least one")
    if not probed:
        raise BadFact(f"no fact is left to probe ({why(left_out)}); give facts with a target or a foil")


def _warn(probed: Sequence[ProbedFact]) -> list[str]:
    """One line about facts whose answers cannot be told apart; it also goes into the probe's metadata."""
    same = [fact for fact in probed if fact.same_first_token]
    if not same:
        return []
    first, out = same[0], "means and stages leave them out"
    text = (
        f"{len(same)} of {len(probed)} facts have an original and a target answer that begin with the same token "
        f"({first.prompt!r}: {first.original!r} and {first.target!r}), so their ranks show no contrast; "
        f"{'means are over them all the same, and there are no stages' if len(same) == len(probed) else out}"
    )
    warn_user(text)
    return [text]
