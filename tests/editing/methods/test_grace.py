"""GRACE: the codebook's rules, the read at every token against its formula, radii in units of key distances."""

import pytest
import torch
from editing_help import REQUESTS, fast
from families import tiny_model

import kt
from kt.editing.adapter_edit import Adapter
from kt.errors import KtError
from kt.model.sites import Site

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|give the target first|less likely)")


def book(*entries, radius=1.0):
    """Keys on a line, put in one after the other: (place, target)."""
    parts = [
        Adapter(Site("mlp", 1), "", radius, torch.tensor([[float(x), 0.0]]), torch.tensor([[float(i)]]),
                torch.tensor([radius]), (label,), (0,))
        for i, (x, label) in enumerate(entries)
    ]  # fmt: skip
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.plus(part)
    return whole


def test_far_keys_are_added_near_ones_of_another_target_share_the_way_and_of_the_same_one_grow_the_radius():
    assert book((0, "a"), (5, "b")).radii.tolist() == [1, 1]
    split = book((0, "a"), (1, "b"))
    assert split.radii.tolist() == pytest.approx([0.5, 0.5], rel=1e-4) and split.radii[0] < 0.5
    grown = book((0, "a"), (1.5, "a"))
    assert (grown.labels, grown.radii.tolist(), grown.entries) == (("a", "a"), [1.5, 1], (0, 1))
    kept = book((0, "a"), (1.5, "a"), (2.4, "b"))  # "b" lies nearer to 1.5 than 0 does, and 1.5 keeps its target
    nearest = (kept.keys[:, 0] - 1.5).abs().argmin()
    assert kept.labels[nearest] == "a" and kept.radii[nearest] > 0
    again = book((0, "a"), (0, "b"))
    assert (again.labels, again.values.tolist(), again.radii.tolist()) == (("b",), [[1.0]], [1.0])
    cut = book((0, "a"), (0.2, "b"), (1.1, "c"))  # a radius that was halved does not grow back over another target
    assert cut.radii.tolist() == pytest.approx([0.1, 0.1, 0.45], rel=1e-3)


def test_the_output_is_the_value_where_the_nearest_key_lies_within_its_radius_whatever_the_padding():
    """‖x - k_i‖ ≤ ε_i: v_i, else W x; computed by hand in float64."""
    model, site = tiny_model("llama"), Site("mlp", 1)
    edit = kt.edit(model, REQUESTS, "grace", **fast("grace", layers_mlp=(1,), eps=0.4))
    adapter, texts = edit.effect, [r.prompt for r in edit.report] + ["A much longer line of text about the city of the"]
    batch = model.encode(texts)
    keys, plain = (model.read(batch, [site], end)[site].double() for end in ("key", "value"))
    distance = torch.cdist(keys, adapter.keys.double().expand(len(texts), -1, -1))
    nearest = distance.argmin(-1)
    met = distance.amin(-1) <= adapter.radii.double()[nearest]
    assert met[0, -1] and met[1, -1] and 2 <= int(met.sum()) < met.numel()
    linear, hook = adapter.hook(model)
    out = hook(linear, (keys.float(),), plain.float())
    expected = torch.where(met[..., None], adapter.values.double()[nearest], plain)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=0)
    with edit.applied(model):
        together, alone = model.logits(batch), [model.logits(model.encode([text])) for text in texts]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_the_radius_is_in_mean_distances_of_unrelated_keys_and_a_larger_model_scale_scales_it():
    model = tiny_model("llama")
    relative = kt.edit(model, REQUESTS, "grace", **fast("grace", layers_mlp=(1,), eps=0.1)).effect
    absolute = kt.edit(model, REQUESTS, "grace", **fast("grace", layers_mlp=(1,), eps=0.1, eps_unit="absolute")).effect
    assert absolute.radius == pytest.approx(0.1)
    weight = model.own(Site("mlp.up_proj", 1))
    weight.data *= 3.0  # the keys of down_proj are three times as long
    scaled = kt.edit(model, REQUESTS, "grace", **fast("grace", layers_mlp=(1,), eps=0.1)).effect
    assert scaled.radius == pytest.approx(3 * relative.radius, rel=1e-4)


def test_a_radius_of_zero_and_an_unknown_unit_are_one_line():
    for changes, words in (
        ({"eps": 0.0}, "eps 0 is a radius"),
        ({"eps_unit": "metre"}, "metre"),
        ({"eps": -1.0}, "eps"),
    ):
        with pytest.raises(KtError, match=words) as caught:
            kt.edit(tiny_model("llama"), REQUESTS, "grace", **changes)
        assert "\n" not in str(caught.value)
