"""Shared fixtures. beartype comes before nnsight, whose import machinery would otherwise hide from it."""

import os
import random

import beartype  # noqa: F401  (first: see above)
import pytest
import torch
from families import FAMILIES, TEXTS, tiny_model

from kt.facts.corpus import Corpus

torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the Hub, also where only pytest was typed


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return tiny_model(family)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A corpus of the tiny tokenizer's own words."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    words = " ".join(TEXTS).split()
    drawn = random.Random(0)
    path.write_text("\n".join(" ".join(drawn.choices(words, k=20)) for _ in range(150)))
    return Corpus.open(path)


@pytest.fixture(scope="module")
def setting(corpus, tmp_path_factory):
    """One tiny model with a corpus and a cache of second moments."""
    return tiny_model("qwen3"), corpus, tmp_path_factory.mktemp("cache")
