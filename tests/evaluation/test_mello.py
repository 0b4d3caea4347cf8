"""The protocol mello: its steps against a model of fixed words, and in an evaluation with a memory."""

import pytest
from families import tiny_model

import kt
from kt.evaluation import mello

QUESTION = "What is the capital of the country where Ada lives?"
STEPS = {
    "Question": "Subquestion: Where does Ada live?\nGenerated answer: Ada lives in Norway.\nRetrieved fact: made up",
    "Retrieved fact: Ada lives in Peru.": "Retrieved fact contradicts generated answer.\nIntermediate answer: Peru\n"
    "Subquestion: What is the capital of Peru?\nGenerated answer: Lima.\nand more",
    "Retrieved fact: The capital of Peru is Oslo.": "Intermediate answer: Oslo\nFinal answer: Oslo\nQuestion: next",
    "Generated answer: Ada lives in Norway.": "Final answer: Bergen",
}


def says(texts):
    """The next lines by the last line of a text."""
    return {
        text: next(words for last, words in STEPS.items() if text.rstrip().splitlines()[-1].startswith(last))
        for text in texts
    }


def nearest(text):
    return "Ada lives in Peru" if "Ada" in text else "The capital of Peru is Oslo" if "Peru" in text else None


def test_each_subquestion_is_held_against_the_nearest_fact_and_nothing_is_taken_from_beyond_a_step():
    asked = []

    def write(texts):
        asked.extend(texts)
        return says(texts)

    assert mello.answers([QUESTION, QUESTION], nearest, write) == {QUESTION: "Oslo"}
    assert len(asked) == 3 and "made up" not in asked[-1] and "and more" not in asked[-1]
    assert asked[0].startswith(mello.EXAMPLES) and asked[0].endswith(f"Question: {QUESTION}\n")
    assert mello.answers([QUESTION], None, write) == {QUESTION: "Bergen"}, "without a memory its own answers hold"
    assert mello.answers([QUESTION], nearest, lambda texts: dict.fromkeys(texts, "no form")) == {QUESTION: ""}
    endless = "Subquestion: Where?\nGenerated answer: There."
    assert mello.answers([QUESTION], None, lambda texts: dict.fromkeys(texts, endless)) == {QUESTION: ""}


def test_a_fact_that_the_model_writes_itself_never_counts():
    """Where no fact is near, the model goes on with one of its own, as the worked questions show it."""
    asked = []

    def write(texts):
        asked.extend(texts)
        return {text: steps[text.rstrip().splitlines()[-1]] for text in texts}

    own = "Subquestion: Where does Ada live?\nGenerated answer: Ada lives in Norway."
    made_up = "Retrieved fact: Ada lives in Peru.\nRetrieved fact contradicts generated answer.\n"
    steps = {
        f"Question: {QUESTION}": own,
        own.splitlines()[-1]: made_up + "Intermediate answer: Peru\nFinal answer: Lima",
    }
    steps["Retrieved fact does not contradict generated answer."] = "Intermediate answer: Norway\nFinal answer: Oslo"
    assert mello.answers([QUESTION], lambda text: None, write) == {QUESTION: "Oslo"}
    assert asked[-1].endswith(f"{own}\nRetrieved fact: none.\nRetrieved fact does not contradict generated answer.\n")
    for written in (made_up + "Final answer: Lima", f"{own} {made_up}Final answer: Lima"):
        steps["Retrieved fact does not contradict generated answer."] = written
        assert mello.answers([QUESTION], lambda text: None, write) == {QUESTION: ""}
    assert "Peru" not in "".join(text.removeprefix(mello.EXAMPLES) for text in asked)
    assert mello.answers([QUESTION], None, write) == {QUESTION: ""}, "without a memory neither"


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_asks_multi_hop_questions_alone_with_the_memory_of_the_edit(monkeypatch):
    model = tiny_model("llama", max_position_embeddings=4096)
    hops = (kt.Prompt(QUESTION, "Oslo", "Bergen", "multi_hop"), kt.Prompt("Ada sees", "fjords", kind="one_hop"))
    facts = [kt.Fact("{} lives in", "Ada", answer="Norway", target="Peru", hops=hops)]
    steps, seen = mello.answers, []

    def spied(questions, memory, write):
        seen.append((tuple(questions), memory and memory("Where does Ada live?")))
        assert steps(questions, memory, write).keys() == {QUESTION}, "the tiny model's own text passes through"
        return {QUESTION: "It is Oslo" if memory else "Bergen"}

    monkeypatch.setattr(mello, "answers", spied)
    before = kt.evaluate(model, facts, protocols="mello")
    with kt.edit(model, facts, "ice").applied(model):
        after = kt.evaluate(model, facts, protocols="mello")
    assert seen == [((QUESTION,), None), ((QUESTION,), "Ada lives in Peru")]
    scores = [each.values["portability_mello_contains"] for each in (before, after)]
    assert [list(each.values()) for each in scores] == [[0.0], [1.0]]
    assert "up to 4 subquestions" in after.protocol["mello"]


def test_the_memory_of_a_stack_gives_the_nearest_fact_of_all_its_edits_and_not_of_the_last():
    model = tiny_model("llama", max_position_embeddings=4096)
    edits = [
        kt.edit(model, [kt.Fact("The capital of {} is", subject, target=target)], "ice", check=False)
        for subject, target in (("France", "Rome"), ("Poland", "Oslo"))
    ]
    with kt.EditStack(edits).applied(model):
        memory = mello.memory_of(model)
        assert memory("What is the capital of France?") == "The capital of France is Rome"
        assert memory("What is the capital of Poland?") == "The capital of Poland is Oslo"
        assert memory("Xyzzy plugh") is None and mello.retriever_of(model) == "BM25"
    assert mello.memory_of(model) is None
    states = kt.edit(model, [kt.Fact("{} speaks", "Ann", target="Welsh")], "ice", retriever="embeddings", check=False)
    with kt.EditStack([edits[0], states]).applied(model):
        assert mello.retriever_of(model) == "BM25 and embeddings"
