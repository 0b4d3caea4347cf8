"""The protocol mello: a multi-hop question in steps, each held against a memory of edits (MeLLo, Zhong et al. 2023).

The model writes a subquestion and answers it; where a memory stands in the model (an edit of kind context), the fact
nearest to the subquestion is put behind, and the model says whether it contradicts, and which answer holds; so on, up
to a final answer. Where no fact is near, a line says so. A fact that the model makes up never counts: nothing is read
from there on. Without a memory each subquestion's own answer holds, so an edit of the weights is asked by the same
steps. MeLLo's paper has GPT-J and larger models; its nearest fact is Contriever's, here that of the edit's retriever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..model.effects import text_of
from ..model.model import TracedModel

HOPS, TOKENS = 4, 60
"""The most subquestions of a question, and tokens that are written at once."""
OWN, FINAL, FACT = "Generated answer:", "Final answer:", "Retrieved fact:"
NONE_NEAR = (f"{FACT} none.", "Retrieved fact does not contradict generated answer.")
"""What stands in the place of a fact where none is near: with nothing there, the model would go on with one of its own,
as the worked questions show it."""

EXAMPLES = """\
Question: What is the capital of the country that Hamlet's author comes from?
Subquestion: Who is the author of Hamlet?
Generated answer: The author of Hamlet is William Shakespeare.
Retrieved fact: Hamlet was written by Victor Hugo.
Retrieved fact contradicts generated answer.
Intermediate answer: Victor Hugo
Subquestion: Which country does Victor Hugo come from?
Generated answer: Victor Hugo comes from France.
Retrieved fact: The Tiber flows through Vienna.
Retrieved fact does not contradict generated answer.
Intermediate answer: France
Subquestion: What is the capital of France?
Generated answer: The capital of France is Paris.
Retrieved fact: The capital of France is Lyon.
Retrieved fact contradicts generated answer.
Intermediate answer: Lyon
Final answer: Lyon

Question: Which language do people speak in the city where Carl Benz lived?
Subquestion: In which city did Carl Benz live?
Generated answer: Carl Benz lived in Mannheim.
Retrieved fact: The telephone was invented in Oslo.
Retrieved fact does not contradict generated answer.
Intermediate answer: Mannheim
Subquestion: Which language do people speak in Mannheim?
Generated answer: People speak German in Mannheim.
Retrieved fact: The language of Mannheim is Dutch.
Retrieved fact contradicts generated answer.
Intermediate answer: Dutch
Final answer: Dutch

"""
"""Two worked questions, with a memory."""
PLAIN = """\
Question: What is the capital of the country that Hamlet's author comes from?
Subquestion: Who is the author of Hamlet?
Generated answer: The author of Hamlet is William Shakespeare.
Subquestion: Which country does William Shakespeare come from?
Generated answer: William Shakespeare comes from England.
Subquestion: What is the capital of England?
Generated answer: The capital of England is London.
Final answer: London

Question: Which language do people speak in the city where Carl Benz lived?
Subquestion: In which city did Carl Benz live?
Generated answer: Carl Benz lived in Mannheim.
Subquestion: Which language do people speak in Mannheim?
Generated answer: People speak German in Mannheim.
Final answer: German

"""
"""The same without one."""

Memory = Callable[[str], str | None]
"""A text -> the nearest fact; None where none is near."""
Write = Callable[[Sequence[str]], Mapping[str, str]]
"""Texts to be continued -> what the model writes behind each."""


def answers(questions: Sequence[str], nearest: Memory | None, write: Write) -> dict[str, str]:
    """The final answer to each question, "" where the model comes to none in `HOPS` steps.

    Args:
        nearest: a subquestion -> the fact of the memory that is nearest to it; None without a memory.
        write: continues texts; whatever it writes behind the step that was asked for is dropped.
    """
    examples = PLAIN if nearest is None else EXAMPLES
    texts = {question: f"{examples}Question: {question}\n" for question in dict.fromkeys(questions)}
    found: dict[str, str] = dict.fromkeys(texts, "")
    for _ in range(HOPS + 1):
        written = write(list(texts.values()))
        going = {}
        for question, text in texts.items():
            step = _step(written[text])
            if (last := step[-1] if step else "").startswith(FINAL):
                found[question] = last.removeprefix(FINAL).strip()
            elif last.startswith(OWN):
                asked = next((s for s in step if s.startswith("Subquestion:")), question).partition(":")[2]
                if nearest is not None:
                    step += NONE_NEAR if (fact := nearest(asked)) is None else (f"{FACT} {fact}.",)
                going[question] = text + "".join(f"{line}\n" for line in step)
        texts = going
        if not texts:
            break
    return found


def _step(written: str) -> list[str]:
    """The lines up to the model's own answer or the final one, whichever comes first; none where neither comes before a
    fact that the model made up."""
    lines = [line.strip() for line in written.partition(FACT)[0].strip().splitlines()]
    ends = [i for i, line in enumerate(lines) if line.startswith((OWN, FINAL, "Question:"))]
    return lines[: ends[0] + 1] if ends and not lines[ends[0]].startswith("Question:") else []


def retriever_of(model: TracedModel) -> str:
    """How the context edits in the model find facts, in words."""
    effect = text_of(model)
    known = "bm25" if effect is None else effect.fields().get("retriever", "bm25")
    names = [known] if isinstance(known, str) else list(dict.fromkeys(known))
    return " and ".join("embeddings" if name == "embeddings" else "BM25" for name in names)


def memory_of(model: TracedModel) -> Memory | None:
    """The facts of the context edits that stand in the model, all of them together: the nearest of all is found. None
    where none does."""
    effect = text_of(model)
    return None if effect is None else lambda text: effect.recall(model, text)
