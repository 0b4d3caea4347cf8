"""ICE: BM25 against its formula, and the text before a prompt."""

import math

import pytest

from kt.editing.context_edit import BM25, Context
from kt.errors import KtError


def test_the_retriever_is_okapi_bm25():
    documents = ["the tongue of Ann is Welsh", "the tongue of Bob is Danish and only Danish", "Rome"]
    words = [
        ["tongue", "of", "ann", "is", "welsh"],
        ["tongue", "of", "bob", "is", "danish", "and", "only", "danish"],
        ["rome"],
    ]
    mean = sum(map(len, words)) / 3
    for word, document in (("danish", 1), ("tongue", 0)):
        n, f = sum(word in some for some in words), words[document].count(word)
        idf = math.log(1 + (3 - n + 0.5) / (n + 0.5))
        expected = idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(words[document]) / mean))
        assert BM25(documents).weights[document][word] == pytest.approx(expected)
    assert BM25(documents).nearest("Which tongue has Bob?") == [1, 0] and BM25(documents).nearest("Oslo") == []


def test_the_nearest_fact_stands_before_the_prompt_and_facts_add_up():
    ann, bob = (Context((f"{name} speaks Welsh",), (f"New Fact: {name} speaks Welsh\n",)) for name in ("Ann", "Bob"))
    both = ann.plus(bob)
    assert both.rendered(None, "Bob lives in") == "New Fact: Bob speaks Welsh\nPrompt: Bob lives in"
    assert both.rendered(None, "Rome is {old}") == "Rome is {old}" and ann.rendered(None, "Bob lives") == "Bob lives"
    with pytest.raises(KtError, match="retriever without facts"):
        Context((), ())
