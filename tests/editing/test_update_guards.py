"""RECT, PRUNE, SPHERE and SimIE against their formulas in float64, with any method, in one edit and in sequence."""

import numpy as np
import pytest
import torch
from editing_help import REQUESTS, fast, statistics

import kt
from kt.editing.update_guards import prune, rect
from kt.errors import KtError
from kt.model.update import Dense, LowRank

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(targets stay below|all but singular|too much|of the wanted|requests)"
)


def solve(setting, method="memit", requests=REQUESTS, **changes):
    model, corpus, cache = setting
    return kt.edit(
        model, requests, method=method, statistics=statistics(model, corpus, cache), **fast(method, **changes)
    )


def restrained(total, original):
    u, values, v = np.linalg.svd(total, full_matrices=False)
    most = np.linalg.svd(original, compute_uv=False)[0]
    return (u * np.where(values > most, np.log(values) - np.log(most) + most, values)) @ v, (values > most).sum()


@pytest.mark.parametrize("method", ["memit", "alphaedit", "ultraedit"])
def test_rect_writes_the_four_tenths_that_are_largest_beside_the_weight(setting, method):
    free, kept = solve(setting, method), solve(setting, method, update_guard="rect")
    assert kept.manifest["update_guard"] == "rect" and "update_guard" not in free.manifest
    for name in free.names:
        whole, weight = free.delta(name).double().numpy(), setting[0].weight(name).double().numpy()
        ratio = np.abs(whole / (weight + 1e-8))
        wanted = np.where(ratio >= np.sort(ratio, axis=None)[int(0.6 * ratio.size) - 1], whole, 0)
        np.testing.assert_allclose(kept.delta(name).numpy(), wanted, atol=1e-6, rtol=1e-5)
        assert np.count_nonzero(kept.delta(name)) == pytest.approx(0.4 * ratio.size, rel=0.01)


def test_prune_restrains_the_sum_of_a_sessions_updates(setting):
    model, corpus, cache = setting
    options = fast("memit", statistics=statistics(model, corpus, cache), layers_mlp=(1,))
    name = model.weight_name(kt.Site("mlp", 1))
    original = model.weight(name).double().numpy().copy()
    with kt.EditSession(model, "memit", update_guard="prune", **options) as session:
        solved, cut = 0.0, 0
        for request in REQUESTS:
            with kt.EditSession(model, "memit", **options) as free:  # what this step solves, before it is restrained
                solved = solved + free.solve([request]).delta(name).double().numpy()
            session.edit([request])
            wanted, above = restrained(solved, original)
            cut += above
            np.testing.assert_allclose(model.weight(name).double().numpy() - original, wanted, atol=1e-4, rtol=1e-3)
        assert cut, "no singular value was large enough to be restrained"
        assert session.total().manifest["update_guard"] == "prune"


def suppressed(update, weight):
    """SPHERE's: half of the update along the eigenvectors that make half of ŴᵀŴ's trace taken away."""
    rows = weight / (np.linalg.norm(weight, axis=1, keepdims=True) + 1e-8)
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    main = vectors[:, ::-1][:, : (np.cumsum(values[::-1]) / values.sum() <= 0.5).sum() + 1]
    return update - 0.5 * update @ main @ main.T


@pytest.mark.parametrize("method", ["memit", "ft"])
def test_sphere_writes_half_of_what_lies_along_the_weights_main_directions(setting, method):
    free, kept = solve(setting, method), solve(setting, method, update_guard="sphere")
    for name in free.names:
        wanted = suppressed(free.delta(name).double().numpy(), setting[0].weight(name).double().numpy())
        np.testing.assert_allclose(kept.delta(name).numpy(), wanted, atol=1e-5, rtol=1e-3)
        assert np.abs(wanted - free.delta(name).numpy()).max() > 1e-3


def test_simie_simulates_an_editor_that_always_starts_from_the_unedited_model(setting):
    model, corpus, cache = setting
    options = fast("memit", statistics=statistics(model, corpus, cache), layers_mlp=(1,))
    site = kt.Site("mlp", 1)
    name = model.weight_name(site)
    original, ideal, keys = model.weight(name).double().clone(), [], []
    for request in REQUESTS:
        with kt.EditSession(model, "memit", **options) as free:
            ideal.append(original + free.solve([request]).delta(name).double())
        text = request["prompt"].format(request["subject"]) + " "
        new = request["target_new"]
        ids = model.tokenizer.encode(text + (new if isinstance(new, str) else new["str"]))
        seen = []
        handle = model.module.get_submodule(name.removesuffix(".weight")).register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(inputs[0][0].detach().double())
        )
        model.module(torch.tensor([ids]))
        handle.remove()
        keys.append(seen[0].T)
    with kt.EditSession(model, "memit", update_guard="simie", **options) as session:
        weight, total = original, 0.0
        for wanted, key, request in zip(ideal, keys, REQUESTS, strict=True):
            session.edit([request])
            ridge = session.state.running[f"simie {name}"][0]
            total = total + key @ key.T
            eye = torch.eye(len(total), dtype=torch.float64)
            weight = weight + (wanted - weight) @ key @ key.T @ torch.linalg.inv(ridge * eye + total)
            torch.testing.assert_close(model.weight(name).double(), weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ["lyaplock", "alphaedit"])
def test_under_simie_a_step_is_solved_as_if_nothing_had_been_edited_and_nothing_held(setting, method, monkeypatch):
    model, corpus, cache = setting
    options = fast(method, statistics=statistics(model, corpus, cache), layers_mlp=(1,))
    name = model.weight_name(kt.Site("mlp", 1))
    with kt.EditSession(model, method, **options) as free:
        wanted = free.solve(REQUESTS[1:]).delta(name)
    with kt.EditSession(model, method, update_guard="simie", **options) as session:
        session.edit(REQUESTS[:1])
        ideal = []
        monkeypatch.setattr(
            "kt.editing.session.simie", lambda context, facts, updates: ideal.append(updates) or updates
        )
        session.edit(REQUESTS[1:])
        assert not session.keeps_history and not session.state.keys
    torch.testing.assert_close(ideal[0][name].dense().to(wanted), wanted, atol=1e-5, rtol=1e-3)


def test_a_low_rank_sum_is_restrained_as_its_product_is():
    random = torch.Generator().manual_seed(0)
    left, right, weight = (torch.randn(*shape, generator=random).double() for shape in ((8, 3), (3, 6), (8, 6)))
    low, dense = prune(LowRank(5 * left, right), weight), prune(Dense(5 * left @ right), weight)
    assert low.rank == 3
    wanted, cut = restrained((5 * left @ right).numpy(), weight.numpy())
    assert cut
    np.testing.assert_allclose(low.dense(), wanted, atol=1e-9)
    np.testing.assert_allclose(dense.dense(), wanted, atol=1e-9)
    gain = Dense(torch.ones(4))
    assert prune(gain, torch.ones(4)) is gain and rect(gain, torch.arange(1.0, 5)).matrix.tolist() == [1, 1, 1, 0]


def test_a_guard_that_there_is_not_is_one_line(setting):
    with pytest.raises(KtError, match=r"update_guard 'prun' is unknown; did you mean prune\?"):
        solve(setting, update_guard="prun")
