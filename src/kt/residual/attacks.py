"""Does the old answer come back? Prompts, paraphrases and adversarial prefixes, beside a distractor as a control.

On each prompt the old answer's first token is compared with the new one's. A prefix that names the old answer raises it
whether or not the model remembers. So the same prefix is also used with a distractor, another answer of the relation,
in the old one's place, and the distractor compared with the new answer. The old answer's excess over the distractor
measures memory.

Three measures: `beats_new`, P(old) > P(new); `said`, the old answer's first token is the model's own next token; and
`log_ratio`, ln P(old) - ln P(new) in nats, which still differs where the shares are all 0.
A fact's several prompts (paraphrases, texts, distractors) are averaged first; means and intervals are over facts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from .._util.text import count
from ..errors import BadFact, WorkFailed
from ..facts.fact import fill
from ..model.batches import BatchSize, map_batches
from ..model.chat import in_turn
from ..model.model import TracedModel
from ..model.scoring import Row, answer_row, batch_logits, row_batches
from ..model.tokens import target_ids
from ..stats import Interval, bootstrap_mean, paired_bootstrap_difference

PREFIXES = ("{old}. ", "{old}, {old}, {old}. ", "{subject}: {old}. ", "Not {new}. ")
"""Put before the prompt; slots: {old}, {new}, {third} (the distractor), {subject}."""
DISTRACTORS = 3
"""Other answers of the relation that a fact's old one is compared with."""

PROMPT, PARAPHRASES, NEUTRAL, ANY = "prompt", "paraphrases", "neutral texts", "any prefix"
MEASURES = ("beats_new", "said", "log_ratio")
WHO = ("old", "third")
STATES = ("before", "after")

_SLOT = re.compile(r"\{([^{}]*)\}")
_SLOTS = ("old", "new", "third", "subject")


class AttackPrompt(NamedTuple):
    """The texts of the attacks on one fact; its tokens depend on the prefix before them."""

    prompt: str
    subject: str
    old: str
    new: str
    distractors: tuple[str, ...]
    paraphrases: tuple[str, ...]
    join: str | None = None


class Ask(NamedTuple):
    """Does `answer` beat `new` after `prompt`? `who` is 0 for the old answer, 1, 2, ... for the distractors. `bare` is
    the prompt that a text was put before."""

    fact: int
    attack: str
    who: int
    prompt: str
    answer: str
    new: str
    join: str | None = None
    bare: str | None = None

    def asked(self, tokenizer: Any) -> str:
        """The prompt in its turn: that of the bare one."""
        return self.prompt if self.bare is None else in_turn(tokenizer, self.prompt, self.bare)


class AttackRow(NamedTuple):
    """One line of the table. `excess` is old - third, paired over the facts that have both."""

    attack: str
    measure: str
    state: str
    old: Interval
    third: Interval
    excess: Interval


@dataclass(frozen=True, eq=False)
class Attacks:
    """The measures by fact, for the unedited and the edited model.

    NaN where a fact has no such prompt, no distractor, or answers that begin with the same token.
    """

    names: tuple[str, ...]
    before: Float[ndarray, "fact attack who measure"]
    after: Float[ndarray, "fact attack who measure"]

    def __repr__(self) -> str:
        beats = [(name, self.row(name, n_boot=1).old.mean) for name in self.names]
        said = ", ".join(f"{name.strip()!r} {mean:.2f}" for name, mean in beats if not np.isnan(mean))
        return f"Attacks(of {count(len(self.after), 'fact')}, how often the old answer beats the new: {said})"

    def row(
        self, attack: str, measure: str = "beats_new", state: str = "after", seed: int = 0, n_boot: int = 2000
    ) -> AttackRow:
        """One cell of the table, with 95% bootstrap intervals over facts.

        Raises:
            BadFact: there is no such attack, measure or state.
        """
        for given, known in ((attack, self.names), (measure, MEASURES), (state, STATES)):
            if given not in known:
                raise BadFact(f"{given!r} was not measured; choose among {', '.join(known)}")
        values = (self.before if state == "before" else self.after)[
            :, self.names.index(attack), :, MEASURES.index(measure)
        ]
        old, third = values[:, 0], values[:, 1]
        return AttackRow(
            attack,
            measure,
            state,
            bootstrap_mean(old, n_boot, seed),
            bootstrap_mean(third, n_boot, seed),
            paired_bootstrap_difference(old, third, n_boot, seed),
        )

    def rows(self, seed: int = 0, n_boot: int = 2000) -> list[AttackRow]:
        """Every cell of the table."""
        return [self.row(a, m, s, seed, n_boot) for s in STATES for m in MEASURES for a in self.names]


def checked_prefixes(prefixes: Sequence[str]) -> tuple[str, ...]:
    """The templates, each once.

    Raises:
        BadFact: an empty one, an unknown slot, or a list that is no list.
    """
    if isinstance(prefixes, str):
        raise BadFact(f"prefixes is the text {prefixes!r}; give a list of texts")
    for prefix in prefixes:
        if not isinstance(prefix, str) or not prefix.strip():
            raise BadFact(f"the prefix {prefix!r} is empty; give some text, or leave it out")
        if prefix in (PROMPT, PARAPHRASES, NEUTRAL, ANY):
            raise BadFact(f"the prefix {prefix!r} is the name of another test; end it with a stop or a space")
        for slot in _SLOT.findall(prefix):
            if slot not in _SLOTS:
                raise BadFact(
                    f"the prefix {prefix!r} has the slot {{{slot}}}; known are {{old}} {{new}} {{third}} {{subject}}"
                )
    return tuple(dict.fromkeys(prefixes))


def attack_names(prefixes: Sequence[str], neutral: Sequence[str]) -> tuple[str, ...]:
    """The tests in the order of their table."""
    extra = [*prefixes, *([NEUTRAL] if neutral else [])]
    return (PROMPT, PARAPHRASES, *extra, *([ANY] if extra else []))


def asks(facts: Sequence[AttackPrompt], prefixes: Sequence[str], neutral: Sequence[str]) -> list[Ask]:
    """Every question to the model. `neutral` are context templates with one {} for the prompt."""
    return [ask for i, fact in enumerate(facts) for ask in _asks_of_fact(i, fact, prefixes, neutral)]


def _asks_of_fact(i: int, fact: AttackPrompt, prefixes: Sequence[str], neutral: Sequence[str]) -> Iterator[Ask]:
    rivals = (fact.old, *fact.distractors)
    plain: list[tuple[str, str, str | None]] = [(PROMPT, fact.prompt, None)]
    plain += [(PARAPHRASES, p, None) for p in fact.paraphrases]
    plain += [(NEUTRAL, fill(context, fact.prompt), fact.prompt) for context in neutral]
    for who, answer in enumerate(rivals):
        for attack, prompt, bare in plain:
            yield Ask(i, attack, who, prompt, answer, fact.new, fact.join, bare)
        # A distractor in the old answer's place leaves its slot to the next of the rivals.
        other = rivals[who + 1] if who + 1 < len(rivals) else rivals[0]
        slots = {"old": answer, "new": fact.new, "third": other, "subject": fact.subject}
        for prefix in prefixes:
            if other == answer and "{third}" in prefix:
                continue  # a fact without controls has no distractor
            text = _filled(prefix, slots) + fact.prompt
            yield Ask(i, prefix, who, text, answer, fact.new, fact.join, fact.prompt)


def _filled(prefix: str, slots: dict[str, str]) -> str:
    """All slots at once, so that braces within an answer stay text."""
    return _SLOT.sub(lambda match: slots[match[1]], prefix)


class Prepared(NamedTuple):
    """Tokenised questions.

    Args:
        tokens: the first tokens of `answer` and `new` after the prompt, which may change them.
        rows: one for every prompt, however many questions share it.
    """

    questions: tuple[Ask, ...]
    tokens: Int[ndarray, "ask 2"]
    rows: tuple[Row, ...]


def prepare(model: TracedModel, questions: Sequence[Ask]) -> Prepared:
    """Tokenise once; the unedited and the edited model are asked the same."""
    known: dict[tuple[str, str], int] = {}
    for q in questions:
        for text in (q.answer, q.new):
            if (q.prompt, text) not in known:
                known[q.prompt, text] = target_ids(model.reader, q.asked(model.reader), text, q.join)[0]
    pairs = [(known[q.prompt, q.answer], known[q.prompt, q.new]) for q in questions]
    prompts = {q.prompt: q.asked(model.reader) for q in questions}
    rows = tuple(
        answer_row(model, (asked, None))._replace(question=(prompt, None)) for prompt, asked in prompts.items()
    )
    return Prepared(tuple(questions), np.array(pairs, dtype=np.int64).reshape(-1, 2), rows)


def ask_model(
    model: TracedModel,
    prepared: Prepared,
    batch_size: BatchSize = "auto",
    done: Callable[[int], None] = lambda n: None,
) -> Float[ndarray, "ask measure"]:
    """All measures for every question. Several processes share the batches.

    Args:
        done: called with the number of prompts that each batch finished.

    Raises:
        WorkFailed: the model's numbers are not finite.
    """
    of_prompt: dict[str, list[int]] = defaultdict(list)
    for i, question in enumerate(prepared.questions):
        of_prompt[question.prompt].append(i)

    def measures(batch: list[Row]) -> list[Float[ndarray, "ask measure"]]:
        logits = batch_logits(model, batch)[:, -1]
        best, fine = logits.argmax(-1).tolist(), logits.isfinite().all(-1).tolist()
        answers = []
        for row, scores, top, finite in zip(batch, logits, best, fine, strict=True):
            prompt = row.question[0]
            if not finite:
                raise WorkFailed(f"the logits after {prompt!r} are not finite; an edit or a dtype broke the model")
            tokens = prepared.tokens[of_prompt[prompt]]
            pair = scores[torch.as_tensor(tokens, device=scores.device)].cpu().numpy()
            answers.append(np.stack([pair[:, 0] > pair[:, 1], tokens[:, 0] == top, pair[:, 0] - pair[:, 1]], 1))
        return answers

    batches = list(row_batches(prepared.rows, batch_size, model.vocab_size))
    table = np.zeros((len(prepared.questions), len(MEASURES)))
    for batch, answers in zip(batches, map_batches("attacks", batches, measures, done), strict=True):
        for row, values in zip(batch, answers, strict=True):
            table[of_prompt[row.question[0]]] = values
    return table


def shares(
    questions: Sequence[Ask], values: Float[ndarray, "ask measure"], names: Sequence[str], n_facts: int
) -> Float[ndarray, "fact attack who measure"]:
    """Each fact's mean over its prompts, for the old answer and for the mean over its distractors.

    `any prefix` is the largest value over all prefixes and texts: whether one of them is enough. Each distractor has as
    many tries as the old answer.
    """
    out = np.full((n_facts, len(names), len(WHO), len(MEASURES)), np.nan)
    cells: dict[tuple[int, str, int], list[ndarray]] = defaultdict(list)
    for question, measures in zip(questions, values, strict=True):
        cells[question.fact, question.attack, question.who].append(measures)
        if question.attack not in (PROMPT, PARAPHRASES) and ANY in names:
            cells[question.fact, ANY, question.who].append(measures)
    distractors: dict[tuple[int, str], list[ndarray]] = defaultdict(list)
    for (fact, attack, who), several in cells.items():
        share = np.max(several, 0) if attack == ANY else np.mean(several, 0)
        if who == 0:
            out[fact, names.index(attack), 0] = share
        else:
            distractors[fact, attack].append(share)
    for (fact, attack), several in distractors.items():
        out[fact, names.index(attack), 1] = np.mean(several, 0)
    return out
