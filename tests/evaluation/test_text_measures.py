"""Measures of text, by hand."""

from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kt.evaluation.text import contains, entropy, ngram_entropy, normalised, repetition, same_text, words


def test_words_and_marks_are_words():
    assert words("Don't stop, Zoë_2!") == ["Don", "'", "t", "stop", ",", "Zoë_2", "!"]


def test_entropy_by_hand():
    tokens = ["a", "b", "a", "b"]
    assert entropy(tokens, 2) == pytest.approx(2 / 3 * log2(3 / 2) + 1 / 3 * log2(3))  # ab ba ab
    assert entropy(tokens, 3) == pytest.approx(1.0)  # aba bab
    assert ngram_entropy("a b a b") == pytest.approx((0.9182958340544896 + 2 * 1.0) / 3)


def test_entropy_of_distinct_words_is_the_logarithm_of_their_ngrams():
    text = " ".join(f"w{i}" for i in range(10))
    assert ngram_entropy(text) == pytest.approx((log2(9) + 2 * log2(8)) / 3)


@pytest.mark.parametrize("text", ["", "one", "one two", "x x x x x"])
def test_no_variety_no_entropy(text):
    assert ngram_entropy(text) == 0.0


def test_repetition_by_hand():
    assert repetition("a b c a b c") == pytest.approx(1 / 4)  # abc bca cab abc
    assert repetition("a a a a a") == pytest.approx(2 / 3)
    assert repetition("a b c d") == 0.0
    assert repetition("a b") is None


def test_comparison_forgets_case_articles_punctuation():
    assert normalised(" The  Hague, ") == "hague"
    assert same_text(" the United Kingdom.", "United Kingdom")
    assert not same_text("Parisian", "Paris")
    assert not same_text("!?", "The") and same_text("The", "the")


def test_contains_whole_words():
    assert contains(" is Paris, of course", "Paris")
    assert contains("in the New York area", "new york")
    assert not contains("a Parisian", "Paris")
    assert not contains("", "Paris")


@given(st.text())
def test_any_text_can_be_measured(text):
    assert ngram_entropy(text) >= 0 and (repetition(text) or 0) >= 0
    assert same_text(text, text)
