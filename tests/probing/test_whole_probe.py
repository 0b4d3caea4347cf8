"""The probe's whole answers: summed log-probabilities and worst ranks along them."""

import numpy as np
import pytest
import torch
from families import tiny_model

import kt
from kt.errors import BadFact
from kt.model.tokens import target_ids, token_ids

ASKED = [
    kt.Fact("The {} is", "France", answer="Paris", target="Tomas"),
    kt.Fact("The {} is", "Warsaw", answer="Seattle", target="Paris"),
]


@pytest.mark.filterwarnings("ignore:.*may be joined")
@pytest.mark.parametrize("family", ("gpt2", "qwen2"))
def test_the_last_layer_reads_what_the_model_says_of_the_whole_answer(family, tmp_path):
    model = tiny_model(family)
    probe, first = kt.contrast_probe(model, ASKED, whole=True), kt.contrast_probe(model, ASKED)
    assert np.array_equal(probe.reading.prob, first.reading.prob)
    lengths = []
    for i, fact in enumerate(ASKED):
        for a, text in enumerate((fact.answer, fact.target)):
            before, ids = token_ids(model.tokenizer, fact.prompt), target_ids(model.tokenizer, fact.prompt, text)
            lengths.append(len(ids))
            with torch.no_grad():
                logits = model.module(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1]
            log_probs = logits.log_softmax(-1)[torch.arange(len(ids)), list(ids)]
            own = logits[torch.arange(len(ids)), list(ids)]
            ranks = (logits > own[:, None]).sum(1)
            assert probe.reading.whole_log_prob[i, 0, -1, a] == pytest.approx(float(log_probs.sum()), abs=1e-4)
            assert probe.reading.whole_rank[i, 0, -1, a] == int(ranks.max())
    assert lengths == [1, 2, 3, 1]
    one = np.log(first.reading.prob[0, 1, :, :, 0])
    assert np.allclose(probe.reading.whole_log_prob[0, :, :, 0], one), "an answer of one token"
    again = kt.Probe.load(probe.save(tmp_path / "probe.safetensors"))
    assert np.array_equal(again.reading.whole_rank, probe.reading.whole_rank)
    assert "all tokens" in again.tables()[1].title and set(again.as_dict()["whole"]) == {"original", "target"}
    with pytest.raises(BadFact, match="probe again with whole=True"):
        first.whole_curve()
    with pytest.raises(BadFact, match="do not merge"):
        probe.merge(kt.contrast_probe(model, ASKED[:1]))
