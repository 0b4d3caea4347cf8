"""Experts, second mixers and layers of other mixers in traces: patched as they are, nothing where they are not."""

import numpy as np
import pytest
import torch
from families import HYBRIDS, MIXTURES, tiny_model

import kt
from kt.errors import BadFact, KtError, UnknownSite
from kt.model.sites import Site
from kt.tracing.patches import labels

FACT = kt.Fact("The {} is in the city of", "Space Needle", answer="Paris", foil="Rome")
pytestmark = pytest.mark.filterwarnings("ignore")


def traced(model, kinds, **changes):
    return kt.causal_trace(model, [FACT], kinds=kinds, samples=2, keep="all", **changes).facts[0]


@pytest.mark.parametrize("family", MIXTURES)
def test_an_experts_patch_puts_back_what_it_adds(family):
    """Against a plain hook: what the expert adds in the clean run takes the place of what it adds in the corrupted."""
    model = tiny_model(family)
    layer, noise = 1, torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3))
    fact = traced(model, ("experts", "mlp"), noise=[noise.expand(2, -1, -1)])
    ids = torch.tensor([model.tokenizer(FACT.prompt)["input_ids"]])
    token, span = fact.span.last, slice(fact.span.start, fact.span.last + 1)
    every = [Site(f"mlp.experts.{number}", layer) for number in range(model.layout.at(layer).mixture.count)]
    sent = model.read(model.encode([FACT.prompt]), every, "value")
    expert, site = next((n, site) for n, site in enumerate(every) if sent[site][0, token].any())

    def corrupt(_module, _inputs, output):
        output = output.clone()
        output[0, span] += noise[0]
        return output

    clean = model.read(model.encode([FACT.prompt]), [site], "value")[site][0, token]
    handle = model.embedding.register_forward_hook(corrupt)
    try:
        corrupted = model.read(model.encode([FACT.prompt]), [site], "value")[site][0, token]

        def patch(_module, _inputs, output):
            whole = output[0] if isinstance(output, tuple) else output
            rows = whole.view(-1, whole.shape[-1])
            rows[token] += clean - corrupted
            return output

        block = model.layout.at(layer)
        module = model.module.get_submodule(f"{model.layout.blocks}.{layer}.{block.mlp}")
        inner = module.register_forward_hook(patch)
        with torch.no_grad():
            logits = model.module(input_ids=ids, use_cache=False).logits[0, -1].float()
        inner.remove()
    finally:
        handle.remove()
    assert (clean - corrupted).norm() > 0
    wanted = float(logits.softmax(-1)[fact.answer_ids[0]])
    assert fact.patched[f"mlp.e{expert}"]["prob"][layer, token, 0] == pytest.approx(wanted, rel=2e-5)


def test_all_experts_are_named_by_their_labels():
    model = tiny_model("deepseek_v3")
    assert labels(model, ("experts",)) == ("mlp.e0", "mlp.e1", "mlp.e2", "mlp.e3", "mlp.s0")
    fact = traced(model, ("experts",))
    for kind in fact.patched:  # the first block is dense: there no expert can be patched
        assert np.allclose(fact.patched[kind]["prob"][0], fact.corrupted["prob"], rtol=1e-5)
    assert any(np.ptp(fact.patched[kind]["prob"][1:]) > 0 for kind in fact.patched)


def test_what_a_model_lacks_is_refused_in_one_line():
    dense, mixed = tiny_model("llama"), tiny_model("mixtral")
    with pytest.raises(UnknownSite, match="has no mixture of experts; trace mlp"):
        traced(dense, ("experts",))
    with pytest.raises(UnknownSite, match=r"no layer of .* has mlp.e7; it has mlp.e0, .*mlp.e3"):
        traced(mixed, ("mlp.e7",))
    with pytest.raises(UnknownSite, match=r"no layer of .* has attn.second; trace mlp, attn or hidden"):
        traced(mixed, ("attn.second",))
    with pytest.raises(BadFact, match="experts are patched, not estimated"):
        traced(mixed, ("mlp.e0",), method="atp")
    with pytest.raises(KtError, match="knowledge neurons are those of dense MLPs"):
        kt.knowledge_neurons(mixed, [FACT])


@pytest.mark.parametrize("family", HYBRIDS)
def test_heads_and_parts_are_patched_where_they_are(family):
    model = tiny_model(family)
    fact = traced(model, ("attn", "mlp", "hidden", "heads"))
    for kind, values in fact.patched.items():
        for layer, mixer in enumerate(model.layout.mixers):
            parts = model.layout.at(layer)
            there = parts.mlp if kind == "mlp" else mixer == "attention" if ".h" in kind else mixer or kind == "hidden"
            # At some token: behind the last attention a subject's state no longer reaches the prompt's last token.
            moved = np.abs(values["logit_diff"][layer] - fact.corrupted["logit_diff"]).max()
            assert there or moved < 1e-5, (kind, layer)
            if there and ".h" not in kind:
                assert moved > 1e-5, (kind, layer)


def test_two_mixers_of_one_block_are_patched_apart():
    fact = traced(tiny_model("falcon_h1"), ("attn", "attn.second"))
    one, other = (fact.patched[kind]["logit_diff"] for kind in ("attn", "attn.second"))
    assert not np.allclose(one, other) and np.abs(other - fact.corrupted["logit_diff"]).max() > 0


@pytest.mark.parametrize("family", ["mixtral", "lfm2", "nemotron_h"])
def test_estimates_and_probes_read_them_too(family):
    model = tiny_model(family)
    estimate = kt.causal_trace(model, [FACT], samples=1, keep="all", method="atp")
    assert np.isfinite(estimate.facts[0].patched["mlp"]["logit_diff"]).all()
    probe = kt.contrast_probe(model, [FACT])
    assert probe.n_layers == model.n_layers


FACTS = [
    FACT,
    kt.Fact("The mother tongue of {} is", "Danielle Darrieux", answer="French", foil="Italian"),
    kt.Fact("{} lived in the city of", "Marie Curie", answer="Paris", foil="Rome"),
]


def test_alpha_is_cut_by_what_mixes_tokens(tmp_path):
    trace = kt.causal_trace(tiny_model("jamba"), FACTS, samples=2, keep="all")
    assert trace.other_mixers == {"state space": (0, 2)}
    balance = kt.balance_factor(trace)
    parts = {part.mixer: part.layers for part in balance.by_mixer}
    assert parts == {"attention": (1,), "state space": (0, 2)}
    assert sum(part.share for part in balance.by_mixer) == pytest.approx(balance.alpha_raw)
    assert kt.Balance.load(balance.save(tmp_path / "balance.json")).by_mixer == balance.by_mixer
    rows = [row[0] for table in balance.tables() for row in table.rows]
    assert "of which state space (layers 0, 2)" in rows and "of which attention (layers 1)" in rows


def test_figures_mark_the_layers_of_other_mixers_and_show_experts_one_by_one():
    trace = kt.causal_trace(tiny_model("jamba"), FACTS, kinds=("mlp", "attn", "experts"), samples=2, keep="all")
    figure = trace.heatmaps()
    texts = " ".join(note.text for note in figure.layout.annotations)
    lines = [shape for shape in figure.layout.shapes if shape.type == "line" and shape.xref == "x2"]
    assert "state space in layers 0, 2" in str(figure.layout.title.text) and "▬ state space" in texts
    assert [(round(line.x0), round(line.x1)) for line in lines] == [(0, 0), (2, 2)]
    assert len([d for d in figure.data if d.name != "below zero"]) == 2  # experts have a figure of their own
    rows = trace.experts().layout.yaxis.ticktext
    assert list(rows) == ["expert 0", "expert 1", "expert 2", "expert 3"]
    assert [each.name for each in trace.figures(["logit_diff"])] == ["heatmap-logit-diff", "experts", "curves"]
    plain = kt.causal_trace(tiny_model("llama"), [FACT], samples=1, keep="all")
    assert plain.other_mixers == {} and "mixers" not in plain.metadata and not kt.balance_factor(plain).by_mixer


def test_the_command_line_names_every_kind_of_patch():
    from kt.cli import parse
    from kt.tracing.patches import KINDS

    assert {*parse.KINDS, "heads"} == set(KINDS)
    assert parse.names("mlp.e3,mlp.s0,attn.h2,experts", parse.KINDS, "--kind", parse.ONE_PART)[0] == "mlp.e3"
    for wrong in ("mlp.x3", "mlp.e", ""):
        with pytest.raises(KtError, match="is unknown; choose among"):
            parse.names(wrong, parse.KINDS, "--kind", parse.ONE_PART)
