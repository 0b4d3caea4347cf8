"""Tracing many facts holds no more than tracing one: what a fact needed is given back."""

import gc
import resource
import sys

import pytest
import torch

import kt

pytestmark = pytest.mark.filterwarnings("ignore:traced all the same")


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)


def tensors() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)


def test_two_hundred_facts_grow_nothing(gpt2):
    facts = [kt.Fact(f"The city {i} of {{}} is", "Paris", answer="Rome", foil="Italy") for i in range(200)]

    def run(some):
        return kt.causal_trace(gpt2, some, kinds=("mlp",), keep="all", samples=2)

    run(facts[:20])
    before, held = peak(), tensors()
    trace = run(facts)
    arrays = sum(v.nbytes for f in trace.facts for by_kind in f.patched.values() for v in by_kind.values())
    assert trace.n_facts == 200 and tensors() <= held
    assert peak() - before < 16 + arrays / 2**20, "MiB beyond the first twenty facts"
