"""Methods that take gradients write any linear map, named by its role or by its module's own name."""

import pytest
from editing_help import REQUESTS, solve
from families import tiny_model

from kt.errors import KtError, UnknownSite

FACTS = [*REQUESTS, {"prompt": "{} plays the sport of", "subject": "Megan Rapinoe", "target_new": "Paris"}]


@pytest.mark.parametrize("method", ["ft", "lora", "ultraedit"])
@pytest.mark.parametrize(
    ("family", "modules", "names"),
    [
        ("llama", "mlp.gate_proj,mlp.up_proj", {"mlp.gate_proj", "mlp.up_proj"}),
        ("qwen3", "attn.q_proj, attn.v_proj", {"self_attn.q_proj", "self_attn.v_proj"}),
        ("gpt2", "mlp.c_fc", {"mlp.c_fc"}),
        ("gpt2", "mlp.up_proj", {"mlp.c_fc"}),
    ],
)
def test_the_maps_that_are_named_are_written_and_the_targets_rise(corpus, tmp_path, method, family, modules, names):
    model = tiny_model(family)
    before = model.fingerprint()
    more = {} if method == "ultraedit" else {"stop_loss": 0.0}
    edit = solve(model, corpus, tmp_path, method, FACTS, modules=modules, layers_mlp=(1,), **more)
    assert model.fingerprint() == before
    assert {name.removesuffix(".weight").split(".1.", 1)[1] for name in edit.names} == names
    assert all(after > start for start, after in (r.target_prob for r in edit.report))
    for name in edit.names:
        assert edit.delta(name).shape == model.weight(name).shape


@pytest.mark.parametrize("method", ["ft", "lora", "ultraedit"])
def test_a_map_that_the_model_has_not_is_one_line(corpus, tmp_path, method):
    with pytest.raises(UnknownSite, match=r"mlp\.gate_proj") as caught:
        solve(tiny_model("gpt2"), corpus, tmp_path, method, FACTS, modules="mlp.gate_proj", layers_mlp=(1,))
    assert "\n" not in str(caught.value)
    with pytest.raises(KtError, match="choose among mlp, attn, both"):
        solve(tiny_model("gpt2"), corpus, tmp_path, method, FACTS, modules="head", layers_mlp=(1,))
