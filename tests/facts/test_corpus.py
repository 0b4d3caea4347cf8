"""The texts that ship with kt, and which model reads which."""

import re

from families import tiny_model

import kt
from kt.editing import key_statistics
from kt.facts.corpus import Corpus
from kt.model.sites import Kind, Site


def test_auto_is_english_except_for_the_demo_model():
    assert [Corpus.open("auto", name).name for name in ("demo", "gpt2")] == ["demo", "english"]
    moments = [
        key_statistics(model, [Site(Kind.MLP, 0)], max_tokens=300) for model in (kt.load("demo"), tiny_model("gpt2"))
    ]
    assert [m.corpus for m in moments] == ["demo", "english"]


def test_the_english_text_is_prose_of_several_kinds():
    documents = list(Corpus.open("english").texts())
    words = " ".join(documents).split()
    assert len(words) > 90_000  # over 100,000 tokens of any tokenizer
    assert all(len(document) < 4000 and document.isprintable() for document in documents)
    assert not re.search(r"<[a-z]|&[a-z]+;|https?:|Gutenberg|\[Laughter", " ".join(documents))
    for word in ("Kyrgyzstan", "SQLite", "Father Brown", "Congress"):
        assert any(word in document for document in documents[:150]), word  # mixed: early parts are of all kinds


def test_the_heldout_text_shares_nothing_with_the_sample():
    sample, heldout = list(Corpus.open("english").texts()), list(Corpus.heldout("gpt2").texts())
    assert 7_000 < sum(map(len, heldout)) < 14_000
    seen = {tuple(w[i : i + 12]) for text in sample for w in [text.split()] for i in range(len(w) - 11)}
    for text in heldout:
        words = text.split()
        assert not any(tuple(words[i : i + 12]) in seen for i in range(len(words) - 11))
