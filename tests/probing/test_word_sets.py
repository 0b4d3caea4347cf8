"""Word sets: which words a fact has, which tokens write them, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from families import byte_level_tokenizer, sentencepiece_tokenizer, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import kt
from kt.errors import BadFile
from kt.model.tokens import target_ids
from kt.probing.lens import KINDS, POSITIONS, read_lens
from kt.probing.word_sets import DEMO, Asked, SetReader, WordSets, open_sets, word_ids

ROOT = Path(__file__).resolve().parents[2]
FACT = kt.Fact("The capital of {} is", "France", answer="Paris", target="Rome", id="a", relation="capital")
OTHER = kt.Fact("{} works as a", "Tomas Brill", answer="chemist", target="physicist", id="b", relation="work")


def words(sets, name: str, fact: kt.Fact = FACT) -> set[str]:
    return set(open_sets(sets).words(name, fact, fact.answer))


def test_a_fact_has_the_words_of_its_id_its_subject_and_its_relation():
    sets = {"x": {"a": ["one"], "France": ["two"], "capital": ["two", "three"], "b": ["four"]}, "y": ["five"]}
    assert words(sets, "x") == {"one", "two", "three"} and words(sets, "x", OTHER) == {"four"}
    assert words(sets, "y") == words(sets, "y", OTHER) == {"five"}


def test_the_answer_is_taken_out_of_what_is_related_but_of_no_other_set():
    sets = {"related": ["Paris", "PARIS", "Seine"], "factual": ["Paris", "Rome"], "mine": ["Paris"]}
    assert words(sets, "related") == {"Seine"} and words(sets, "factual") == {"Rome"}
    assert words(sets, "mine") == {"Paris"}


def test_non_factual_is_what_is_related_and_neither_factual_nor_a_stopword():
    sets = {"related": ["Seine", "rome", "the", "city"], "factual": ["Rome"], "stopwords": ["The"]}
    assert open_sets(sets).names == ("related", "factual", "non-factual", "stopwords", "rest")
    assert words(sets, "non-factual") == {"Seine", "city"}
    assert words(sets | {"non-factual": ["own"]}, "non-factual") == {"own"}


def test_stopwords_are_the_shipped_ones_unless_given():
    assert {"the", "of", ",", "."} <= words({"x": ["y"]}, "stopwords")
    assert words({"stopwords": ["zzz"]}, "stopwords") == {"zzz"}
    assert open_sets({"x": ["y"]}).names == ("stopwords", "x", "rest")


@pytest.mark.parametrize(
    "tokenizer", [byte_level_tokenizer(), sentencepiece_tokenizer()], ids=["bytes", "sentencepiece"]
)
def test_a_word_is_written_as_it_stands_in_a_sentence(tokenizer):
    ids = word_ids(tokenizer, "Paris")
    assert ids == tuple(dict.fromkeys(target_ids(tokenizer, "The capital of France is", "Paris")))
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(list(ids)).strip() == "Paris"


def test_punctuation_counts_with_and_without_a_space():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator(["so . " * 50], trainers.BpeTrainer(vocab_size=280, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    spaced, bare = tokenizer("so .")["input_ids"][-1], tokenizer("so.")["input_ids"][-1]
    assert spaced != bare and word_ids(tokenizer, ".") == (spaced, bare)


def test_tokens_of_the_answer_count_for_no_set_that_leaves_it_out():
    tokenizer = byte_level_tokenizer()
    answer_ids = target_ids(tokenizer, FACT.prompt, FACT.answer)
    related = word_ids(tokenizer, "Parisian")
    assert set(related) & set(answer_ids)
    sets = SetReader(open_sets({"related": ["Parisian"], "mine": ["Parisian"]}), tokenizer)
    found = sets.tokens([Asked(FACT, FACT.answer, answer_ids)]).ids[0]
    assert set(found[0]) == set(related) - set(answer_ids) and set(found[3]) == set(related)


def test_the_rest_is_everything_but_the_sets_and_the_answer():
    tokenizer = byte_level_tokenizer()
    asked = [Asked(fact, fact.answer, target_ids(tokenizer, fact.prompt, fact.answer)) for fact in (FACT, OTHER)]
    found = SetReader(open_sets({"related": {"France": ["Rome", "Seattle"]}, "stopwords": ["of"]}), tokenizer).tokens(
        asked
    )
    assert found.outside is not None
    for row, named, outside in zip(asked, found.ids, found.outside, strict=True):
        assert set(outside) == {int(i) for some in named for i in some} | set(row.answer_ids)
    assert len(found.ids[0][0]) and not len(found.ids[1][0])
    assert not set(found.ids[0][0]) & set(asked[0].answer_ids)


def test_a_probe_s_set_values_are_means_over_the_sets_tokens():
    model = tiny_model("llama")
    probe = kt.contrast_probe(model, [FACT, OTHER], sets={"x": {"a": ["Rome", "Seattle"]}, "stopwords": ["of", "the"]})
    assert probe.set_names == ("stopwords", "x", "rest")
    ids = [i for word in ("Rome", "Seattle") for i in word_ids(model.tokenizer, word)]
    row = model.tokenizer(FACT.prompt)["input_ids"]
    every = read_lens(model, [row], [1], np.arange(model.vocab_size)[None]).prob[0, 1, 2, 1]
    frame = probe.sets_dataframe().query("position == 'prediction' and kind == 'mlp' and layer == 1 and set == 'x'")
    assert frame.prob.iloc[0] == pytest.approx(every[sorted(set(ids))].mean(), rel=1e-3)
    assert np.isnan(frame.prob.iloc[1]) and probe.set_curve("x").n == 1 and probe.set_curve("rest").n == 2
    assert len(probe.sets_dataframe()) == 2 * 3 * len(POSITIONS) * len(KINDS) * 3


def test_what_a_file_holds_and_what_it_says_are_the_same(tmp_path):
    sets = {"x": {"a": ["Rome"]}, "y": ["of"]}
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    assert open_sets(tmp_path / "sets.json").given == open_sets(sets).given == open_sets(open_sets(sets)).given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "there are none"),
        ('{"x": []}', "set 'x' is empty"),
        ('{"x": [" "]}', "set 'x' is empty or holds an empty word"),
        ('{"x": {"a": []}}', "set 'x', key 'a' is empty"),
        ('{"x": {}}', "set 'x' is empty"),
        ('{"x": "word"}', "set 'x' is \"word\"; give a list of words"),
        ('{"x": [1]}', r"set 'x' is \[1\]; give a list of words"),
        ('{"x": {"a": {"b": ["c"]}}}', "holds keys again"),
        ('{"x": 3}', "set 'x' is 3"),
        ('{"rest": ["a"]}', "'rest' is what the others leave over"),
    ],
)
def test_bad_sets_are_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "sets.json").write_text(text)
    with pytest.raises(BadFile, match=message) as caught:
        open_sets(tmp_path / "sets.json")
    assert "\n" not in str(caught.value) and "sets.json" in str(caught.value)


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(BadFile, match="cannot read nowhere"):
        open_sets("nowhere.json")


def test_a_set_without_words_or_tokens_for_any_fact_is_refused():
    model = tiny_model("llama")
    with pytest.raises(BadFile, match="set 'x' has no words for any fact"):
        kt.contrast_probe(model, [FACT], sets={"x": {"Spain": ["Madrid"]}})
    with pytest.raises(BadFile, match="set 'related' has no token for any fact"):
        kt.contrast_probe(model, [FACT], sets={"related": ["Paris"]})
    with pytest.raises(BadFile, match="set 'x' has no token for any fact"):
        kt.contrast_probe(model, (fact for fact in [FACT]), sets={"x": {"Spain": ["Madrid"]}})


def test_the_demo_sets_are_what_the_tool_makes(tmp_path):
    spec = importlib.util.spec_from_file_location("make_word_sets", ROOT / "tools" / "make_word_sets.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main(["--out", str(tmp_path / "again.json")])
    assert (tmp_path / "again.json").read_bytes() == DEMO.read_bytes()
    assert DEMO.stat().st_size < 300_000


def test_the_demo_sets_hold_words_for_the_demo_facts():
    sets = open_sets("demo")
    facts = kt.load_facts("demo")
    assert isinstance(sets, WordSets)
    assert all(sets.words("factual", fact, fact.answer) for fact in facts)
    assert sum(bool(sets.words("related", fact, fact.answer)) for fact in facts) > len(facts) / 2
    assert not any(fact.answer in sets.words("factual", fact, fact.answer) for fact in facts)
