"""A fact's texts: white space, braces, the subject's place, the text before an answer."""

import pytest

from kt.errors import BadFact, KtError, SubjectNotFound
from kt.facts import Fact, Prompt, fact_by_hand, facts_from, load_facts, read_facts
from kt.facts.fact import facts_digest, fill, stripped, template_of

CHAT = "<|im_start|>user\nWhere does {} live?<|im_end|>\n<|im_start|>assistant\n"


def test_a_line_end_at_a_prompts_end_stays_from_files_and_from_python(tmp_path):
    made = Fact(CHAT, "Ada", target="Oslo")
    path = tmp_path / "a.csv"
    path.write_text(f'prompt,subject,target\n"{CHAT}",Ada,Oslo\n')
    (read,) = load_facts(path)
    (given,) = facts_from([{"prompt": CHAT, "subject": "Ada", "target": "Oslo"}])
    assert made.prompt == read.prompt == given.prompt and made.prompt.endswith("assistant\n")


def test_spaces_at_both_ends_of_a_prompt_and_of_an_answer_go():
    fact = Fact(
        "  {} lives in  ", "Ada", answer=" Rome\n", rephrasings=(" {}'s home is ",), hops=(Prompt("Her is ", "x "),)
    )
    assert (fact.template, fact.answer, fact.rephrasings) == ("{} lives in", "Rome", ("{}'s home is",))
    assert fact.hops == (Prompt("Her is", "x"),)
    assert Fact("{} answers:\n ", "Ada").prompt == "Ada answers:\n" and Fact("a\t{}\t", "Ada").prompt == "a\tAda\t"


@pytest.mark.parametrize(
    ("end", "name"),
    [
        ("\u00a0", "NO-BREAK SPACE"),
        ("\u200b", "ZERO WIDTH SPACE"),
        ("\u2028", "U+2028"),
        ("\f", "U+000C"),
        ("\u200f", "MARK"),
        ("\u00ad", "HYPHEN"),
    ],
)
def test_an_end_that_cannot_be_meant_is_refused_by_name_and_left_out_of_published_records(end, name):
    with pytest.raises(BadFact, match=name.replace("+", r"\+")):
        Fact("{} lives in" + end, "Ada")
    with pytest.raises(BadFact, match=name.replace("+", r"\+")):
        facts_from([{"prompt": "{} lives in", "subject": "Ada", "paraphrases": ["{}'s home is" + end]}])


def test_a_published_record_with_such_an_end_is_left_out_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"known_id": 1, "prompt": "Ada lives in\\u00a0", "subject": "Ada", "attribute": "Rome"}\n'
                    '{"known_id": 2, "prompt": "Bo lives in", "subject": "Bo", "attribute": "Rome"}')  # fmt: skip
    loaded = read_facts(path)
    assert len(loaded.facts) == 1 and list(loaded.skips.reasons) == ["a prompt ends in U+00A0 (NO-BREAK SPACE)"]


def test_braces_in_other_prompts_stand_for_the_subject():
    own = {"prompt": "{} lives in", "subject": "Ada", "neighbourhood": ["{} was born in"], "generation": ["{} is"],
           "portability": [{"prompt": "The mayor of {}'s town is", "answer": "Bo"}]}  # fmt: skip
    (fact,) = facts_from([own])
    assert fact.neighbours[0].prompt == "Ada was born in" and fact.generation == ("Ada is",)
    assert fact.hops[0].prompt == "The mayor of Ada's town is"
    with pytest.raises(KtError, match="more than one"):
        Fact("{} lives in", "Ada", rephrasings=("{} and {} live in",))
    with pytest.raises(KtError, match="the fact's own prompt"):
        facts_from([{**own, "neighbourhood": ["{} lives in"]}])


def test_braces_of_the_text_stay_text():
    assert Fact("In {} the literal {{}} is", "Python").prompt == "In Python the literal {} is"
    assert template_of("In Python the literal {} is", "Python", filled=True) == "In {} the literal {{}} is"
    known = {"known_id": 1, "prompt": "In Python the literal {} is", "subject": "Python", "attribute": "empty"}
    (fact,) = facts_from([known])
    assert fact.prompt == known["prompt"] and fact.template == "In {} the literal {{}} is"
    assert fill(fill("So it is. {}", "In {} the literal {{}} is"), "Python") == "So it is. In Python the literal {} is"
    with pytest.raises(SubjectNotFound, match="braces of the text"):
        Fact("the {} of {} is", "Python")


def test_the_subject_is_found_as_whole_words_first():
    assert fact_by_hand("i see how wide it", "i", "is").template == "{} see how wide it"
    assert template_of("Paris Hilton's Paris is in Parisian", "Paris") == "Paris Hilton's {} is in Parisian"
    assert template_of("C++ is C++-like, C", "C") == "C++ is C++-like, {}"
    assert template_of("フランスの首都は", "フランス") == "{}の首都は"
    assert template_of("Two cats are", "cat") == "Two {}s are"  # else inside a word


@pytest.mark.parametrize(
    ("prompt", "subject", "template"),
    [
        ("भारत की राजधानी भारतीय", "भारत", "{} की राजधानी भारतीय"),  # a vowel sign goes on with the word
        ("日本、日本の首都は", "日本", "日本、{}の首都は"),  # no spaces: every place is a whole word
        ("프랑스, 프랑스의 수도는", "프랑스", "프랑스, {}의 수도는"),
        ("Cafe\u0301 or Cafe", "Cafe", "Cafe\u0301 or {}"),
    ],
)
def test_whole_words_are_those_of_the_script(prompt, subject, template):
    assert template_of(prompt, subject) == template


def test_a_subject_and_answers_lose_what_is_not_seen_at_their_ends():
    fact = Fact("\ufeff{} lives in", " Ada\u00a0", answer="\u200bRome\ufeff")
    assert (fact.prompt, fact.answer) == ("Ada lives in", "Rome")


def test_which_of_several_places_counts_is_said(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "Paris Hilton likes Paris in", "subject": "Paris"}\n{"prompt": "Two cats are", "subject": "cat"}'
    )
    notes = read_facts(path).skips.noted
    assert notes == [
        "the subject stands more than once in its prompt (the place marked by {} counts, else the last one): "
        f"1 times (first: {path}, line 1)",
        f"the subject stands in its prompt only inside another word: 1 times (first: {path}, line 2)",
    ]
    with pytest.warns(UserWarning, match="more than once"):
        facts_from([{"prompt": "Paris Hilton likes Paris in", "subject": "Paris"}])


def test_another_unicode_form_of_the_subject_is_called_that():
    with pytest.raises(SubjectNotFound, match="one is NFC, one NFD"):
        template_of("The mayor of Sao\u0303 is", "Saõ")


def test_a_target_prefix_is_a_records_own_or_everybodys(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "{} is", "subject": "a", "target_prefix": "", "neighbourhood": [{"prompt": "b is"}]}\n'
                    '{"prompt": "{} is", "subject": "b"}')  # fmt: skip
    first, second = load_facts(path)
    assert (first.target_prefix, first.neighbours[0].target_prefix, second.target_prefix) == ("", "", None)
    assert [f.target_prefix for f in load_facts(path, join="\n")] == ["", "\n"]
    with pytest.raises(BadFact, match="'target_prefix' is a number"):
        facts_from([{"prompt": "{} is", "subject": "a", "target_prefix": 1}])


def test_the_digest_of_facts_without_a_prefix_is_that_of_older_versions():
    facts = [Fact("{} is", "a", answer="b", neighbours=(Prompt("c is", "d"),))]
    assert facts_digest(facts) == "15523789777e57295b991cf40bb7d7beb1a4a0c46b52666b0f2a8976afe013c9"
    assert facts_digest(facts) != facts_digest([Fact("{} is", "a", answer="b", target_prefix="")])


def test_join_on_the_command_line_is_for_a_fact_by_hand_and_for_files(tmp_path):
    from kt.cli.options import FactOptions
    from kt.cli.session import load_facts as load

    by_hand = load(FactOptions(prompt="Paris likes Paris in", subject="Paris", join=r"\n"))
    assert by_hand.facts[0].target_prefix == "\n" and "more than once" in by_hand.skips.noted[0]
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "{} is", "subject": "a"}')
    assert [load(FactOptions(facts=str(path), join=j)).facts[0].target_prefix for j in ("", None)] == ["", None]


def test_a_million_spaces_around_a_text_take_no_time():
    """One at a time off a text that is copied each time, they would take minutes."""
    assert stripped(" " * 1_000_000 + "Paris" + "\u200b" * 1_000_000) == "Paris"
    assert stripped(" \ufeffParis ", left=True) == "Paris "
