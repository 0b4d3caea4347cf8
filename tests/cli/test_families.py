"""Trace, edit and judge from the command line, on a saved folder of every family."""

from __future__ import annotations

import pytest
from families import byte_level_tokenizer, tiny_module

import kt as library


@pytest.mark.filterwarnings("ignore")
def test_heatmap_apply_edit_and_eval_on_a_saved_folder(kt, family, facts_file, corpus_file, tmp_path):
    folder = tmp_path / "model"
    tiny_module(family).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    shared = ("-m", folder, "-f", facts_file, "--limit", 2, "--json", "-")
    heat = kt("heatmap", *shared, "--keep", "all", "--samples", 2, "--kind", "mlp,attn")
    assert heat.code == 0, heat.err
    assert heat.json["n_facts"] == 2
    quick = "v_num_grad_steps=8,v_lr=0.3,clamp_norm_factor=20,mom2_update_weight=0.1"
    layers = ("--layers-mlp", "0-1", "--layers-attn", "0-1")
    edited = kt(
        "apply-edit", *shared, "--force", "--alpha", 0.3, *layers, "--set", quick,
        "--corpus", corpus_file, "-o", tmp_path / "run", "--merge-to", tmp_path / "merged",
    )  # fmt: skip
    assert edited.code == 0, edited.err
    assert len(edited.json["deltas"]) == 4 and len(edited.json["requests"]) == 2
    short = () if family == "llama" else ("--no-generate",)  # texts: once
    scored = kt("eval", *shared, *short, "--edit", edited.json["edit"])
    assert scored.code == 0, scored.err
    assert scored.json["metrics"]["edit_success_tf_token"]["n"] == 2
    merged, base = (library.load(str(tmp_path / name), device="cpu") for name in ("merged", "model"))
    with library.Edit.load(edited.json["edit"]).applied(base):
        assert merged.fingerprint() == base.fingerprint(), "the merged folder holds other weights than the applied edit"
