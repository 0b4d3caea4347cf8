"""λ that follows the keys: the wanted share comes through, of one key to rounding, of a batch at the least."""

import math
from dataclasses import replace

import pytest
import torch
from editing_help import REQUESTS, fast, solve, statistics

import kt
from kt.cli import parse
from kt.editing.closed_form.aims import SPREADS, TargetSite
from kt.editing.closed_form.auto_ridge import (
    LEAST,
    WANTED,
    Spectrum,
    auto_ridge,
    layer_share,
    single_key_ridge,
)
from kt.editing.closed_form.factor import Moment
from kt.editing.closed_form.plan import Write
from kt.editing.closed_form.solvers import Equality, LeastSquares, NullSpace, System
from kt.editing.config import check_value
from kt.editing.methods import METHODS
from kt.editing.resolve import configure
from kt.editing.ultraedit import ridge_fit
from kt.errors import KtError
from kt.model.sites import Kind, Site
from kt.runs.journal import Journal

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|of the wanted change|no layers given)")

D, FACTS, PAST, SHARE = 24, 6, 5, 0.8
AUTO = {"mom2_update_weight": "auto", "L2": "auto", "emmet_lambda": "auto"}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HALF = torch.linspace(0.05, 3, D, dtype=torch.float64)[:, None] * drawn(D, 200, seed=1)
C = HALF @ HALF.T / 200
KEYS, RESIDUALS, EARLIER = drawn(D, FACTS, seed=2), drawn(7, FACTS, seed=3), drawn(D, PAST, seed=4)
EYE = torch.eye(D, dtype=torch.float64)
close = torch.testing.assert_close


def system(keys=KEYS, past=None, share=SHARE):
    return System(RESIDUALS[:, : keys.shape[1]], keys, keys, Moment.of(C), past, share)


def own_shares(solution, keys):
    """S_ii from the update itself: the coefficient of R's column i in ΔW k_i."""
    return (solution.update.right @ keys).diagonal()


SOLVERS = [LeastSquares("auto"), NullSpace(1.5, "auto"), Equality("auto", 0.1)]
WITH_PAST = [*SOLVERS, Equality(2.0, "auto"), Equality("auto", "auto")]


@pytest.mark.parametrize("solver", SOLVERS[:2], ids=str)
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_of_one_key_exactly_the_wanted_share_comes_through(solver, share):
    for index in range(FACTS):
        one = KEYS[:, index : index + 1]
        solution = solver(system(one, share=share))
        assert abs(float(own_shares(solution, one)) - share) < 1e-10
        assert abs(solution.chosen.share - share) < 1e-10
        change = solution.update.dense() @ one
        assert float((change - share * RESIDUALS[:, :1]).norm() / RESIDUALS[:, :1].norm()) < 1e-10
        assert solution.chosen.ridge == pytest.approx(solution.chosen.x * (1 - share) / share, rel=1e-12)
    if isinstance(solver, LeastSquares):
        assert solution.chosen.x == pytest.approx(float(one.T @ torch.linalg.inv(C) @ one), rel=1e-10)


@pytest.mark.parametrize("past", [None, EARLIER], ids=["no past", "past"])
@pytest.mark.parametrize("solver", WITH_PAST, ids=str)
def test_of_a_batch_at_least_the_wanted_share_of_the_median_fact_comes_through_and_of_no_larger_ridge(solver, past):
    solution = solver(system(past=past))
    share = float(own_shares(solution, KEYS).median())
    assert share >= SHARE - 1e-10
    assert share == pytest.approx(solution.chosen.share, abs=1e-10)
    larger = {
        LeastSquares: lambda ridge: LeastSquares(ridge),
        NullSpace: lambda ridge: NullSpace(1.5, ridge),
        Equality: lambda ridge: Equality(ridge, 0.1) if solver.weight == "auto" else Equality(2.0, ridge),
    }[type(solver)]
    if solver == Equality("auto", "auto"):
        larger = lambda ridge: Equality(1.0, ridge)  # noqa: E731
    same = larger(solution.chosen.ridge)(system(past=past))
    close(same.update.dense(), solution.update.dense(), rtol=1e-10, atol=1e-12)
    assert float(own_shares(larger(1.001 * solution.chosen.ridge)(system(past=past)), KEYS).median()) < SHARE


def test_the_share_that_comes_through_is_the_formula_s():
    gram = KEYS.T @ torch.linalg.inv(C) @ KEYS
    spectrum = Spectrum.of_gram(gram)
    close(spectrum.x, gram.diagonal())
    for ridge in (1e-3, 1.0, 300.0):
        close(spectrum.shares(ridge), (gram @ torch.linalg.inv(ridge * torch.eye(FACTS).double() + gram)).diagonal())
    assert float(spectrum.shares(math.inf).max()) == 0


@pytest.mark.parametrize("count", [3, None])
@pytest.mark.parametrize("n", [5, D, 60])
def test_more_keys_than_inputs_have_the_same_spectrum_by_the_smaller_matrix(n, count):
    keys = drawn(D, n, seed=5)
    found, whole = Spectrum.of_keys(keys, count), Spectrum.of_gram(keys.T @ keys, count)
    close(found.x, whole.x)
    for ridge in (1e-2, 3.0):
        close(found.shares(ridge), whole.shares(ridge), rtol=1e-9, atol=1e-10)


def test_one_pair_of_equal_keys_does_not_take_the_ridge_from_the_others():
    apart = LeastSquares("auto")(system())
    twice = LeastSquares("auto")(system(torch.cat([KEYS[:, :1], KEYS], 1)[:, :FACTS]))
    assert 0.3 < twice.chosen.ridge / apart.chosen.ridge < 3
    assert float(own_shares(twice, torch.cat([KEYS[:, :1], KEYS], 1)[:, :FACTS])[:2].max()) < 0.5


@pytest.mark.parametrize("solver", [LeastSquares("auto"), Equality(1.0, "auto"), NullSpace(1.5, "auto")], ids=str)
def test_keys_that_are_all_but_equal_stop_at_the_least_ridge_and_the_update_stays_small(solver):
    near = KEYS[:, :1] + 1e-6 * drawn(D, 3, seed=6)
    solution = solver(system(near))
    alone = single_key_ridge(solution.chosen.x, SHARE)
    assert solution.chosen.ridge == pytest.approx(LEAST * alone)
    assert solution.chosen.share < SHARE
    one = solver(system(near[:, :1])).update.dense().norm()
    assert float(solution.update.dense().norm()) < 10 * float(one)
    assert float(Equality(1.0, 0.0)(system(near)).update.dense().norm()) > 1e4 * float(one)


def test_keys_that_are_zero_take_the_ridge_that_follows_d_key():
    solution = LeastSquares("auto")(system(KEYS * 0))
    assert solution.chosen.ridge == pytest.approx(D * (1 - SHARE) / SHARE)
    assert Equality("auto", 0.0)(system()).chosen.ridge == pytest.approx(D * (1 - SHARE) / SHARE)


def test_the_mean_of_x_over_the_text_of_c_is_d_key():
    x = Spectrum.of_keys(torch.linalg.solve_triangular(torch.linalg.cholesky(C), HALF, upper=False)).x
    assert float(x.mean()) == pytest.approx(D, rel=1e-9)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_of_a_path_the_wanted_share_arrives(spread, layers):
    rule = SPREADS[spread]
    share = layer_share([rule(index, layers) for index in range(layers)])
    missing = 1.0
    for index in range(layers):
        missing -= missing * rule(index, layers) * share
    assert 1 - missing == pytest.approx(WANTED, abs=1e-12)
    assert layers > 1 or share == pytest.approx(WANTED, abs=1e-12)


def test_a_module_s_own_output_gets_one_layer_s_write_only():
    stream = Write(Kind.MLP, (1, 2, 3), TargetSite(Site(Kind.RESID, 3)))
    assert replace(stream, aim=TargetSite(Site(Kind.MLP, 3))).layer_share == WANTED
    assert stream.layer_share < 0.85


def test_the_papers_number_follows_at_the_papers_size():
    """MEMIT's 15000 at d_key 18,944, of keys with twice the mean x."""
    share = layer_share([1 / 5, 1 / 4, 1 / 3, 1 / 2, 1])
    assert single_key_ridge(2 * 18_944, share) == pytest.approx(15_000, rel=0.05)


def test_the_ridge_of_ultraedit_follows_its_keys():
    keys, shifts = drawn(4, D, seed=7), drawn(4, 7, seed=8)
    chosen = auto_ridge(Spectrum.of_keys(keys.T), WANTED, 1.0)
    fit = ridge_fit(keys, shifts, chosen.ridge, "")
    assert float((fit.update.right @ keys.T).diagonal().median()) >= WANTED - 1e-10
    assert chosen.x == pytest.approx(float(keys.square().sum(1).median()))


# The settings.


@pytest.mark.parametrize("method", ["intattn", "memit", "pmet", "alphaedit", "emmet", "jeep", "ultraedit"])
def test_auto_is_the_default_where_no_preset_speaks_and_is_kept_in_the_file(method, setting, tmp_path):
    model, corpus, cache = setting
    quick = {name: value for name, value in fast(method).items() if name not in AUTO}
    found = configure(model, method).as_dict()
    name = {"alphaedit": "L2", "ultraedit": "L2", "emmet": "emmet_lambda"}.get(method, "mom2_update_weight")
    assert found[name] == "auto"
    shared = {"statistics": statistics(model, corpus, cache)} | (
        {"alpha": 0.4, "layers_attn": (0, 1)} if method == "intattn" else {}
    )
    edit = kt.edit(model, REQUESTS, method=method, **(quick | shared))
    chosen = edit.manifest["chosen"]
    assert set(chosen) == set(edit.names)
    assert all(row["lambda"] > 0 and row["x"] > 0 and 0 < row["share"] <= 1 for row in chosen.values())
    again = kt.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert again.manifest["chosen"] == chosen
    for weight, row in edit.deltas().items():
        assert (row["lambda"], row["x"]) == (chosen[weight]["lambda"], chosen[weight]["x"])
    columns = next(table for table in edit.tables() if table.title == "written weights").columns
    assert [getattr(column, "name", column) for column in columns][-2:] == ["λ", "x"]


def test_a_number_is_used_as_it_is_and_nothing_is_chosen(setting):
    edit = solve(*setting, method="memit")
    assert "chosen" not in edit.manifest
    assert {(row["lambda"], row["x"]) for row in edit.deltas().values()} == {(None, None)}
    auto = solve(*setting, method="memit", mom2_update_weight="auto", layers_mlp=(1,))
    ((name, chosen),) = auto.manifest["chosen"].items()
    same = solve(*setting, method="memit", mom2_update_weight=chosen["lambda"], layers_mlp=(1,))
    assert torch.equal(auto.delta(name), same.delta(name))


def test_more_of_the_wanted_change_comes_through_than_with_the_papers_number(setting):
    through = {}
    for weight in ("auto", 15000.0):
        changes = solve(*setting, method="memit", mom2_update_weight=weight).manifest["value_change"]
        (through[weight],) = [change["came_through"]["mean"] for change in changes.values()]
    assert through["auto"] > 0.8 > 10 * through[15000.0]


def test_presets_keep_the_papers_numbers():
    demo = kt.load("demo")
    for method in METHODS:
        for preset in (None, "gpt-j-6b", "llama-7b", "llama-2-7b", "llama-3-8b", "mistral-7b", "qwen2.5-7b", "gpt2-xl"):
            own = METHODS[method].settings()
            values = configure(demo, method, preset=preset).as_dict()
            follows = ["L2"] if (method, preset) == ("betaedit", None) else []  # the demo's ridge follows its leak
            assert [name for name in AUTO if name in own and values[name] == "auto"] == follows, (method, preset)


def test_the_settings_take_auto_or_a_number(tmp_path):
    assert parse.settings("mom2_update_weight=auto,L2=2") == {"mom2_update_weight": "auto", "L2": 2}
    demo = kt.load("demo")
    assert configure(demo, "jeep", mom2_update_weight_high="auto").as_dict()["mom2_update_weight_high"] == "auto"
    (tmp_path / "mine.toml").write_text('inherits = "demo"\n[hyper_parameters]\nmom2_update_weight = "auto"\n')
    assert configure(demo, "memit", preset=str(tmp_path / "mine.toml")).as_dict()["mom2_update_weight"] == "auto"
    with pytest.raises(KtError, match="is no float, nor auto"):
        configure(demo, "memit", mom2_update_weight="automatic")
    with pytest.raises(KtError, match="is no float; see"):
        check_value("v_lr", "float", "auto")


def test_a_run_begun_under_a_fixed_default_does_not_go_on_under_another(setting, tmp_path):
    journal = Journal.begin(tmp_path / "run", {}, False)
    solve(*setting, method="memit", mom2_update_weight=15000.0, journal=journal)
    with pytest.raises(KtError, match="begun when λ and the ridges had fixed defaults"):
        solve(*setting, method="memit", mom2_update_weight="auto", journal=journal)
    journal.release()


def test_a_run_goes_on_with_the_ridge_that_it_chose(setting, tmp_path):
    journal = Journal.begin(tmp_path / "run", {}, False)
    first = solve(*setting, method="memit", mom2_update_weight="auto", journal=journal)
    second = solve(*setting, method="memit", mom2_update_weight="auto", journal=journal)
    journal.release()
    assert first.manifest["chosen"] == second.manifest["chosen"] and first.digest == second.digest
