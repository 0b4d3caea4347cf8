"""A corpus of the tokenizer's own words, and one model with its cache."""

import random

import pytest
from families import TEXTS, tiny_model

from kt.facts.corpus import Corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    words = " ".join(TEXTS).split()
    drawn = random.Random(0)
    path.write_text("\n".join(" ".join(drawn.choices(words, k=20)) for _ in range(150)))
    return Corpus.open(path)


@pytest.fixture(scope="module")
def setting(corpus, tmp_path_factory):
    return tiny_model("qwen3"), corpus, tmp_path_factory.mktemp("cache")
