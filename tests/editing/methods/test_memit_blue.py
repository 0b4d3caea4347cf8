"""MEMIT-BLUE: the first and the last layer, each to a target of its own; the rules that a spread can be."""

import pytest
from one_layer import close
from several_layers import LAYERS, QUIET, edited, formula, only

import kt
from kt.errors import KtError
from kt.model.sites import Kind, Site

pytestmark = QUIET


def test_blue_searches_at_the_first_and_last_layer_and_the_second_search_sees_the_first_write(ready):
    model = ready[0]
    edit = edited(ready, "memit-blue")
    assert list(edit.targets) == ["hidden.0", "hidden.2"]
    assert list(edit.names) == [model.weight_name(Site(Kind.MLP, layer)) for layer in (0, 2)]
    first, last = (only(edit, layer, model) for layer in (0, 2))
    close(
        first.delta(first.names[0]).double(),
        formula(ready, 0, ("hidden.0", edit.targets["hidden.0"])),
        atol=1e-5,
        rtol=1e-4,
    )
    with first.applied(model):
        close(
            last.delta(last.names[0]).double(),
            formula(ready, 2, ("hidden.2", edit.targets["hidden.2"])),
            atol=1e-5,
            rtol=1e-4,
        )
        again = edited(ready, layers=(2,))  # the second half is MEMIT of that layer, on the model with the first
    close(again.targets["hidden.2"], edit.targets["hidden.2"], atol=1e-4, rtol=1e-4)
    assert (edited(ready, layers=(2,)).targets["hidden.2"] - edit.targets["hidden.2"]).norm() > 1e-2


def test_kts_own_rules_divide_one_residual_searched_at_the_last_layer(ready):
    model = ready[0]
    for spread, shares in (("ends", {0: 0.5, 2: 1.0}), ("rest", dict.fromkeys(LAYERS, 1.0))):
        edit = edited(ready, spread=spread)
        assert list(edit.targets) == ["hidden.2"] and len(edit.names) == len(shares)
        first = only(edit, 0, model)
        close(
            first.delta(first.names[0]).double(),
            formula(ready, 0, ("hidden.2", edit.targets["hidden.2"]), shares[0]),
            atol=1e-5,
            rtol=1e-4,
        )


@pytest.mark.parametrize(
    ("method", "more"),
    [("alphaedit", {}), ("emmet", {}), ("intattn", {"alpha": 0.4, "layers_attn": (0, 1)}), ("pmet", {})],
)
def test_any_closed_form_over_layers_takes_them(ready, method, more):
    for spread, written in (("blue", 2), ("replay", 3)):
        edit = edited(ready, method, spread=spread, **more)
        assert len([n for n in edit.names if ready[0].site_of(n).kind is Kind.MLP]) == written
        assert all(after > before for before, after in (r.target_prob for r in edit.report))


def test_targets_that_are_searched_one_after_the_other_cannot_be_searched_together(ready):
    for method, changes in (("jeep", {}), ("intattn", {"joint_targets": True, "alpha": 0.4, "layers_attn": (0, 1)})):
        with pytest.raises(KtError, match="spread blue searches for one target after the other") as caught:
            edited(ready, method, spread="blue", **changes)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("old", "now", "true"), [("boundary", "ends", "blue"), ("forward", "rest", "replay")])
def test_an_old_name_is_refused_with_todays_but_a_file_that_has_it_is_read(ready, tmp_path, old, now, true):
    with pytest.raises(KtError, match=f"did you mean {now}, .* or {true} "):
        edited(ready, spread=old)
    edit = edited(ready, spread=now)
    edit.manifest["hyper_parameters"]["spread"] = old
    loaded = kt.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert loaded.manifest["hyper_parameters"]["spread"] == old
    with loaded.applied(ready[0]):
        edited(ready, "memit", history=[loaded])
    with pytest.raises(KtError, match="did you mean replay"):
        edited(ready, spread="repley")
