"""A projection is asked for the output whose norm is the wanted change of the residual stream."""

import accelerate
import pytest
import torch
from editing_help import CONTEXTS, statistics
from families import BASE, GQA, SPECIAL, WIDE, byte_level_tokenizer, tiny_model, tiny_module
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import kt
from kt.editing.closed_form.aims import Position
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.keys import fact_keys, fact_values
from kt.editing.closed_form.post_norm import change_of_output, on_sphere, read_norm, same_direction, through_norm
from kt.editing.resolve import read_requests
from kt.errors import KtError
from kt.model.sites import Kind, Site
from kt.runs.journal import Journal

WIDTH, FACTS = 33, 6
NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
POST_NORM = ("gemma2", "gemma3_text", "olmo2")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class RMSNorm(nn.Module):
    """Llama's, OLMo's and Gemma's norm in the dtype of its input; theirs compute in float32. Gemma's gain is 1 + w."""

    def __init__(self, weight, one=0.0, eps=1e-6):
        super().__init__()
        self.weight, self.one, self.eps = nn.Parameter(weight, requires_grad=False), one, eps

    def forward(self, x):
        return (self.one + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def gains(zeros=0):
    gain = normal(WIDTH, seed=1)
    gain = gain.sign() * gain.abs().clamp(0.5, 2)
    gain[:zeros] = 0
    return gain


def layer_norm(gain, bias):
    norm = nn.LayerNorm(WIDTH, dtype=torch.float64, eps=1e-5).requires_grad_(False)
    norm.weight.copy_(gain)
    norm.bias.copy_(bias)
    return norm


MODULES = {
    "gain w": lambda zeros: RMSNorm(gains(zeros)),
    "gain 1 + w": lambda zeros: RMSNorm(gains(zeros) - 1, one=1.0),
    "LayerNorm": lambda zeros: layer_norm(gains(zeros), normal(WIDTH, seed=2)),
}


def reachable(norm, size=0.3):
    """Outputs now, and the stream's change by other outputs of the same mean and length."""
    now, other = normal(WIDTH, FACTS, seed=3) + 0.2, normal(WIDTH, FACTS, seed=4)
    mean = now.mean(0) if isinstance(norm, nn.LayerNorm) else 0.0
    start = now - mean
    other = start + size * (other - (other.mean(0) if isinstance(norm, nn.LayerNorm) else 0.0))
    other = other * (start.norm(dim=0) / other.norm(dim=0))
    return now, norm((other + mean).T).T - norm(now.T).T


@pytest.mark.parametrize("zeros", [0, 5])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("size", [0.1, 0.3, 1.0])
def test_a_change_that_the_norm_can_make_arrives(name, zeros, size):
    norm = MODULES[name](zeros)
    now, wanted = reachable(norm, size)
    change = through_norm(norm, now, wanted)
    arrives = norm((now + change.output).T).T - norm(now.T).T
    assert (arrives - wanted).norm() < 1e-8 * wanted.norm()
    assert (change.stream - wanted).norm() < 1e-8 * wanted.norm()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("size", [0.01, 1.0, 1000.0])
def test_of_any_wanted_change_what_arrives_is_what_is_said_and_arrives_when_it_is_wanted(name, size):
    norm = MODULES[name](0)
    now = normal(WIDTH, FACTS, seed=3) + 0.2
    wanted = size * normal(WIDTH, FACTS, seed=5)
    change = through_norm(norm, now, wanted)
    arrives = norm((now + change.output).T).T - norm(now.T).T
    assert (arrives - change.stream).norm() < 1e-10 * arrives.norm()
    assert ((arrives * wanted).sum(0) > 0).all()
    assert (change.output.norm(dim=0) <= 2 * now.norm(dim=0)).all()
    again = through_norm(norm, now, change.stream)
    assert (again.stream - change.stream).norm() < 1e-8 * change.stream.norm()


def test_a_factor_behind_the_norm_is_divided_out():
    norm = MODULES["gain w"](0)
    now, wanted = reachable(norm)
    once, half = through_norm(norm, now, wanted), through_norm(norm, now, wanted / 2, 0.5)
    torch.testing.assert_close(half.output, once.output)
    torch.testing.assert_close(half.stream, once.stream / 2)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_no_other_output_of_the_length_is_nearer_to_the_wanted_at_its_cost(centred, size):
    start, wanted, slopes = normal(WIDTH, 1, seed=6), size * normal(WIDTH, 1, seed=7), gains(3)[:, None].clone()
    start = start - start.mean(0) if centred else start
    damping = 0.1 * slopes[slopes != 0].square().median()

    def cost(end):
        move = end - start
        return (slopes * move - wanted).square().sum(0) + damping * move.square().sum(0)

    best = on_sphere(start, slopes, wanted, centred, damping=0.1, rounds=1)
    torch.testing.assert_close(best.norm(dim=0), start.norm(dim=0))
    for width in (1e-3, 0.1, 10.0):
        others = best + width * normal(WIDTH, 2000, seed=8)
        others = others - others.mean(0) if centred else others
        others = others * (start.norm() / others.norm(dim=0))
        assert (cost(others) >= cost(best) * (1 - 1e-12)).all()
    if centred:
        assert best.mean(0).abs().max() < 1e-12


def test_dead_gains_ask_for_nothing():
    """Those elements keep their part of the output, but for the factor that keeps its length."""
    norm = RMSNorm(gains(5))
    now = normal(WIDTH, FACTS, seed=3)
    wanted = torch.zeros(WIDTH, FACTS, dtype=torch.float64)
    wanted[:5] = 100.0
    assert through_norm(norm, now, wanted).output.abs().max() < 1e-12
    now, wanted = reachable(norm)
    dead = (now + through_norm(norm, now, wanted).output)[:5] / now[:5]
    torch.testing.assert_close(dead, dead[:1].expand(5, -1))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_an_output_that_was_searched_for_is_written_at_the_length_that_it_has_now(name, size):
    """N makes of it what it makes of the one that was found, to its ε; the change is at most twice the output."""
    norm = MODULES[name](0)
    norm.eps = 1e-14
    now, found = normal(WIDTH, FACTS, seed=3) + 0.2, size * normal(WIDTH, FACTS, seed=5)
    centred = isinstance(norm, nn.LayerNorm)
    change = same_direction(now, found, centred)
    close = torch.testing.assert_close
    close(norm((now + change).T), norm((now + found).T), rtol=1e-9, atol=1e-9)
    start = now - (now.mean(0) if centred else 0)
    close((start + change).norm(dim=0), start.norm(dim=0))
    assert (change.norm(dim=0) <= 2 * start.norm(dim=0)).all()


def test_an_output_of_zero_has_no_length_to_keep():
    now, found = normal(WIDTH, 3, seed=3), normal(WIDTH, 3, seed=5)
    now[:, 0], found[:, 1] = 0, -now[:, 1]
    change = same_direction(now, found)
    assert torch.equal(change[:, :2], found[:, :2]) and not torch.equal(change[:, 2], found[:, 2])


def test_an_output_of_zero_is_left_alone():
    norm, now = RMSNorm(gains()), normal(WIDTH, 2, seed=3)
    now[:, 0] = 0
    change = through_norm(norm, now, normal(WIDTH, 2, seed=5)).output
    assert change[:, 0].abs().max() == 0 and change[:, 1].norm() > 0.1 and change.isfinite().all()


def test_an_offloaded_norm_is_read():
    norm = layer_norm(gains(), normal(WIDTH, seed=2))
    here = read_norm(norm, WIDTH)
    accelerate.cpu_offload(norm, execution_device=torch.device("cpu"))
    assert norm.weight.is_meta
    there = read_norm(norm, WIDTH)
    assert there.centred and torch.equal(there.gain, here.gain) and torch.equal(there.bias, here.bias)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("width", [32, 33])
def test_a_norm_is_read_from_its_numbers(name, width):
    gain, bias = gains(2)[:width], normal(WIDTH, seed=2)[:width]
    norm = {
        "gain w": lambda: RMSNorm(gain),
        "gain 1 + w": lambda: RMSNorm(gain - 1, one=1.0),
        "LayerNorm": lambda: nn.LayerNorm(width, dtype=torch.float64),
    }[name]()
    if name == "LayerNorm":
        norm.load_state_dict({"weight": gain, "bias": bias})
    form = read_norm(norm, width)
    assert form.centred == (name == "LayerNorm")
    torch.testing.assert_close(form.gain, gain, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(form.bias, bias if form.centred else torch.zeros_like(bias), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("module", [nn.Linear(8, 8).double(), nn.Identity(), nn.Tanh(), nn.Softmax(-1)])
def test_a_module_that_is_no_norm_is_refused(module):
    with pytest.raises(KtError, match=f"{type(module).__name__} stands between .* neither RMSNorm nor LayerNorm"):
        read_norm(module, 8)


def exact_model(family):
    """In float64, norms behind the projections with gains from 0.5 to 2 that compute in float64 too."""
    module = tiny_module(family).double()
    for number, block in enumerate(module.model.layers):
        for name in NORMS:
            gain = 0.5 + 1.5 * torch.rand(32, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            one = float("gemma" in family)
            setattr(block, name, RMSNorm(gain - one, one))
    return kt.load(module, tokenizer=byte_level_tokenizer())


@pytest.mark.parametrize("kind", [Kind.ATTN, Kind.MLP])
@pytest.mark.parametrize("family", POST_NORM)
def test_in_a_model_the_stream_changes_by_what_is_wanted(family, kind):
    model = exact_model(family)
    batch, site, end = model.encode(["The city of the Space Needle"]), Site(kind, 1), torch.tensor([3])
    norm = model.module.model.layers[1].get_submodule(NORMS[kind is Kind.MLP])
    key, now = (model.read(batch, [site], side, at=end)[site].T for side in ("key", "value"))
    other = now + 0.3 * normal(*now.shape) * now.square().mean().sqrt()
    wanted = (norm(other.T) - norm(now.T)).T * (1 + 0 * now)
    change = change_of_output(model, site, now, wanted)

    def stream():
        """After the block for the MLP; for attention the norm's value, which is added to the block's input."""
        if kind is Kind.MLP:
            return model.read(batch, [Site(Kind.RESID, 1)], at=end)[Site(Kind.RESID, 1)].T
        seen = []
        with norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0, 3, :, None])):
            model.module(input_ids=batch.ids)
        return seen[0]

    before = stream()
    with model.restored([site]):
        model.write(site, change.output @ key.T / key.square().sum())
        arrives = stream() - before
    assert (arrives - change.stream).norm() < 1e-8 * wanted.norm()
    nearest = (arrives - wanted).norm()
    assert nearest < 0.2 * wanted.norm()
    again = change_of_output(model, site, now, change.stream)
    assert (again.stream - change.stream).norm() < 1e-8 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", POST_NORM)
def test_the_families_own_norms_are_read(family, dtype):
    module = tiny_module(family)
    block = module.model.layers[0]
    gain = 0.5 + torch.rand(32, generator=torch.Generator().manual_seed(0))
    one = float("gemma" in family)
    with torch.no_grad():
        block.post_attention_layernorm.weight.copy_(gain - one)
    module = module.to(dtype)
    form = read_norm(block.post_attention_layernorm, 32)
    torch.testing.assert_close(form.gain, one + block.post_attention_layernorm.weight.double(), atol=1e-6, rtol=1e-6)
    assert form.bias.abs().max() < 1e-6 and not form.centred


@pytest.mark.parametrize("kind", [Kind.ATTN, Kind.MLP])
def test_granites_multiplier_is_divided_out(kind):
    torch.manual_seed(0)
    config = CONFIG_MAPPING["granite"](**(BASE | WIDE | GQA | SPECIAL), residual_multiplier=0.22)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().double()
    model = kt.load(module, tokenizer=byte_level_tokenizer())
    now, wanted = normal(32, 2, seed=1), normal(32, 2, seed=2)
    change = change_of_output(model, Site(kind, 1), now, wanted)
    torch.testing.assert_close(change.output, wanted / 0.22, rtol=1e-6, atol=1e-6)
    assert change.stream is wanted


def test_what_stands_behind_a_projection_is_not_asked_of_the_model_again_by_each_edit(corpus, tmp_path, monkeypatch):
    model = tiny_model("gemma3_text")
    known = statistics(model, corpus, tmp_path)
    asked = []
    monkeypatch.setattr(kt.model.model, "explained", asked.append)
    options = dict(context_templates=CONTEXTS[:1], layers_mlp=(0, 1), statistics=known, mom2_update_weight=1e-9)
    kt.edit(model, [REQUEST], method="memit", **options)
    assert not asked


@pytest.mark.parametrize("family", ["gptj", "llama", "opt"])
def test_where_the_output_is_added_as_it_is_the_wanted_change_is_asked(family):
    model = tiny_model(family)
    wanted = normal(32, 2)
    assert change_of_output(model, Site(Kind.MLP, 1), normal(32, 2, seed=1), wanted).output is wanted


OWN = {
    "rome": {},
    "r-rome": {},
    "intattn-rome": dict(layers_attn=(0,), alpha=0.25),
    "pmet": dict(mom2_update_weight=1e-9),
}


REQUEST = dict(prompt="The mother tongue of {}", subject="Danielle Darrieux", target_new="Italy")


def edited(model, method, corpus, cache, **options):
    """One fact, written at layer 1."""
    known = statistics(model, corpus, cache)
    options |= dict(context_templates=CONTEXTS[:1], layers_mlp=(1,))
    return kt.edit(model, [REQUEST], method=method, statistics=known, **options)


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_a_method_that_aims_at_its_own_output_turns_it_and_keeps_its_length(family, method, corpus, tmp_path):
    """The norm's value is then the one that was searched for; of a path that α scales, with its share of δ."""
    model = exact_model(family)
    edit = edited(model, method, corpus, tmp_path, v_num_grad_steps=5, **OWN[method])
    facts = read_requests(model, edit.requests)
    shares = {"mlp": 0.75, "attn": 0.25} if method == "intattn-rome" else {"mlp": 1.0}
    assert sorted(Site.parse(aim).kind.value for aim in edit.targets) == sorted(shares)
    for aim, wanted in edit.targets.items():
        site = Site.parse(aim)
        before = fact_values(model, facts, Contexts(), site, Position.SUBJECT_LAST)
        found = before + shares[site.kind.value] * (wanted.T.double() - before)
        with model.restored([site]):
            model.write(site, edit.delta(model.weight_name(site)))
            after = fact_values(model, facts, Contexts(), site, Position.SUBJECT_LAST)
        assert (after - before).norm() > 0.01 * before.norm() and abs(found.norm() / before.norm() - 1) > 1e-4
        torch.testing.assert_close(after.norm(), before.norm(), rtol=1e-5, atol=0)
        torch.testing.assert_close(after / after.norm(), found / found.norm(), rtol=1e-5, atol=1e-5)
    through = [change["came_through"]["mean"] for change in edit.manifest["value_change"].values()]
    if method != "intattn-rome":
        assert through == pytest.approx([1], abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
@pytest.mark.parametrize("method", ["intattn-rome", "pmet"])
def test_a_run_does_not_go_on_with_what_an_older_version_wrote_at_another_length(method, corpus, tmp_path):
    """It kept a weight's solve under the weight's name alone, of a path that α scales in full strength."""
    model, journal = exact_model("olmo2"), tmp_path / "journal"

    def solves():
        edited(model, method, corpus, tmp_path, journal=Journal(journal), v_num_grad_steps=5, **OWN[method])
        return sorted(path for path in journal.rglob("*") if "-own-length" in path.name)

    kept = solves()
    assert len(kept) == 1 + (method == "intattn-rome")
    for path in kept:
        path.rename(path.with_name(path.name.replace("-own-length", "").replace("-both-keys", "")))
    assert solves() == kept


METHODS = {
    "memit": dict(mom2_update_weight=1e-9),
    "emmet": dict(mom2_update_weight=1e-9, emmet_lambda=0.0),
    "alphaedit": dict(nullspace_threshold=1e9, L2=1e-9),
}


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_an_edit_brings_the_stream_to_the_wanted_value(family, method, corpus, tmp_path):
    model = exact_model(family)
    edit = edited(model, method, corpus, tmp_path, clamp_norm_factor=0.05, v_lr=0.02, **METHODS[method])
    facts, bare = read_requests(model, edit.requests), Contexts()
    now, output = (fact_values(model, facts, bare, Site(k, 1), Position.SUBJECT_LAST) for k in (Kind.RESID, Kind.MLP))
    wanted = edit.targets["hidden.1"].T.double() - now
    stream = change_of_output(model, Site(Kind.MLP, 1), output, wanted).stream
    change = edit.manifest["value_change"]["hidden.1"]
    through = float((stream * wanted).sum() / wanted.square().sum())
    assert change["came_through"]["mean"] == pytest.approx(through, abs=1e-4)
    assert change["left"]["mean"] == pytest.approx(float((stream - wanted).norm() / wanted.norm()), abs=1e-4)
    assert through > 0.9  # asked for the stream's change itself, the projection makes 4.9 (OLMo) and 7.5 times of it


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_each_path_of_a_joint_edit_asks_its_norm_for_its_share_of_the_streams_change(family, corpus, tmp_path):
    """Attention first, on the unedited model; the MLP's share is of what attention's write left."""
    model, given = exact_model(family), dict(layers_attn=(1,), layers_mlp=(1,), v_num_grad_steps=10, v_lr=0.1)
    request = [dict(prompt="The mother tongue of {}", subject="Danielle Darrieux", target_new="Italy")]
    given |= dict(statistics=statistics(model, corpus, tmp_path), context_templates=[["{}"]], mom2_update_weight=1e-9)
    edit = kt.edit(model, request, method="intattn", alpha=0.3, **given)
    apart = kt.edit(model, request, method="intattn", alpha=0.3, coupled=True, **given)
    facts, bare = read_requests(model, edit.requests), Contexts()
    for kind, share in ((Kind.ATTN, 0.3), (Kind.MLP, 0.7)):
        site = Site(kind, 1)
        now, output = (fact_values(model, facts, bare, s, Position.SUBJECT_LAST) for s in (Site(Kind.RESID, 1), site))
        key = fact_keys(model, facts, bare, site, Position.SUBJECT_LAST)
        wanted = share * (edit.targets["hidden.1"].T.double() - now)
        name = model.weight_name(site)
        asked = change_of_output(model, site, output, wanted).output
        torch.testing.assert_close(edit.delta(name).double() @ key, asked, rtol=1e-3, atol=1e-4)
        assert torch.equal(edit.delta(name), apart.delta(name))
        model.write(name, edit.delta(name))
