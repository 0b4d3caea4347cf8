"""Every closed form against the formula of its paper, written out with inverses in float64."""

import pytest
import torch

from kt.editing.closed_form.factor import Moment, cholesky
from kt.editing.closed_form.solvers import Equality, LeastSquares, NullSpace, RankOne, RegularisedGram, System
from kt.errors import BadFile, KtError, WorkFailed


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


D, FACTS, PAST = 12, 3, 4
KEYS, RESIDUALS, EARLIER = drawn(D, FACTS), drawn(5, FACTS, seed=1), drawn(D, PAST, seed=2)
HALF = drawn(D, 40, seed=3)
C = HALF @ HALF.T / 40
EYE = torch.eye(D, dtype=torch.float64)
close = torch.testing.assert_close


def system(**changes):
    return System(RESIDUALS, KEYS, KEYS + 0.1, Moment.of(C), None)._replace(**changes)


@pytest.mark.parametrize("past", [None, EARLIER, drawn(D, 30, seed=4)], ids=["none", "few", "more than d_key"])
def test_least_squares(past):
    got = LeastSquares(2.5)(system(past=past))
    held = 2.5 * C + (0 if past is None else past @ past.T)
    whole = held + KEYS @ KEYS.T
    close(got.update.dense(), RESIDUALS @ KEYS.T @ torch.linalg.inv(whole))
    exact = float(torch.linalg.cond(whole, 1))
    assert got.ridge == 0 and exact / 3 < got.condition <= exact * 1.001


@pytest.mark.parametrize("past", [None, EARLIER], ids=["none", "few"])
def test_equality_takes_every_value_exactly_and_moves_held_directions_least(past):
    got = Equality(2.0)(system(past=past)).update.dense()
    close(got @ KEYS, RESIDUALS)
    held = 2.0 * C + (0 if past is None else past @ past.T)
    inverse = torch.linalg.inv(held)
    close(got, RESIDUALS @ torch.linalg.inv(KEYS.T @ inverse @ KEYS) @ KEYS.T @ inverse)
    other = got + drawn(5, D, seed=5) @ (EYE - KEYS @ torch.linalg.pinv(KEYS))  # takes the values as well
    close(other @ KEYS, RESIDUALS)
    assert torch.trace(got @ held @ got.T) < torch.trace(other @ held @ other.T)


def test_equality_with_a_ridge_is_least_squares_with_that_much_of_c():
    relaxed, held = Equality(2.0, ridge=0.3)(system(past=EARLIER)), LeastSquares(0.6)(system(past=EARLIER * 0.3**0.5))
    close(relaxed.update.dense(), held.update.dense())
    one = system(keys=KEYS[:, :1], residuals=RESIDUALS[:, :1])
    close(Equality(2.0, ridge=0.3)(one).update.dense() @ KEYS[:, :1], RESIDUALS[:, :1])


def test_equality_with_a_ridge_bears_two_equal_keys():
    twice = system(keys=KEYS[:, [0, 0, 1]])
    got = Equality(1.0, ridge=0.1)(twice).update.dense()
    assert torch.isfinite(got).all() and float(got.norm()) < 100


@pytest.mark.parametrize("past", [None, EARLIER, drawn(D, 30, seed=4)], ids=["none", "few", "more than the null space"])
def test_null_space_is_alphaedits_formula(past):
    threshold, l2 = float(torch.linalg.eigvalsh(C).median()), 0.3
    values, vectors = torch.linalg.eigh(C)
    basis = vectors[:, values < threshold]
    projector = basis @ basis.T
    gram = KEYS @ KEYS.T + (0 if past is None else past @ past.T)
    want = RESIDUALS @ KEYS.T @ projector @ torch.linalg.inv(gram @ projector + l2 * EYE)
    got = NullSpace(threshold, l2)(system(past=past))
    close(got.update.dense(), want)
    inside = projector @ gram @ projector + l2 * EYE
    assert got.condition == pytest.approx(float(torch.linalg.cond(inside, 2)), rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_an_automatic_null_space_does_not_depend_on_the_scale_of_the_keys(scale):
    """Three quarters of C's directions, where the published threshold takes none or all of them."""
    values, vectors = torch.linalg.eigh(C)
    basis = vectors[:, :9]  # of D = 12
    got = NullSpace(l2=0.3 * scale**2)(system(keys=scale * KEYS, moment=Moment.of(scale**2 * C))).update.dense()
    published = NullSpace(float(values[8:10].mean()), 0.3)(system()).update.dense()
    close(scale * got, published)
    close(got @ basis @ basis.T, got)


def test_null_space_refuses_what_has_no_solution():
    with pytest.raises(WorkFailed, match="below nullspace_threshold"):
        NullSpace(1e-9)(system())
    with pytest.raises(KtError, match="L2"):
        NullSpace(l2=0.0)


def test_rank_one_is_romes_formula():
    one = system(residuals=RESIDUALS[:, :1], keys=KEYS[:, :1], bare=KEYS[:, 1:2])
    got = RankOne()(one).update.dense()
    direction = torch.linalg.inv(C) @ KEYS[:, :1]
    close(got, RESIDUALS[:, :1] @ direction.T / (direction.T @ KEYS[:, 1:2]))
    close(got @ KEYS[:, 1:2], RESIDUALS[:, :1])  # the bare prompt's key takes the wanted value
    close(RankOne(same_key=True)(one).update.dense() @ KEYS[:, :1], RESIDUALS[:, :1])
    plain = RankOne(mom2_adjustment=False)(one).update.dense()
    close(plain, RESIDUALS[:, :1] @ KEYS[:, :1].T / (KEYS[:, :1].T @ KEYS[:, 1:2]))


@pytest.mark.parametrize("same_key", [False, True])
@pytest.mark.parametrize("moment", [True, False])
@pytest.mark.parametrize("past", [None, EARLIER], ids=["none", "few"])
def test_keys_that_are_unlike_both_take_the_wanted_value_at_the_least_cost(same_key, moment, past):
    """Of all updates that give both keys the value; alike ones are ROME's, which gives it to one."""
    held = C if moment else torch.eye(len(C), dtype=C.dtype)
    if past is not None and moment:
        held = len(C) * 0.1 / 0.9 * C + past @ past.T
    metric = torch.linalg.cholesky(torch.linalg.inv(held)).T
    mean, bare = KEYS[:, :1], KEYS[:, 1:2]
    cosine = float(torch.cosine_similarity(metric @ mean, metric @ bare, dim=0))
    one = system(residuals=RESIDUALS[:, :1], keys=mean, bare=bare, past=past)
    options = dict(mom2_adjustment=moment, same_key=same_key, held_share=0.9)
    assert -1 < cosine < 0.9
    got = RankOne(**options, key_cosine=0.95)(one).update.dense()
    both = torch.cat([mean, bare], 1)
    close(got @ both, RESIDUALS[:, :1].expand(-1, 2))
    spread = torch.linalg.solve(held, both)
    close(got, RESIDUALS[:, :1] @ torch.linalg.solve(both.T @ spread, spread.T).sum(0, keepdim=True))
    alike = RankOne(**options, key_cosine=max(cosine, 0.0) / 2)(one).update.dense()
    close(alike, RankOne(**options)(one).update.dense())
    assert (got - alike).norm() > 1e-3 * got.norm()


def test_keys_that_are_nearly_opposite_are_left_to_romes_formula():
    """An update that meets both would be larger, without bound."""
    for bare in (-2 * KEYS[:, :1], -KEYS[:, :1] + 1e-9 * KEYS[:, 1:2], -KEYS[:, :1] + 0.1 * KEYS[:, 1:2]):
        one = system(residuals=RESIDUALS[:, :1], keys=KEYS[:, :1], bare=bare)
        got = RankOne(key_cosine=0.5)(one)
        assert got.also_met is None
        close(got.update.dense(), RankOne()(one).update.dense())


def test_of_several_facts_those_with_unlike_keys_say_which_keys_they_met_too():
    bare = KEYS.clone()
    bare[:, 1] = drawn(D, seed=9)
    several = system(bare=bare)
    got = RankOne(key_cosine=0.9)(several)
    assert torch.equal(got.also_met, bare[:, 1:2])
    columns = [
        RankOne(key_cosine=0.9)(system(residuals=RESIDUALS[:, i, None], keys=KEYS[:, i, None], bare=bare[:, i, None]))
        for i in range(3)
    ]
    close(got.update.dense(), sum(column.update.dense() for column in columns))


def test_woodbury_and_the_whole_system_agree_also_for_other_vectors():
    others = drawn(D, 2, seed=6)
    few, many = RegularisedGram(Moment.of(C), 0.7, EARLIER), RegularisedGram(Moment.of(C), 0.7, drawn(D, 30, seed=4))
    assert few.small and not many.small
    for held in (few, many):
        whole = 0.7 * C + held.extra @ held.extra.T
        close(held.solve(others), torch.linalg.solve(whole, others))
        close(held.times(others), whole @ others)
        close(held.solve_own(2), torch.linalg.solve(whole, held.extra[:, :2]))


def test_a_moments_factor_is_computed_once(monkeypatch):
    calls = []
    monkeypatch.setattr("kt.editing.closed_form.factor.cholesky", lambda *a: (calls.append(1), cholesky(*a))[1])
    moment = Moment.of(C)
    for solver in (LeastSquares(2.0), LeastSquares(9.0), Equality(1.0), RankOne()):
        solver(system(moment=moment))
    assert len(calls) == 1
    assert moment.null_basis(0.5) is moment.null_basis(0.5)


def test_what_is_singular_or_not_finite_fails_in_one_line():
    with pytest.raises(WorkFailed, match="singular"):
        LeastSquares(1.0)(system(moment=Moment.of(C * 0)))
    broken = [(system(moment=Moment.of(C * float("nan"))), BadFile), (system(keys=KEYS * float("nan")), WorkFailed)]
    for parts, error in broken:
        with pytest.raises(error, match="finite") as caught:
            LeastSquares(1.0)(parts)
        assert "\n" not in str(caught.value)


def test_a_singular_moment_gets_the_least_ridge_that_works():
    flat = torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0])).double()
    keys = torch.eye(6)[:, :1].double()
    got = LeastSquares(1.0)(System(torch.ones(3, 1).double(), keys, None, Moment.of(flat)))
    assert 0 < got.ridge <= 1e-6
    close(got.update.dense() @ keys, torch.full((3, 1), 0.5).double(), atol=1e-5, rtol=1e-5)


def test_what_would_not_fit_is_refused_with_its_figure(monkeypatch):
    monkeypatch.setattr("kt.model.memory.free_memory", lambda *a: 2 * 2**30)
    with pytest.raises(KtError, match=r"projector.*18,944.*needs 16.0 GiB") as caught:
        NullSpace().require_room("model.layers.4.mlp.down_proj", [18944])
    assert "\n" not in str(caught.value) and "2.0 GiB" in str(caught.value)
    LeastSquares().require_room("model.layers.4.mlp.down_proj", [4864])
