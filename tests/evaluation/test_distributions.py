"""KL of the next token: exact, zero for the same model, refused where it cannot be taken."""

import pytest
import torch
from families import tiny_model

from kt.errors import BadFact
from kt.evaluation import distributions, evaluate
from kt.evaluation.distributions import Distributions, divergences
from kt.facts import Fact, Prompt
from kt.model import memory
from kt.model.sites import Kind, Site

FACTS = [
    Fact("{} is", "Rome", id=str(i), target="red",
         neighbours=(Prompt("Paris is in", "France"), Prompt("Marie Curie was born in " + "Warsaw " * i)))
    for i in range(3)
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def changed(model):
    site = Site(Kind.MLP, 1)
    model.write(site, 0.3 * torch.randn(model.weight(site).shape, generator=torch.Generator().manual_seed(0)))


def plain(model, prompt):
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        return model.module(input_ids=ids).logits[0, -1].double().log_softmax(-1)


@pytest.mark.parametrize("batch_size", ["auto", 1, 2])
def test_kl_is_that_of_two_plain_forwards(model, batch_size):
    reference = distributions(model, FACTS, batch_size)
    assert list(reference.rows) == ["Paris is in", *("Marie Curie was born in" + " Warsaw" * i for i in range(3))]
    before = {prompt: plain(model, prompt) for prompt in reference.rows}
    with model.restored([Site(Kind.MLP, 1)]):
        changed(model)
        found = evaluate(model, FACTS, protocols=("tf",), reference=reference, batch_size=batch_size)
        expected = {p: (b.exp() * (b - plain(model, p))).sum().item() for p, b in before.items()}
    assert min(expected.values()) > 0.01
    for sample in found.samples:
        if sample.role == "neighbourhood":
            assert sample.kl == pytest.approx(expected[sample.prompt], rel=1e-3, abs=1e-6)
    first = expected["Paris is in"]
    for i, record in enumerate("012"):
        other = expected["Marie Curie was born in" + " Warsaw" * i]
        assert found.values["neighbourhood_kl"][record] == pytest.approx((first + other) / 2, rel=1e-3)


def test_the_same_model_has_not_moved(model):
    found = evaluate(model, FACTS, generate=False, reference=distributions(model, FACTS))
    assert found.metrics["neighbourhood_kl"].mean == 0.0 and "nats" in found.protocol["neighbourhood_kl"]


def test_a_token_that_was_ruled_out_adds_nothing(model):
    logs = torch.full((1, model.vocab_size), -torch.inf)
    logs[0, 3] = 0.0
    found = divergences(model, Distributions("x", {"Rome": 0}, logs), ["Rome"])
    assert found["Rome"] == pytest.approx(-plain(model, "Rome")[3].item(), rel=1e-4)


def test_without_a_reference_there_is_no_kl(model):
    assert "neighbourhood_kl" not in evaluate(model, FACTS, generate=False).metrics


def test_what_does_not_fit_is_refused(model, monkeypatch):
    reference = distributions(model, FACTS[:1])
    with pytest.raises(BadFact, match="lacks 2 of 4 neighbourhood prompts"):
        evaluate(model, FACTS, generate=False, reference=reference)
    with pytest.raises(BadFact, match="another vocabulary"):
        evaluate(tiny_model("llama", vocab_size=400), FACTS[:1], generate=False, reference=reference)
    with pytest.raises(BadFact, match="no fact has a neighbourhood prompt"):
        distributions(model, [Fact("{} is", "Rome", target="red")])
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(memory.NotEnoughMemory, match=r"4 distributions over 384 tokens needs .*--limit"):
        distributions(model, FACTS)


def test_progress_counts_prompts(model):
    heard = []
    distributions(model, FACTS, 3, lambda done, total: heard.append((done, total)))
    assert heard == [(3, 4), (4, 4)]
