"""One record under several edits: the model's text under each (JEEP, Table 1).

The edited prompt should give the new answer, an equivalent prompt (a paraphrase) too, an unrelated one (a neighbour)
its own. Texts are greedy continuations; one is right when it holds the answer, or an alias of it, as whole words, and
for a neighbour without an answer when it is what the unedited model says. "Right" is lenient so: a text that goes on to
say the opposite passes, so that the texts are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._util.data import complete_file, read_json, write_json
from .._util.kinds import require_kinds, takes
from .._util.text import visible, without_folders
from ..editing.edit_io import fits
from ..errors import BadFact, BadFile
from ..evaluation.text import contains
from ..facts.fact import Fact
from ..facts.load import FactsLike, facts_from
from ..report import Column, Shown, Table

if TYPE_CHECKING:
    import pandas as pd

    from ..editing.stack import AnyEdit
    from ..model.model import TracedModel


KIND = "case_study"
UNEDITED = "unedited"
MARKS = {True: "✓", False: "✗"}
TOKENS = 12
"""Tokens of a continuation: a short answer and a few words that show where the text goes."""


class Question(NamedTuple):
    """A prompt and its right continuations; `role` is edited, equivalent or unrelated."""

    role: str
    prompt: str
    answers: tuple[str, ...]


class Reply(NamedTuple):
    """The model's text under one method; `right` is None where no answer is known."""

    text: str
    right: bool | None


FORM = {
    "model": str, "record": str, "methods": [str], "questions": [{"role": str, "prompt": str, "answers": [str]}],
    "replies": {...: [{"text": str, "right": (bool, None)}]},
}  # fmt: skip
"""Of its file, as `fits` reads it."""


@dataclass(frozen=True)
class CaseStudy(Shown):
    """The result of `case_study`.

    Attributes:
        model: its name.
        record: the id of the fact.
        questions: the prompts, each with the answer that is expected after an edit.
        replies: by method one text a question; the first method is the unedited model.
    """

    model: str
    record: str
    questions: tuple[Question, ...]
    replies: Mapping[str, tuple[Reply, ...]]

    kind = KIND
    heading = "A case"

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The model and the record."""
        return {"model": self.model, "record": self.record}

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods, in the table's order."""
        return tuple(self.replies)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt and method."""
        import pandas as pd

        rows = [
            (q.role, q.prompt, q.answers[0] if q.answers else None, method, *replies[i])
            for i, q in enumerate(self.questions)
            for method, replies in self.replies.items()
        ]
        return pd.DataFrame(rows, columns=["role", "prompt", "expected", "method", "text", "right"])

    def notes(self) -> Sequence[str]:
        """How to read the table."""
        return [f"{self.record}: greedy continuations; ✓ holds the expected answer, ✗ does not."]

    def tables(self) -> Sequence[Table]:
        """A row a prompt, a column a method; wrong texts are marked, and red in a terminal as in the paper."""
        rows = []
        for i, question in enumerate(self.questions):
            expected = question.answers[0] if question.answers else "as unedited"
            rows.append([question.role, question.prompt, expected, *(replies[i] for replies in self.replies.values())])
        wrong = lambda reply: "red" if reply.right is False else ""  # noqa: E731
        methods = [Column(visible(name), _cell, wrong) for name in self.methods]
        texts = [Column(name, visible) for name in ("", "prompt", "expected")]
        return [Table([*texts, *methods], rows, f"{without_folders(self.model)}: {self.record}")]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        replies = {method: [reply._asdict() for reply in given] for method, given in self.replies.items()}
        questions = [question._asdict() for question in self.questions]
        return {
            "model": self.model,
            "record": self.record,
            "methods": list(self.methods),
            "questions": questions,
            "replies": replies,
        }

    def save(self, path: str | Path) -> Path:
        """Write the case study to `path`, one JSON file, whole or not at all."""
        return write_json(path, {"kind": KIND, **self.as_dict()})

    @classmethod
    def load(cls, path: str | Path) -> CaseStudy:
        """Read the case study that `save` wrote to `path`.

        Raises:
            BadFile: it is not there, or no case study.
        """
        data = read_json(path)
        if data.get("kind") != KIND:
            raise BadFile(f"{path}: no case study; give a file that CaseStudy.save wrote")
        with complete_file(path, "case study", "run kt case again"):
            if not fits(data, FORM):
                raise ValueError("a value of another type")
            if {len(data["replies"][method]) for method in data["methods"]} - {len(data["questions"])}:
                raise ValueError("not a reply a question")
            questions = tuple(Question(q["role"], q["prompt"], tuple(q["answers"])) for q in data["questions"])
            replies = {m: tuple(Reply(r["text"], r["right"]) for r in data["replies"][m]) for m in data["methods"]}
            return cls(data["model"], data["record"], questions, replies)

    def __repr__(self) -> str:
        return f"CaseStudy({self.record}: {len(self.questions)} prompts, {', '.join(self.methods)})"


@takes(edits=((Mapping,), "edits by the names to show"))
def case_study(
    model: TracedModel, fact: FactsLike, edits: Mapping[str, AnyEdit], max_new_tokens: int = TOKENS, each: int = 1
) -> CaseStudy:
    """Let the unedited model and every edit answer the fact's own prompts, greedily.

    Args:
        model: unedited; its weights are the same bytes afterwards.
        fact: one, as `causal_trace` takes them, with a target (else the foil is the target).
        edits: name to show -> edit of this model that has the fact among its requests, or not.
        max_new_tokens: of each continuation; a longer answer gets as many as it has.
        each: paraphrases and neighbours to show, at most.

    Returns:
        Every prompt with each method's text, and whether it holds the expected answer.

    Raises:
        BadFact: the fact asks for nothing new, an edit is named like the unedited model, or a number is below one.

    Examples:
        >>> study = kt.case_study(model, facts[0], {"memit": edit})
        >>> study.methods
        ('unedited', 'memit')
    """
    from ..editing.stack import ANY_EDIT

    require_kinds(edits, dict.fromkeys(edits, ANY_EDIT))
    if UNEDITED in edits:
        raise BadFact(f"an edit cannot be called {UNEDITED!r}, the name of the column beside it; give it another")
    if min(max_new_tokens, each) < 1:
        raise BadFact(f"max_new_tokens {max_new_tokens} and each {each} must be at least 1")
    fact, *others = facts_from(fact)
    if others:
        raise BadFact(f"a case is of one fact, and {1 + len(others)} were given; choose one")
    questions = tuple(_questions(fact.as_request(), each))
    texts = {UNEDITED: _texts(model, questions, max_new_tokens, None)}
    texts |= {name: _texts(model, questions, max_new_tokens, edit) for name, edit in edits.items()}
    replies = {
        name: tuple(
            Reply(text, _right(question, text, old))
            for question, text, old in zip(questions, answers, texts[UNEDITED], strict=True)
        )
        for name, answers in texts.items()
    }
    return CaseStudy(model.name, fact.id, questions, replies)


def _questions(fact: Fact, each: int) -> Iterator[Question]:
    wanted = (str(fact.target), *fact.target_aliases)
    yield Question("edited", fact.prompt, wanted)
    for prompt in fact.paraphrases[:each]:
        yield Question("equivalent", prompt, wanted)
    for near in fact.neighbours[:each]:
        yield Question("unrelated", near.prompt, () if near.answer is None else (near.answer, *near.aliases))


def _texts(model: TracedModel, questions: Sequence[Question], tokens: int, edit: AnyEdit | None) -> list[str]:
    from ..model.sampling import continuations
    from ..model.tokens import token_ids

    def room(question: Question) -> int:
        return max([tokens, *(len(token_ids(model.tokenizer, " " + answer)) for answer in question.answers)])

    wishes = [(question.prompt, room(question)) for question in questions]
    with nullcontext() if edit is None else edit.applied(model):
        texts = continuations(model, wishes)
    return [texts[wish] for wish in wishes]


def _right(question: Question, text: str, unedited: str) -> bool | None:
    if question.answers:
        return any(contains(text, answer) for answer in question.answers)
    return text == unedited


def _cell(reply: Reply) -> str:
    mark = "" if reply.right is None else MARKS[reply.right] + " "
    return visible(mark + reply.text.strip())
