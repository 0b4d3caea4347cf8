"""BetaEdit against its formula, the projector taken again, and an update that is too large."""

import pytest
import torch
from editing_help import REQUESTS
from one_layer import close, delta, given, solved
from several_layers import QUIET

from kt.editing.closed_form.factor import Moment
from kt.editing.closed_form.sequential import Leaky
from kt.editing.closed_form.solvers import System
from kt.errors import WorkFailed

pytestmark = QUIET
ANY = {"nullspace_threshold": 0.02, "stop_norm": 1e9}


def formula(residuals, keys, past, moment, projector, leak, l2):
    """The code's: its right-hand side is P K Rᵀ, its system P(KKᵀ + H + λ₁C) + λ₂I."""
    system = projector @ (keys @ keys.T + past + leak * moment) + l2 * torch.eye(len(moment), dtype=torch.float64)
    return torch.linalg.solve(system, projector @ keys @ residuals.T).T


def projector(matrix, threshold=0.02):
    values, vectors = torch.linalg.eigh(matrix)
    assert 0 < int((values < threshold).sum()) < len(values), "the threshold cuts nothing"
    return vectors[:, values < threshold] @ vectors[:, values < threshold].T


@pytest.mark.parametrize(("leak", "l2"), [(3.0, 0.1), (3.0, "auto"), ("auto", "auto")])
def test_the_update_is_the_papers_formula(setting, leak, l2):
    edit = solved(setting, "betaedit", leak=leak, L2=l2, **ANY)
    parts = given(setting, edit, "hidden.1")
    onto = projector(parts.moment)
    if leak == "auto":
        leak = edit.manifest["chosen"][edit.names[0]]["lambda"]
    if l2 == "auto":
        l2 = leak * float((onto @ parts.moment).trace() / onto.trace())
    want = formula(parts.residuals, parts.keys, torch.zeros_like(parts.moment), parts.moment, onto, leak, l2)
    close(delta(setting, edit), want, atol=1e-5, rtol=1e-3)


def test_p_is_taken_again_after_so_many_keys():
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random).double()  # noqa: E731
    text = draw(8, 40) * torch.linspace(0.01, 1, 8, dtype=torch.float64)[:, None]
    moment, keys, past, residuals = text @ text.T / 40, draw(8, 2), draw(8, 5), draw(3, 2)
    for refresh, count in ((6, 0), (5, 5), (2, 4)):
        mixed = moment if not count else (past[:, :count] @ past[:, :count].T / count + 30 * moment) / 31
        threshold = float(torch.linalg.eigvalsh(mixed)[3:5].mean())
        want = formula(residuals, keys, past @ past.T, moment, projector(mixed, threshold), 30.0, 0.2)
        solver = Leaky(threshold, 0.2, leak=30.0, refresh=refresh)
        got = solver(System(residuals, keys, moment=Moment.of(moment), past=past)).update.dense()
        close(got, want)


def test_an_update_that_would_damage_the_model_is_one_line(setting):
    solved(setting, "betaedit", leak=3.0, **ANY)
    with pytest.raises(WorkFailed, match=r"above stop_norm 0\.001: the model would be damaged") as caught:
        solved(setting, "betaedit", leak=3.0, **ANY | {"stop_norm": 1e-3}, requests=REQUESTS[:1])
    assert "\n" not in str(caught.value)
