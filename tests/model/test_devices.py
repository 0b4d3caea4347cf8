"""A model in parts, on a device, in CPU memory that accelerate keeps, or in files, is the plain model to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import byte_level_tokenizer, tiny_module

import kt
from kt.cli import main
from kt.editing import EditSession
from kt.errors import KtError, UnknownSite
from kt.model.devices import read_device_map
from kt.model.sites import Kind, Site
from kt.model.update import LowRank

FAMILIES = ("llama", "gpt2")
FACTS = [
    kt.Fact(template="The capital of {} is", subject=s, answer="Rome", target="Paris", foil="Seattle", id=s)
    for s in ("Italy", "Brunmar")
]
PROMPTS = ["The Space Needle is in the city of", "Paris"]
SITES = [Site(kind, layer) for kind in Kind for layer in range(3)]


def saved(tmp_path: Path, family: str) -> Path:
    folder = tmp_path / family
    tiny_module(family).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def in_files(plain) -> dict[str, str]:
    """Every part on the CPU but the middle block, which stays in the checkpoint's files."""
    blocks = plain.layout.blocks
    parent = blocks.rpartition(".")[0]
    children = [f"{parent}.{name}" for name, _ in plain.module.get_submodule(parent).named_children()]
    parts = dict.fromkeys([c for c in children if c != blocks] + ["lm_head"], "cpu")
    return parts | {f"{blocks}.{i}": "disk" if i == 1 else "cpu" for i in range(3)}


def kept_in_memory(family: str):
    """A model whose middle block has nothing on its device: accelerate keeps it in CPU memory."""
    from accelerate import cpu_offload

    module = tiny_module(family)
    blocks = "transformer.h" if family == "gpt2" else "model.layers"
    cpu_offload(module.get_submodule(f"{blocks}.1"), execution_device=torch.device("cpu"))
    module.hf_device_map = {"": "cpu"}  # as from_pretrained notes it
    return kt.load(module, tokenizer=byte_level_tokenizer())


@pytest.fixture(params=[(family, where) for family in FAMILIES for where in ("files", "memory")], ids="-".join)
def pair(request, tmp_path):
    """The plain model, and the one whose middle block is in files, or in CPU memory."""
    family, where = request.param
    if where == "files":
        folder = saved(tmp_path, family)
        plain = kt.load(folder, device="cpu")
        spread = kt.load(folder, device_map=in_files(plain))
    else:
        plain = kt.load(tiny_module(family), tokenizer=byte_level_tokenizer())
        spread = kept_in_memory(family)
    assert any(p.is_meta for p in spread.module.parameters())
    return plain, spread


def contents_of(folder: Path) -> dict[Path, bytes]:
    """The checkpoint's files, which offloaded weights are read from: nothing may be written there."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def traced(model):
    trace = kt.causal_trace(model, FACTS, kinds=("mlp", "attn", "hidden"), samples=2, keep="all")
    return [v for fact in trace.facts for by_metric in fact.patched.values() for v in by_metric.values()]


@pytest.mark.filterwarnings("ignore:traced all the same")
def test_reading_tracing_and_probing_are_those_of_the_plain_model(pair):
    plain, spread = pair
    batch = plain.encode(PROMPTS)
    assert spread.device == torch.device("cpu")
    assert torch.equal(plain.logits(batch), spread.logits(batch))
    wanted, found = plain.read(batch, SITES), spread.read(batch, SITES)
    assert all(torch.equal(wanted[site], found[site]) for site in SITES)
    for mine, theirs in zip(traced(plain), traced(spread), strict=True):
        assert np.array_equal(mine, theirs)
    probed = [kt.contrast_probe(model, FACTS).to_dataframe() for model in (plain, spread)]
    assert probed[0].equals(probed[1])


def test_evaluation_statistics_and_generation_are_those_of_the_plain_model(pair):
    plain, spread = pair
    scores = [kt.evaluate(model, FACTS).to_dataframe() for model in (plain, spread)]
    assert scores[0].equals(scores[1])
    assert plain.generate(PROMPTS, 5) == spread.generate(PROMPTS, 5)


def test_the_fingerprint_is_that_of_the_plain_model_and_moves_no_weight(pair):
    plain, spread = pair
    before = [p.is_meta for p in spread.module.parameters()]
    assert spread.fingerprint() == plain.fingerprint()
    assert spread.fingerprint([SITES[3], SITES[7]]) == plain.fingerprint([SITES[3], SITES[7]])
    assert [p.is_meta for p in spread.module.parameters()] == before


def test_an_offloaded_weight_is_written_and_put_back_to_the_byte(pair, tmp_path):
    plain, spread = pair
    files = contents_of(tmp_path)
    batch, generator = plain.encode(PROMPTS), torch.Generator().manual_seed(0)
    for site in (Site(Kind.ATTN, 1), Site(Kind.MLP, 1)):
        before = plain.fingerprint()
        shape = plain.d_model, plain.key_size(site)
        update = LowRank(torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator))
        with pytest.raises(RuntimeError, match="inside"), plain.restored([site]), spread.restored([site]):
            plain.write(site, update)
            spread.write(site, update)
            assert spread.fingerprint() == plain.fingerprint() != before
            assert torch.equal(spread.logits(batch), plain.logits(batch))
            raise RuntimeError("inside")
        assert spread.fingerprint() == plain.fingerprint() == before
        assert torch.equal(spread.logits(batch), plain.logits(batch))
    assert contents_of(tmp_path) == files


@pytest.mark.parametrize("method", ["memit", "rome", "alphaedit", "intattn", "ft", "lora"])
@pytest.mark.filterwarnings("ignore:only .* of the wanted change")
def test_edits_are_those_of_the_plain_model_and_come_out_again(pair, method, tmp_path):
    if method == "lora":
        pytest.importorskip("peft")
    before, files = pair[0].fingerprint(), contents_of(tmp_path)
    steps = {} if method in ("ft", "lora") else {"v_num_grad_steps": 2}
    layers = {"layers_mlp": [1, 2], "layers_attn": [1], "alpha": 0.3} if method == "intattn" else {"layers": [1]}
    found = []
    for model in pair:
        edit = kt.edit(model, FACTS, method=method, **layers, **steps)
        with edit.applied(model):
            found.append((edit.digest, model.fingerprint()))
        assert model.fingerprint() == before
    assert found[0] == found[1]
    assert found[0][1] != before
    assert contents_of(tmp_path) == files


def test_only_the_written_module_leaves_the_offload():
    spread = kept_in_memory("gpt2")
    spread.own(spread.weight_name(Site(Kind.MLP, 1)))
    here = {name for name, p in spread.module.get_submodule("transformer.h.1").named_parameters() if not p.is_meta}
    assert here == {"mlp.c_proj.weight", "mlp.c_proj.bias"}


def test_a_weight_that_does_not_fit_is_refused_before_anything_is_solved(pair, monkeypatch):
    _, spread = pair
    monkeypatch.setattr("kt.model.devices.free_on", lambda device: 100)
    monkeypatch.setattr(EditSession, "_context", lambda *_: pytest.fail("it came to solving"))
    with pytest.raises(KtError, match=r"offloaded.*needs.*device_map") as caught:
        kt.edit(spread, FACTS, method="memit", layers=[1])
    assert "\n" not in str(caught.value)


def test_a_tied_or_contentless_weight_is_refused():
    model = kept_in_memory("gpt2")
    model.module.get_submodule("transformer.h.1.ln_1")._hf_hook.tied_params_names.add("weight")
    with pytest.raises(KtError, match="tied"):
        model.own("transformer.h.1.ln_1.weight")
    model.module.get_submodule("transformer.h.1.ln_2")._hf_hook.weights_map = None
    with pytest.raises(KtError, match="no content"):
        model.fingerprint()
    with pytest.raises(UnknownSite, match="no weight"):
        model.own("nothing.weight")


def test_an_offloaded_embedding_is_refused_as_nnsight_would_send_inputs_nowhere():
    from accelerate import cpu_offload

    module = cpu_offload(tiny_module("llama"), execution_device=torch.device("cpu"))
    module.hf_device_map = {"": "cpu"}
    with pytest.raises(KtError, match=r"embed_tokens.*keep it on a device") as caught:
        kt.load(module, tokenizer=byte_level_tokenizer())
    assert "\n" not in str(caught.value)


def test_what_would_move_offloaded_weights_itself_is_refused():
    from kt.model.devices import require_none

    with pytest.raises(KtError, match="peft needs all weights on a device, and 12 are offloaded"):
        require_none(kept_in_memory("gpt2").module, "peft")
    require_none(tiny_module("gpt2"), "peft")


@pytest.mark.parametrize("way", ["auto", "balanced", "sequential"])
def test_the_ways_of_spreading_load_the_same_weights(way):
    assert kt.load("demo", device_map=way).fingerprint() == kt.load("demo", device="cpu").fingerprint()


BAD = {
    "nonsense": "unknown",
    "missing.json": "cannot read",
    "broken.json": "no JSON",
    "list.json": "module path",
    "odd.json": "module path",
    "gpu.json": "no CUDA device|finds",
    "disk.json": "nothing on a device",
}


@pytest.fixture
def maps(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "odd.json").write_text('{"model": [1]}')
    (tmp_path / "gpu.json").write_text('{"": 77}')
    (tmp_path / "disk.json").write_text('{"": "disk"}')
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_a_bad_device_map_is_one_line_and_exit_code_2(maps, name, capsys):
    given = name if name == "nonsense" else str(maps / name)
    assert main(["heatmap", "--device-map", given, "--limit", "1", "--out", str(maps / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not (maps / "run").exists()
    with pytest.raises(KtError, match=BAD[name]):
        read_device_map(given)


def test_a_device_map_may_come_from_a_file(tmp_path, capsys):
    folder = saved(tmp_path, "llama")
    plain = kt.load(folder, device="cpu")
    file = tmp_path / "map.json"
    file.write_text(json.dumps(in_files(plain)))
    out = tmp_path / "run"
    fact = ["--prompt", "The capital of {} is", "--subject", "Italy", "--answer", "Rome", "--target", "Paris"]
    assert main(["probe", "-m", str(folder), "--device-map", str(file), *fact, "--out", str(out), "--quiet"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"]["fingerprint"] == plain.fingerprint()


def test_peft_never_sees_a_model_whose_files_it_would_rewrite(tmp_path):
    """peft renames offloaded weights inside the checkpoint's own files."""
    pytest.importorskip("peft")
    from kt.export import to_hf, to_peft

    folder = saved(tmp_path, "llama")
    plain = kt.load(folder, device="cpu")
    spread = kt.load(folder, device_map=in_files(plain))
    edit = kt.edit(plain, FACTS[:1], method="memit", layers=(0,), statistics=_identity(tmp_path, plain))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KtError, match="offloaded"):
        to_peft(spread, edit, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    to_hf(spread, edit, tmp_path / "merged")
    to_hf(plain, edit, tmp_path / "merged-plain")
    names = [f.name for f in (tmp_path / "merged").glob("*.safetensors")]
    assert names and all(
        (tmp_path / "merged" / n).read_bytes() == (tmp_path / "merged-plain" / n).read_bytes() for n in names
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def _identity(tmp_path: Path, model) -> Path:
    from safetensors.torch import save_file

    names = {model.weight_name(Site(Kind.MLP, layer)).removesuffix(".weight"): layer for layer in range(3)}
    size = model.key_size(Site(Kind.MLP, 0))
    save_file({name: torch.eye(size) for name in names}, tmp_path / "moments.safetensors")
    return tmp_path / "moments.safetensors"
