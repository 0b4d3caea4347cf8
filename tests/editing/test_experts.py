"""Edits of mixtures of experts: one joint solve over all parts, exact, named by slice, taken back to the byte."""

import random
import re
import warnings

import pytest
import torch
from families import HYBRIDS, MIXTURES, TEXTS, tiny_model, wide_model

import kt
from kt.editing.closed_form.factor import BlockMoment, Moment
from kt.editing.closed_form.second_moment import key_statistics
from kt.editing.closed_form.solvers import Equality, LeastSquares, NullSpace, RankOne, System
from kt.editing.conflicts import overlaps
from kt.export.hf import to_hf
from kt.export.undo import revert_folder
from kt.model.sites import Site

FACT = kt.Fact("The {} is in the city of", "Space Needle", answer="Paris", foil="Rome", target="Rome")
OTHER = kt.Fact("The mother tongue of {} is", "Danielle Darrieux", answer="French", target="Italian")
WORDS = " ".join(TEXTS).split()
TEXT = "\n".join(" ".join(random.Random(seed).sample(WORDS, 8)) for seed in range(40))
SETTINGS = dict(v_num_grad_steps=4, check=False, context_templates=["{}"], max_tokens=400)
SIZES = (5, 7, 4)


@pytest.fixture(params=MIXTURES)
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setenv("KT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random models say nothing that one could want
        yield


def solved(model, tmp_path, facts=(FACT,), method="memit", **changes):
    layers = {"layers": [2]} if "layers" not in changes else {}
    return kt.edit(model, list(facts), method=method, corpus=str(tmp_path / "text.txt"), **SETTINGS | layers | changes)


def drawn(*sizes, seed=0):
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def system():
    moments = [drawn(size, 3 * size, seed=size) for size in SIZES]
    blocks = [Moment.of(m @ m.T / m.shape[1], f"part {n}") for n, m in enumerate(moments)]
    whole = torch.block_diag(*(block.matrix() for block in blocks))
    keys = drawn(sum(SIZES), 3, seed=1)
    keys[: SIZES[0], 1] = 0  # a token that is not sent to the first expert
    return System(drawn(6, 3, seed=2), keys, keys, BlockMoment("parts", blocks), drawn(sum(SIZES), 2, seed=3)), whole


@pytest.mark.parametrize("past", [False, True])
def test_the_joint_solve_is_the_dense_systems(system, past):
    given, c = system
    given = given if past else given._replace(past=None)
    k, r, weight = given.keys, given.residuals, 3.0
    h = weight * c + (given.past @ given.past.T if past else 0)
    dense = r @ k.T @ torch.linalg.inv(h + k @ k.T)
    assert (LeastSquares(weight)(given).update.dense() - dense).abs().max() < 1e-12
    through = torch.linalg.solve(h, k)
    exact = r @ torch.linalg.inv(k.T @ through) @ through.T
    assert (Equality(weight, 0.0)(given).update.dense() - exact).abs().max() < 1e-11


def test_rank_one_and_the_projectors_are_by_part(system):
    given, c = system
    one = given._replace(keys=given.keys[:, :1], bare=given.keys[:, :1], residuals=given.residuals[:, :1], past=None)
    u = torch.linalg.solve(c, one.keys)
    assert (RankOne()(one).update.dense() - one.residuals @ u.T / (u.T @ one.keys)).abs().max() < 1e-12
    basis = given.moment.null_basis("auto")
    projectors = [b.null_basis("auto") for b in given.moment.blocks]
    assert torch.equal(basis, torch.block_diag(*projectors))
    update = NullSpace(l2=0.5)(given).update.dense()
    p, k = basis @ basis.T, torch.cat([given.keys, given.past], 1)
    dense = given.residuals @ given.keys.T @ p @ torch.linalg.inv(k @ k.T @ p + 0.5 * torch.eye(len(p)))
    assert (update - dense).abs().max() < 1e-11


def test_an_edit_of_experts_is_the_dense_solution_of_their_keys(kind, tmp_path):
    model, site = wide_model(kind), Site("mlp", 2)
    edit = solved(model, tmp_path, [FACT, OTHER], mom2_update_weight=2.0)
    statistics = key_statistics(model, [site], str(tmp_path / "text.txt"), 400)
    names = model.weight_names(site)
    count, tokens = statistics.routed, statistics.n_tokens
    assert sorted(count) == sorted(name for name in names if "[" in name) and max(count.values()) <= tokens
    moments = {name: statistics.moment(name.removesuffix(".weight")).double() for name in names}
    length = sum(float(moments[n].diagonal().sum()) for n in count) * tokens / sum(count.values())
    blocks = [m + length / tokens * torch.eye(len(m)) if n in count else m for n, m in moments.items()]
    columns = {model.weight_name(part): at for part, at in model.parts(site).items()}
    keys = torch.zeros(model.key_size(site), 2, dtype=torch.float64)
    whole = torch.zeros(model.d_model, len(keys), dtype=torch.float64)
    for name in edit.names:
        keys[columns[name]] = edit.keys[name].T.double()
        whole[:, columns[name]] = edit.updates[name].to(torch.float64).dense()
    left = next(iter(edit.updates.values())).left[:, :2].double()  # the residuals, the same in every part
    dense = left @ keys.T @ torch.linalg.inv(2.0 * torch.block_diag(*blocks) + keys @ keys.T)
    assert (whole - dense).abs().max() < 1e-5 * dense.abs().max()


def test_a_rank_one_edit_gives_the_value_that_was_wanted(kind, tmp_path):
    model, site = wide_model(kind), Site("mlp", 2)
    before = model.fingerprint()
    edit = solved(model, tmp_path, method="r-rome")
    assert all(re.search(r"experts\.down_proj\[\d\]$|shared\w*\.down_proj\.weight$", name) for name in edit.names)
    tokens = model.encode(["The Space Needle"])
    with edit.applied(model):
        value = model.read(tokens, [site], "value")[site][0, -1]
        assert model.fingerprint() != before
    assert torch.allclose(value, edit.targets["mlp.2"][0].double(), atol=1e-5)
    assert model.fingerprint() == before
    again = kt.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert again.digest == edit.digest and again.names == edit.names
    assert all(edit.updates[name].shape == tuple(model.weight(name).shape) for name in edit.names)


def test_experts_that_no_fact_is_sent_to_stay_as_they_are(tmp_path):
    model = tiny_model("qwen3_moe")
    edit = solved(model, tmp_path)
    sent = model.read(model.encode(["The Space Needle"]), [*model.parts(Site("mlp", 2))], "key")
    used = {model.weight_name(site) for site, key in sent.items() if key[0, -1].any()}
    assert set(edit.names) == used and 0 < len(used) < 4


@pytest.mark.parametrize("method", ["memit", "alphaedit", "lyaplock", "ft", "ultraedit"])
def test_a_session_remembers_the_keys_of_experts(method, tmp_path):
    model = tiny_model("deepseek_v3")
    before, given = model.fingerprint(), {} if method in ("ft", "ultraedit") else {"context_templates": ["{}"]}
    settings = {"num_steps": 2} if method == "ft" else {} if method == "ultraedit" else {"v_num_grad_steps": 3}
    keep = {"keep_history": True} if method in ("memit", "alphaedit") else {}
    options = dict(method=method, corpus=str(tmp_path / "text.txt"), max_tokens=300, check=False)
    with kt.EditSession(model, layers=[1, 2], **options, **given, **settings, **keep) as session:
        for fact in (FACT, OTHER):
            session.edit([fact])
        whole, after = session.total(), model.fingerprint()
    assert model.fingerprint() == before
    with whole.applied(model):
        assert model.fingerprint() != before
    assert after != before and len(whole.requests) == 2
    if method in ("memit", "alphaedit"):
        found = overlaps(model, [FACT], whole)
        assert found is not None and found.values.shape == (1, 2) and found.values.isfinite().all()


def test_prune_and_rect_restrain_the_experts_together(tmp_path):
    for guard in ("prune", "rect", "sphere"):
        model = tiny_model("mixtral")
        options = dict(method="memit", corpus=str(tmp_path / "text.txt"), update_guard=guard, layers=[2], **SETTINGS)
        before = model.fingerprint()
        with kt.EditSession(model, **options) as session:
            session.edit([FACT])
            first = torch.cat([update.dense() for update in session.steps[0].updates.values()], 1)
            session.edit([OTHER])
        assert model.fingerprint() == before and session.steps[1].names
        written = float((first != 0).float().mean())  # of the experts that are written at all
        assert written == pytest.approx(0.4 if guard == "rect" else 1.0, abs=0.01), guard


def test_an_expert_with_few_tokens_is_held_by_its_count():
    moments = [Moment.of(torch.eye(3, dtype=torch.float64) * n, f"part {n}") for n in (4, 0)]
    from kt.editing.closed_form.second_moment import Statistics

    statistics = Statistics({}, n_tokens=100, routed={"a[0]": 60, "a[1]": 0})
    statistics._moments.update({"a[0]": moments[0], "a[1]": moments[1]})
    whole = statistics.moment_of_parts("a[*]", ["a[0]", "a[1]"]).matrix()
    ridge = 4 * 3 * 100 / 60 / 100  # the mean squared length of a key that was sent there, over all tokens
    assert torch.allclose(whole, torch.diag(torch.tensor([4 + ridge] * 3 + [ridge] * 3, dtype=torch.float64)))


def test_a_merged_folder_holds_the_edit_and_gives_it_back(kind, tmp_path):
    model = tiny_model(kind)
    model.module.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    model = kt.load(tmp_path / "base", dtype="float32", device="cpu")
    edit = solved(model, tmp_path, method="r-rome")
    out = to_hf(model, edit, tmp_path / "merged")  # loads it again, and compares weights and logits
    for base in (None, str(tmp_path / "base")):
        back = tmp_path / f"back-{base is None}"
        revert_folder(out.path, base=base, to=back)
        assert kt.load(back, dtype="float32", device="cpu").fingerprint() == model.fingerprint()
    with pytest.raises(kt.KtError, match="an adapter holds linear maps' weights only"):
        from kt.export.adapter import to_peft

        to_peft(model, edit, tmp_path / "adapter")


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_of_other_mixers_are_edited_and_come_back(name, tmp_path):
    model = tiny_model(name)
    before = model.fingerprint()
    edit = kt.edit(model, [FACT], alpha=0.4, corpus=str(tmp_path / "text.txt"), **SETTINGS)
    attention = set(edit.manifest["attention_weights"])
    assert attention and set(edit.names) - attention
    with edit.applied(model):
        assert model.fingerprint() != before
    assert model.fingerprint() == before


@pytest.mark.parametrize("method", ["ft-wd", "unke", "crispedit", "lora", "grace"])
def test_a_method_of_single_maps_refuses_experts(method):
    with pytest.raises(kt.KtError, match=r"mlp\.2 of .* is a mixture of experts"):
        kt.edit(tiny_model("mixtral"), [FACT], method=method, layers=[2], check=False)


@pytest.mark.parametrize("name", ["jamba", "lfm2"])
def test_a_block_with_a_convolution_is_trained_whole(name):
    model = tiny_model(name)
    before = model.fingerprint()
    edit = kt.edit(model, [FACT], method="ft-wd", layers=[2], num_steps=2, check=False)
    assert any(len(update.shape) == 3 for update in edit.updates.values())
    with edit.applied(model):
        assert model.fingerprint() != before
    assert model.fingerprint() == before


def test_core_edits_the_last_layer(tmp_path):
    assert solved(tiny_model("llama"), tmp_path, method="core").names  # above which there is no stream
