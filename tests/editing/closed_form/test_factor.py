"""Factors and eigenvectors of large second moments on disk: computed once, never believed when damaged."""

import warnings

import pytest
import torch
from absurd_files import absurd
from safetensors.torch import load_file, save_file

from kt.editing.closed_form import factor as kept
from kt.editing.closed_form import factor as moments
from kt.editing.closed_form.factor import Moment, Store
from kt.editing.closed_form.solvers import LeastSquares, NullSpace, System

D = 12
DRAWN = torch.randn(D, 40, generator=torch.Generator().manual_seed(1))
C = (DRAWN @ DRAWN.T / 40).float()
THRESHOLD = float(torch.linalg.eigvalsh(C.double()).median())


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(moments, "LEAST_SIZE", D)
    return Store(tmp_path / "cache")


@pytest.fixture
def dear(monkeypatch):
    """Every factorisation and eigendecomposition that is made."""
    calls = []
    for name in ("cholesky_ex", "eigh"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *a, name=name, real=real: (calls.append((name, len(a[0]))), real(*a))[1]
        )
    return lambda: [name for name, size in calls if size == D]


def moment(store, matrix=C):
    return Moment("w", D, lambda: matrix, store)


def system(given):
    draw = torch.Generator().manual_seed(2)
    return System(torch.randn(5, 3, generator=draw).double(), torch.randn(D, 3, generator=draw).double(), None, given)


@pytest.mark.parametrize(("solver", "call"), [(LeastSquares(2.0), "cholesky_ex"), (NullSpace(THRESHOLD, 0.5), "eigh")])
def test_another_process_solves_the_same_update_without_a_factorisation(store, dear, solver, call):
    alone = solver(system(Moment.of(C))).update.dense()
    first = solver(system(moment(store))).update.dense()
    assert dear() == [call, call] and len(list(store.folder.glob("*.safetensors"))) == 1
    again = solver(system(moment(store))).update.dense()
    assert dear() == [call, call]
    assert torch.equal(first, alone)
    torch.testing.assert_close(again, alone, atol=1e-12, rtol=1e-10)


def test_a_kept_decomposition_serves_every_threshold(store, dear):
    moment(store).null_basis(THRESHOLD)
    wide = moment(store).null_basis(2 * THRESHOLD)
    assert dear() == ["eigh"]
    projector = Moment.of(C).null_basis(2 * THRESHOLD)
    torch.testing.assert_close(wide @ wide.T, projector @ projector.T, atol=1e-10, rtol=0)


def test_a_singular_moments_ridge_is_kept_with_its_factor(store):
    flat = torch.diag(torch.tensor([1.0] * 6 + [0.0] * 6))
    ridges = [moment(store, flat).factor().ridge for _ in range(2)]
    assert ridges[0] == ridges[1] > 0
    assert len(list(store.folder.iterdir())) == 1


@pytest.mark.parametrize("what", ["factor", "eigen"])
@pytest.mark.parametrize("how", ["cut", "one number", "not a number"])
def test_a_damaged_file_is_said_and_made_again(store, what, how):
    def result():
        made = moment(store)
        return made.factor().factor if what == "factor" else made.null_basis(THRESHOLD)

    good = result()
    (path,) = store.folder.iterdir()
    arrays = load_file(path)
    name = "transposed" if what == "factor" else "rows"
    arrays[name][0, 0] += float("nan") if how == "not a number" else 1e-3
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        save_file(arrays, path, metadata={"kt": '{"ridge": 0.0}'})
    with pytest.warns(UserWarning, match="damaged"):
        again = result()
    torch.testing.assert_close(again, good, atol=1e-12, rtol=1e-10)
    assert result().shape == good.shape  # and no warning any more


@pytest.mark.parametrize("what", ["factor", "eigen"])
def test_a_kept_file_of_the_absurd_counts_as_absent(store, what):
    def result():
        made = moment(store)
        return made.factor().factor if what == "factor" else made.null_basis("auto")

    good = result()
    (path,) = store.folder.iterdir()
    for name, content in absurd(path.read_bytes()).items():
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(result(), good, atol=1e-12, rtol=1e-10, msg=name)
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="damaged"):
        torch.testing.assert_close(result(), good, atol=1e-12, rtol=1e-10)


def test_another_matrix_has_another_file(store):
    moment(store).factor()
    factor = moment(store, 2 * C).factor().factor
    torch.testing.assert_close(factor @ factor.T, 2 * C.double())
    assert len(list(store.folder.iterdir())) == 2


def test_a_full_disk_is_a_warning_and_no_file(store, monkeypatch):
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 4 * 8 * D * D - 1}))
    with pytest.warns(UserWarning, match="nearly full"):
        moment(store).factor()
    assert not list(store.folder.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(moments, "LEAST_SIZE", D)
    store.folder.rmdir()
    store.folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="is not kept"):
        assert moment(store).factor().ridge == 0


def test_small_moments_are_not_kept(tmp_path):
    Moment("w", D, lambda: C, Store(tmp_path / "cache")).factor()
    assert not (tmp_path / "cache").exists()
