"""JEEP's regions one at a time: Table 4's ablations (003, section 5.4), told apart by what is searched for together."""

import pytest
import torch
from editing_help import FAST, solve

from kt.editing.methods.jeep import IDLE, JEEP, REGIONS
from kt.errors import KtError

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|of the wanted change)")
LAYERS = {"low": FAST["layers_mlp"], "high": FAST["layers_high"]}


@pytest.fixture(scope="module")
def solved(setting):
    """region -> its edit, each solved once."""
    idle = {region: dict.fromkeys(IDLE.get(region, ())) for region in REGIONS}  # not given where they have no use
    return {region: solve(*setting, method="jeep", region=region, **idle[region]) for region in REGIONS}


def written_layers(setting, edit):
    return tuple(sorted(setting[0].site_of(name).layer for name in edit.names))


@pytest.mark.parametrize("region", ["low", "high"])
def test_a_joint_region_has_the_joint_searchs_targets_to_the_last_bit(solved, region):
    both, one = solved["both"].targets, solved[f"joint-{region}"].targets
    assert set(one) == set(both) and len(both) == 2
    assert all(torch.equal(one[aim], both[aim]) for aim in both)


@pytest.mark.parametrize("region", ["low", "high"])
def test_a_region_searched_for_alone_has_other_targets(solved, region):
    """Else the test above would say nothing: two searches that do not know of each other give the same values."""
    ((aim, alone),) = solved[region].targets.items()
    assert not torch.equal(alone, solved[f"joint-{region}"].targets[aim])


def test_searched_for_apart_the_high_value_is_that_of_the_model_with_its_low_layers_written(setting, solved):
    """JEEP 5.4, "Separate Optimization": the low layers are updated before δ of the high ones is computed."""
    apart = solve(*setting, method="jeep", separate_targets=True)
    low, high = solved["low"], solved["high"]
    assert all(torch.equal(low.delta(name), apart.delta(name)) for name in low.names)
    ((aim, unwritten),) = high.targets.items()
    assert not torch.equal(apart.targets[aim], unwritten)
    with low.applied(setting[0]):
        then = solve(*setting, method="jeep", region="high", **dict.fromkeys(IDLE["high"]))
    torch.testing.assert_close(apart.targets[aim], then.targets[aim], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("region", ["low", "high"])
def test_only_that_regions_weights_are_touched(setting, solved, region):
    model, edit = setting[0], solved[f"joint-{region}"]
    assert written_layers(setting, edit) == LAYERS[region]
    before = {name: weight.clone() for name, weight in model.module.state_dict().items()}
    with edit.applied(model):
        now = model.module.state_dict()
        assert {name for name, weight in before.items() if not torch.equal(weight, now[name])} == set(edit.names)


def test_the_low_region_is_written_first_and_so_alike_with_and_without_the_high_one(solved):
    both, low = solved["both"], solved["joint-low"]
    assert all(torch.equal(low.delta(name), both.delta(name)) for name in low.names)


def test_the_high_region_alone_is_solved_on_unwritten_low_layers(solved):
    both, high = solved["both"], solved["joint-high"]
    assert all(not torch.equal(high.delta(name), both.delta(name)) for name in high.names)


def test_the_value_of_the_region_that_is_not_written_does_not_come_through(setting, solved):
    low, high = solved["both"].targets
    change = solved["joint-high"].manifest["value_change"]
    assert change[low]["came_through"]["mean"] == pytest.approx(0, abs=1e-6)
    assert abs(change[high]["came_through"]["mean"]) > 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"region": "middle"}, "choose one of both, low, high, joint-low, joint-high"),
        ({"region": "joint-low", "separate_targets": True}, "leave separate_targets out, or use low"),
    ],
)
def test_what_cannot_be_is_one_line(changes, words):
    with pytest.raises(KtError, match=words) as error:
        JEEP(layers_mlp=(0, 1), layers_high=(2,), **changes).plan()
    assert "\n" not in str(error.value)
