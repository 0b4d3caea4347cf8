"""ENCORE against its formula: λₙI beside λC, and a search that ends at the second step at which the target is said."""

import pytest
import torch
from families import tiny_model
from one_layer import LAYER, close, delta, given, solved

import kt
from kt.editing import closed_form as cf
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.targets import find_targets
from kt.editing.methods.encore import ENCORE
from kt.errors import KtError

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|of the wanted change)")


@pytest.mark.parametrize(("weight", "ridge"), [(0.05, 0.3), (0.05, "auto"), ("auto", 0.3)])
def test_the_update_is_the_papers_formula(setting, weight, ridge):
    edit = solved(setting, "encore", mom2_update_weight=weight, update_norm_lambda=ridge)
    parts = given(setting, edit, "hidden.1")
    if weight == "auto":
        weight = edit.manifest["chosen"][edit.names[0]]["lambda"]
    if ridge == "auto":
        ridge = weight * float(torch.linalg.eigvalsh(parts.moment).mean())
    eye = torch.eye(len(parts.moment), dtype=torch.float64)
    system = weight * parts.moment + ridge * eye + parts.keys @ parts.keys.T
    want = parts.residuals @ parts.keys.T @ torch.linalg.inv(system)
    close(delta(setting, edit), want, atol=1e-5, rtol=1e-3)
    if "lambda" in (chosen := edit.manifest.get("chosen", {}).get(edit.names[0], {})):
        through = (parts.keys.T @ torch.linalg.inv(system) @ parts.keys).diagonal()
        assert chosen["share"] == pytest.approx(float(through.median()), rel=1e-4)


def test_the_search_ends_at_the_nth_step_at_which_the_target_is_the_likeliest():
    model, aim = tiny_model("llama"), cf.TargetSite(kt.Site("hidden", LAYER))
    facts = [kt.Fact("The mother tongue of {}", "Danielle Darrieux", target="w")]  # which it says unedited

    def steps(count):
        config = ENCORE(layers_mlp=(LAYER,), v_lr=0.3, stop_after=count)
        return find_targets(model, facts, [aim], Contexts(), config.objective).steps.tolist()

    assert [steps(1), steps(2), steps(4)] == [[0], [1], [3]]


def test_a_ridge_without_c_is_one_line(setting):
    with pytest.raises(KtError, match="mom2_update_weight 0 leaves the second moment out"):
        solved(setting, "encore", mom2_update_weight=0.0, update_norm_lambda=1.0)
