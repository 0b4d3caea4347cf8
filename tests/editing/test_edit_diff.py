"""Two edits side by side."""

import pytest
import torch
from editing_help import REQUESTS, editor_file, solve

import kt
from kt.editing.diff import diff, inner
from kt.model.update import Dense, LowRank

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")


@pytest.fixture(scope="module")
def pair(setting):
    changed = [
        REQUESTS[0] | {"target_new": "Polish"},
        {"prompt": "{} is in", "subject": "Paris", "target_new": "Italy"},
    ]
    return solve(*setting), solve(*setting, method="memit", requests=changed, v_lr=0.2)


def test_an_edit_does_not_differ_from_itself(pair):
    found = diff(pair[0], pair[0])
    assert found.settings == {} and found.conflicts == () and len(found.both) == 2 and found.same_base
    for weight in found.weights:
        assert weight.cosine == pytest.approx(1) and weight.difference == pytest.approx(0, abs=1e-6)


def test_settings_that_differ_are_named_with_both_values(pair):
    found = diff(*pair).settings
    assert found["method"] == ("intattn", "memit")
    assert found["hyper_parameters.v_lr"] == (0.3, 0.2)
    assert "hyper_parameters.v_weight_decay" not in found and "seed" not in found


def test_two_editors_of_one_file_name_are_told_apart(setting, tmp_path):
    edits = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        path = editor_file(setting[0], "malmen", tmp_path / str(seed), seed=seed, steps=1, check_every=1)
        edits.append(kt.edit(setting[0], REQUESTS, "malmen", editor=path, check=False))
    found = diff(*edits)
    digests = tuple(edit.manifest["editor"] for edit in edits)
    assert found.settings == {"editor": digests} == {"editor": tuple(found.as_dict()["settings"]["editor"])}
    assert found.tables()[0].rows == [["editor", *(digest[:12] for digest in digests)]]
    assert diff(edits[0], edits[0]).settings == {}


def test_requests_are_of_one_edit_of_both_or_in_conflict(pair):
    found = diff(*pair)
    assert [r.targets for r in found.conflicts] == [("Italy", "Polish")]
    assert [r.prompt for r in found.only(0)] == ["The city of the Space Needle"]
    assert [r.prompt for r in found.only(1)] == ["Paris is in"]
    assert found.both == ()
    assert set(found.as_dict()["requests"]) == {"only_first", "only_second", "both", "conflicts"}


def test_weights_are_compared_as_the_dense_updates_are(pair):
    for found in diff(*pair).weights:
        name = found.name
        if found.cosine is None:
            assert name in pair[0].names and name not in pair[1].names and found.norms[1] is None
            continue
        a, b = (edit.delta(name).double() for edit in pair)
        assert found.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-6)
        assert found.difference == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-5)
        assert found.norms == pytest.approx((float(a.norm()), float(b.norm())), rel=1e-5)
    assert {w.cosine is None for w in diff(*pair).weights} == {True, False}


def test_an_inner_product_is_one_of_any_two_forms():
    torch.manual_seed(0)
    a, b = (LowRank(torch.randn(5, r), torch.randn(r, 7)) for r in (2, 3))
    wanted = float((a.dense() * b.dense()).sum())
    forms = [(x, y) for x in (a, Dense(a.dense())) for y in (b, Dense(b.dense()))]
    assert [inner(x, y) for x, y in forms] == pytest.approx([wanted] * 4, rel=1e-5)


def test_edits_of_other_weights_say_so(pair, setting):
    model = setting[0]
    with pair[0].applied(model):
        on_top = solve(*setting)
    assert not diff(pair[0], on_top).same_base
