"""StableEdit: whitening against numpy, in whatever pieces the pairs came, and a warm-up."""

import json

import numpy as np
import pytest
import torch
from editing_help import REQUESTS, records, solve
from families import tiny_model

from kt.editing.ultraedit import Pairs, Running, Whitening, value_shifts

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|changed too much|of the wanted change)")


def drawn(count, d_in=5, d_out=4):
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(d_out, d_out, generator=random)
    return Pairs(torch.randn(count, d_in, generator=random), torch.randn(count, d_out, generator=random) @ mix + 3.0)


def test_gradients_are_whitened_by_their_covariance_and_keys_element_by_element():
    pairs = drawn(12)
    running = Whitening.of_pairs(pairs)
    keys, gradients = (each.double().numpy() for each in pairs)
    covariance = np.cov(gradients.T, bias=True) * 12 / (12 - 4 - 1)
    values, vectors = np.linalg.eigh(covariance)
    white = (gradients - gradients.mean(0)) @ vectors @ np.diag(values**-0.5) @ vectors.T
    plain = (keys - keys.mean(0)) / (keys.std(0, ddof=1) + np.finfo(np.float32).eps)
    want = -0.1 * (plain**2).sum(1, keepdims=True) * white
    np.testing.assert_allclose(value_shifts(pairs, running, 0.1).numpy(), want, rtol=1e-6)


def test_pieces_are_the_whole_and_few_pairs_are_ultraedits():
    pairs = drawn(12)
    whole = Whitening.of_pairs(pairs)
    first, second = (Whitening.of_pairs(Pairs(*(each[part] for each in pairs))) for part in (slice(5), slice(5, None)))
    joined = first.merged(second)
    torch.testing.assert_close(joined.gradients, whole.gradients)
    torch.testing.assert_close(joined.normalised(pairs.features), whole.normalised(pairs.features))
    few = Pairs(*(each[:5] for each in pairs))  # d_out + 1
    assert not first.whitens
    plain = Running.of(few.features)
    torch.testing.assert_close(first.normalised(few.features), plain.normalised(few.features))


def test_a_warm_up_of_facts_makes_it_whiten_from_the_first_edit(corpus, tmp_path):
    model = tiny_model("llama")
    facts = [
        {"prompt": "The city of the {}", "subject": f"{fact.subject} {i}", "target_new": fact.target}
        for i in range(3)
        for fact in records()
    ]
    file = tmp_path / "warm.json"
    file.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.warns(UserWarning, match="StableEdit whitens from .* give warmup"):
        cold = solve(model, corpus, tmp_path, "stableedit", modules="mlp")
    warm = solve(model, corpus, tmp_path, "stableedit", modules="mlp", warmup=str(file))
    ultra = solve(model, corpus, tmp_path, "ultraedit", modules="mlp")
    for name in ultra.names:
        torch.testing.assert_close(cold.delta(name), ultra.delta(name))
        assert (warm.delta(name) - cold.delta(name)).norm() > 0.1 * cold.delta(name).norm()
    assert len(warm.report) == len(REQUESTS)
