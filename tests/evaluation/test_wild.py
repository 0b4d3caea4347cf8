"""Free answers: how they are asked for, where they stop, and that nothing is cut to the answer's length."""

from types import SimpleNamespace

import pytest
from families import byte_level_tokenizer, tiny_model

from kt.errors import BadFact, WorkFailed
from kt.evaluation import evaluate
from kt.evaluation.judge import JudgedAnswer
from kt.evaluation.text import as_question, up_to_stop, wild_protocol, wild_request
from kt.facts import Fact, Prompt

CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %} [bot]{% endif %}"
)
FACT = Fact(
    "The capital of {} is", "Italy", id="one", answer="Rome", target="Paris", target_aliases=("Lutetia",),
    rephrasings=("Where does the government of {} meet?",),
    hops=(Prompt("Who rules there?", "Marie Curie", kind="Reasoning", aliases=("Curie",)), Prompt("unanswered", None)),
    neighbours=(Prompt("The capital of Poland is", "Warsaw"), Prompt("Łódź is", None)),
)  # fmt: skip


class Parrot:
    """A model that says what it was told to, and notes what it was asked."""

    def __init__(self, says, chat=None):
        inner = tiny_model("gpt2")
        self.module, self.vocab_size, self.name = inner.module, inner.vocab_size, "parrot"
        self.most_positions = inner.most_positions
        self.tokenizer = byte_level_tokenizer()
        self.says, self.asked = says, []
        self.tokenizer.chat_template = chat

    def why_unreadable(self, ids):
        return None

    def generate(self, prompts, max_new_tokens, **sampling):
        self.asked += [(p, max_new_tokens) for p in prompts]
        return [self.says(p) for p in prompts]


@pytest.fixture
def parrot():
    made = []

    def make(says, chat=None):
        made.append(Parrot(says, chat))
        return made[-1]

    yield make
    for each in made:
        each.tokenizer.chat_template = None  # the tokenizer is shared


def test_questions_stand_between_marks_and_sentences_as_they_are():
    plain = SimpleNamespace(chat_template=None)
    assert as_question(plain, "Who wrote it?") == "Q: Who wrote it? A:"
    assert as_question(plain, "The capital of Italy is") == "The capital of Italy is"
    assert as_question(plain, "Q: Who? A:") == "Q: Who? A:"


def test_a_chat_template_is_one_user_turn(parrot):
    model = parrot(lambda p: " Paris\nis right", CHAT)
    found = evaluate(model, [FACT], protocols=("wild",), max_new_tokens=7)
    assert ("[user] The capital of Italy is [bot]", 7) in model.asked and len(model.asked) == 4
    assert {s.wild_text for s in found.samples if s.wild_text} == {"Paris\nis right"}  # a chat model stops by itself
    assert "chat template" in found.protocol["wild"]


def test_a_broken_template_is_one_line(parrot):
    model = parrot(str, "{{ raise_exception('no\nuser') }}")
    with pytest.raises(WorkFailed, match="chat template fails on 'The capital of Italy is'"):
        evaluate(model, [FACT], protocols=("wild",))


def test_the_first_line_that_is_not_empty_is_the_answer():
    assert up_to_stop("\n\n Paris. \n\nQ: more", chat=False) == "Paris."
    assert up_to_stop("\n Paris.\n\nIt is. ", chat=True) == "Paris.\n\nIt is."
    assert up_to_stop("  \n", chat=False) == ""


def test_free_answers_are_scored_with_aliases_and_not_cut(parrot):
    lines = {"Where": " Lutetia.\nand on", "Who": " it was Curie", "Poland": " Warsaw is the capital"}
    model = parrot(lambda p: next((text for word, text in lines.items() if word in p), "the Paris!"))
    found = evaluate(model, [FACT], protocols=("wild",))
    values = {name: v["one"] for name, v in found.values.items()}
    assert values["edit_success_wild_exact"] == 1.0 and values["paraphrase_wild_exact"] == 1.0
    assert values["portability_wild_exact"] == 0.0 and values["portability_wild_contains"] == 1.0
    assert values["portability_wild_contains[Reasoning]"] == 1.0
    assert values["neighbourhood_wild_exact"] == 0.0 and values["neighbourhood_wild_contains"] == 1.0
    assert len(values) == 10 and not any("judge" in name or "tf" in name for name in values)
    assert {tokens for _, tokens in model.asked} == {64}
    assert "Łódź is" not in [p for p, _ in model.asked]  # nothing to hold its answer against


def test_a_prompt_that_fills_the_model_gets_what_room_is_left():
    model = tiny_model("gpt2")  # 128 positions
    used = len(byte_level_tokenizer()("x " * 40)["input_ids"])
    assert wild_request(model, "x " * 40, 500)[1] == 128 - used and wild_request(model, "x " * 400, 5)[1] == 0
    long = Fact("{} " + "x " * 200, "Italy", answer="Rome", target="Paris")
    with pytest.raises(BadFact, match="the prompt has 403 tokens, and the model 128 positions"):
        evaluate(model, [long], protocols=("wild",), max_new_tokens=3)


def test_a_real_model_says_as_much_as_it_may():
    model = tiny_model("llama")
    found = evaluate(model, [FACT], protocols=("wild",), max_new_tokens=12)
    text = model.generate(["The capital of Italy is"], 12)[0]
    sample = next(s for s in found.samples if s.role == "edit")
    assert sample.wild_text == text.strip().partition("\n")[0].rstrip() and sample.text is None
    assert "at most 12 tokens" in wild_protocol(model.tokenizer, 12) == found.protocol["wild"]


def test_free_answers_are_not_taken_for_the_greedy_text_of_another_protocol():
    model = tiny_model("llama")
    alone = evaluate(model, [FACT], protocols=("wild",), max_new_tokens=10)
    assert all(s.text is None and s.exact_text is None and s.alias_texts == () for s in alone.samples)
    both = evaluate(model, [FACT], protocols=("wild", "gen"), max_new_tokens=10)
    assert [s.wild_text for s in both.samples] == [s.wild_text for s in alone.samples]
    gen = evaluate(model, [FACT], protocols=("gen",))
    assert [(s.text, s.exact_text, s.alias_texts) for s in both.samples] == [
        (s.text, s.exact_text, s.alias_texts) for s in gen.samples
    ]


def test_verdicts_belong_to_their_answers(parrot):
    heard = []

    def judge(cases):
        heard.extend(cases)
        return [None if "Warsaw" in case.answers else case.answers[0] == "Paris" for case in cases]

    found = evaluate(parrot(lambda p: "Rome"), [FACT], protocols=("wild",), judge=judge)
    assert JudgedAnswer("The capital of Italy is", ("Paris", "Lutetia"), "Rome") in heard and len(heard) == 4
    values = {name: v for name, v in found.values.items() if "judge" in name}
    assert values == {
        "edit_success_wild_judge": {"one": 1.0}, "paraphrase_wild_judge": {"one": 1.0},
        "portability_wild_judge": {"one": 0.0}, "portability_wild_judge[Reasoning]": {"one": 0.0},
    }  # fmt: skip


def test_each_alias_has_the_continuation_of_its_own_length():
    model = tiny_model("llama")
    found = evaluate(model, [FACT], protocols=("gen",))
    sample = next(s for s in found.samples if s.role == "edit")
    lengths = [len(model.tokenizer(" " + text)["input_ids"]) for text in ("Paris", "Lutetia")]
    assert lengths[0] != lengths[1]
    texts = [model.generate([sample.prompt], n)[0] for n in lengths]
    assert (sample.exact_text, sample.alias_texts) == (texts[0], (texts[1],))
