"""MEMIT against its formula, and how its residual is spread."""

import pytest
from one_layer import close, delta, given, least_squares, solved

from kt.editing.methods.memit import MEMIT
from kt.errors import KtError
from kt.model.sites import Kind, Site

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|of the wanted change)")


def test_the_update_is_the_papers_formula(setting):
    edit = solved(setting, "memit", mom2_update_weight=0.05)
    parts = given(setting, edit, "hidden.1")
    close(delta(setting, edit), least_squares(parts, 0.05), atol=1e-5, rtol=1e-4)


def test_it_aims_at_the_residual_stream_after_the_last_layer():
    plan = MEMIT(layers_mlp=(2, 4, 6)).plan()
    assert [path.aim.site for path in plan.paths] == [Site(Kind.RESID, 6)]
    assert [plan.paths[0].spread(i, 3) for i in range(3)] == [1 / 3, 1 / 2, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"v_lr": "fast"}, "v_lr 'fast' is no float"),
        ({"v_lr": float("nan")}, "v_lr nan must be zero or more"),
        ({"v_num_grad_steps": 0}, "v_num_grad_steps must be at least 1"),
        ({"v_num_grad_steps": 2.5}, "v_num_grad_steps 2.5 is no int"),
        ({"v_num_grad_steps": True}, "v_num_grad_steps True is no int"),  # Python takes it for 1
        ({"v_num_grad_steps": False}, "v_num_grad_steps False is no int"),
        ({"layers_mlp": 3}, "layers_mlp 3 is no tuple"),
    ],
)
def test_a_value_that_cannot_be_is_one_line_when_the_configuration_is_made(changes, words):
    with pytest.raises(KtError, match=words) as caught:
        MEMIT(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"spread": "wide"}, "choose one of even, sqrt"), ({"fact_token": "first"}, "choose one of subject_last, last")],
)
def test_a_word_that_is_unknown_lists_those_that_are_known(changes, words):
    with pytest.raises(KtError, match=words):
        MEMIT(layers_mlp=(1,), **changes).plan()
