"""An estimate is the derivative of patching, for every family; where the model is linear it is the patched run."""

import numpy as np
import pytest
import torch
from families import FAMILIES, byte_level_tokenizer, tiny_model, tiny_module
from tracing_help import FACTS, TOLERANCE, draws

import kt
from kt.errors import BadFact, WorkFailed
from kt.model.sites import Kind, Site
from kt.tracing import attribution
from kt.tracing import attribution as gradients
from kt.tracing.patches import Patch, heads, readout, unpadded_batch

pytestmark = pytest.mark.filterwarnings("ignore:traced all the same")

ALL = ("mlp", "attn", "hidden", "attn.h1")
METRICS = ("prob", "logit_diff")
STEP = 0.01
"""The share of the way from base to donor that a patch goes to measure the slope, each way."""

ROUNDING = 1e-4
"""Of a slope over such steps, in units of the score: float32 sums over three layers, divided by two steps."""


def estimated(model, facts, noise, kinds=ALL, **options):
    return kt.causal_trace(model, facts, kinds=kinds, noise=noise, keep="all", method="atp", **options)


def runs(fact, noise, direction):
    """The ids and embedding noise of a fact's base and donor rows, one row for each draw."""
    ids = torch.tensor([fact.ids]).expand(len(noise), -1)
    placed = torch.zeros(len(noise), len(fact.ids), noise.shape[-1])
    placed[:, slice(*fact.span)] = noise
    ends = ((ids, placed), (ids, torch.zeros_like(placed)))
    return ends if direction == "denoise" else ends[::-1]


@torch.no_grad()
def scores(model, fact, row, site=None, end="value", edit=None):
    """Both metrics and the value at a site of one run; `edit` changes that value in place."""
    ids, noise = row
    kept = []
    with model.nnsight.trace(**model.inputs(unpadded_batch(ids))):
        model.embed.output = model.embed.output + noise
        if site is not None:
            value = model.key(site, len(ids)) if end == "key" else model.value(site, len(ids))
            kept.append(value.clone().save())
            if edit is not None:
                edit(value)
        logits = model.last_logits()[:, -1].save()
    right, wrong = logits[:, fact.answer_id], logits[:, fact.foil_id]
    return torch.stack([(right - logits.logsumexp(-1)).exp(), right - wrong]), kept


def slope(model, fact, noise, direction, label, layer, token):
    """(metric, sample): how the scores change per unit of the way, measured by patching a hundredth of it."""
    patch, (base, donor) = Patch.parse(label), runs(fact, noise, direction)
    site, end = patch.source(layer)
    columns = slice(None)
    if patch.head is not None:
        width = heads(model)[1]
        columns = slice(patch.head * width, (patch.head + 1) * width)
    (mine,), (theirs,) = (scores(model, fact, row, site, end)[1] for row in (base, donor))
    way = (theirs - mine)[:, token, columns]

    def moved(share):
        def edit(value):
            value[:, token, columns] += share * way

        return scores(model, fact, base, site, end, edit)[0]

    return ((moved(STEP) - moved(-STEP)) / (2 * STEP)).numpy()


def sites(fact, n_layers):
    first, last = fact.span.last, len(fact.ids) - 1
    return [
        ("mlp", 0, first),
        ("attn", 0, first),
        ("hidden", 1, first),
        ("attn.h1", 1, last),
        ("mlp", n_layers - 1, last),
    ]


def assert_is_the_slope(model, direction):
    """In float32 the small steps of the reference would be lost in rounding, so it is taken in float64."""
    noise = draws(model, FACTS[:1])
    fact = estimated(model, FACTS[:1], noise, direction=direction).facts[0]
    model.module.double()
    base = runs(fact, noise[0], direction)[0]
    start = scores(model, fact, base)[0].numpy()
    steep = []
    for label, layer, token in sites(fact, model.n_layers):
        wanted = slope(model, fact, noise[0], direction, label, layer, token)
        for m, metric in enumerate(METRICS):
            gained = fact.patched[label][metric][layer, token] - start[m]
            size, rounding = np.abs(wanted[m]).max(), ROUNDING * np.abs(start[m]).max()
            assert np.abs(gained - wanted[m]).max() < 0.01 * size + rounding, (label, layer, token, metric)
            steep.append(size > 5 * rounding)
    assert sum(steep) >= 4, "most patches do next to nothing, so the test can hardly fail"


@pytest.mark.parametrize("family", FAMILIES)
def test_denoising_estimates_are_the_slope_of_patching(family):
    assert_is_the_slope(tiny_model(family), "denoise")


@pytest.mark.parametrize("family", ("gemma3_text", "gpt2", "gptj", "opt"))
def test_noising_estimates_are_the_slope_of_patching(family):
    assert_is_the_slope(tiny_model(family), "noise")


@pytest.mark.parametrize("direction", ("denoise", "noise"))
def test_where_the_rest_is_linear_the_estimate_is_the_patched_run(direction):
    """Without a final norm, the last block's MLP and output reach the logits by a linear map alone."""
    module = tiny_module("gpt2")
    module.transformer.ln_f = torch.nn.Identity()
    model = kt.load(module, tokenizer=byte_level_tokenizer())
    noise = draws(model, FACTS)
    guess = estimated(model, FACTS, noise, direction=direction)
    exact = kt.causal_trace(model, FACTS, kinds=ALL, noise=noise, keep="all", direction=direction)
    bent = []
    for a, b in zip(guess.facts, exact.facts, strict=True):
        for kind in ("mlp", "hidden"):
            ours, theirs = (f.patched[kind]["logit_diff"][-1, -1] for f in (a, b))
            assert np.abs(ours - theirs).max() < 10 * TOLERANCE
            base = b.corrupted["logit_diff"] if direction == "denoise" else b.clean["logit_diff"]
            assert np.abs(theirs - base).max() > 100 * TOLERANCE
        bent.append(np.abs(a.patched["mlp"]["logit_diff"][0] - b.patched["mlp"]["logit_diff"][0]).max())
    assert max(bent) > 50 * TOLERANCE, "the first block's estimates are the patched runs too: all is linear"


def test_the_heads_estimates_add_up_to_their_attentions(qwen2):
    """W_o is linear, so what its heads' columns move together is what its output moves; also with shared keys (GQA)."""
    noise = draws(qwen2, FACTS)
    for fact in estimated(qwen2, FACTS, noise, kinds=("attn", "heads")).facts:
        for metric in METRICS:
            base = fact.corrupted[metric]
            parts = sum(fact.patched[f"attn.h{h}"][metric] - base for h in range(heads(qwen2)[0]))
            whole_module = fact.patched["attn"][metric] - base
            assert np.abs(parts - whole_module).max() < TOLERANCE * max(1, np.abs(whole_module).max())
            assert np.abs(whole_module).max() > 1e-4


@pytest.mark.parametrize("reuse", (True, False))
@pytest.mark.parametrize("direction", ("denoise", "noise"))
def test_nothing_moves_left_of_the_corruption_or_beside_the_last_token_at_the_end(qwen2, direction, reuse):
    noise = draws(qwen2, FACTS[1:2])
    fact = estimated(qwen2, FACTS[1:2], noise, direction=direction, reuse_prefix=reuse).facts[0]
    for kind in ALL:
        for metric in METRICS:
            base = fact.corrupted[metric] if direction == "denoise" else np.float32(fact.clean[metric])
            patched = fact.patched[kind][metric]
            assert fact.span.start > 0
            assert np.array_equal(*np.broadcast_arrays(patched[:, : fact.span.start], base))
            assert np.array_equal(*np.broadcast_arrays(patched[-1, :-1], base))
            assert not np.array_equal(*np.broadcast_arrays(patched[-1, -1], base))


@pytest.mark.parametrize("direction", ("denoise", "noise"))
@pytest.mark.parametrize("family", ("qwen2", "gemma3_text", "gptj"))
def test_neither_batches_nor_the_shared_prefix_change_an_estimate(family, direction):
    model = tiny_model(family)
    noise = draws(model, FACTS, samples=3)
    together = estimated(model, FACTS, noise, direction=direction)
    small = estimated(model, FACTS, noise, direction=direction, max_rows=7)
    entire = estimated(model, FACTS, noise, direction=direction, reuse_prefix=False)
    alone = [estimated(model, [f], [n], direction=direction).facts[0] for f, n in zip(FACTS, noise, strict=True)]
    for i, fact in enumerate(together.facts):
        for other in (small.facts[i], entire.facts[i]):
            for kind in ALL:
                for metric in METRICS:
                    assert np.abs(fact.patched[kind][metric] - other.patched[kind][metric]).max() < 5 * TOLERANCE
        assert fact.prompt == alone[i].prompt
        # A fact alone has no other answer of its relation for a foil: only p(r) is about the same tokens.
        assert np.abs(fact.patched["mlp"]["prob"] - alone[i].patched["mlp"]["prob"]).max() < TOLERANCE


@pytest.mark.parametrize("direction", ("denoise", "noise"))
def test_facts_of_one_group_keep_their_own_prefixes(qwen2, direction):
    templates = ("The city of {} is", "The city in {} is")
    facts = [kt.Fact(template, "Paris", answer="Rome", foil="Italy") for template in templates]
    noise = draws(qwen2, facts)
    shared, apart = (
        estimated(qwen2, facts, noise, direction=direction, reuse_prefix=reuse).facts for reuse in (True, False)
    )
    assert len(shared[0].ids) == len(shared[1].ids) and shared[0].span == shared[1].span
    for a, b in zip(shared, apart, strict=True):
        assert a.span.start > 1 and a.ids[: a.span.start] != shared[a.index - 1].ids[: a.span.start]
        for kind in ALL:
            assert np.abs(a.patched[kind]["logit_diff"] - b.patched[kind]["logit_diff"]).max() < 5 * TOLERANCE


def test_differences_left_of_the_corruption_are_rounding_and_count_for_nothing():
    source = Patch.parse("mlp").source(0)
    ones, zeros = ({source: value(1, 4, 2)} for value in (torch.ones, torch.zeros))
    base = gradients.Slopes(torch.zeros(2, 1), zeros, {source: torch.ones(2, 1, 4, 2)})
    row = torch.tensor([0])
    moved = attribution._moved(base, base._replace(values=ones), row, row, torch.tensor([2]))
    assert moved[source][0, 0].sum(-1).tolist() == [0, 0, 2, 2]


def test_the_shared_prefix_is_used(qwen2, monkeypatch):
    seen = []
    real = gradients._arguments
    monkeypatch.setattr(gradients, "_arguments", lambda *given: seen.append(real(*given)) or seen[-1])
    fact = estimated(qwen2, FACTS[1:2], draws(qwen2, FACTS[1:2])).facts[0]
    assert fact.span.start > 0
    for arguments in seen:
        assert arguments["input_ids"].shape[1] == len(fact.ids) - fact.span.start
        assert arguments["position_ids"][0, 0] == fact.span.start
    assert [len(arguments["input_ids"]) for arguments in seen] == [1, 2], "the clean row, then both draws"


def test_a_window_adds_up_its_layers_modules_and_averages_their_residual_streams(qwen2):
    noise = draws(qwen2, FACTS[:1])
    one, three = (estimated(qwen2, FACTS[:1], noise, window=w).facts[0] for w in (1, 3))
    for metric in METRICS:
        base = one.corrupted[metric]
        for kind in ("mlp", "attn", "attn.h1"):
            gained = one.patched[kind][metric] - base
            assert np.allclose(three.patched[kind][metric][1] - base, gained.sum(0), atol=TOLERANCE)
            assert np.allclose(three.patched[kind][metric][0] - base, gained[:2].sum(0), atol=TOLERANCE)
        mean = one.patched["hidden"][metric][:2].mean(0)
        assert np.allclose(three.patched["hidden"][metric][0], mean, atol=TOLERANCE)


def test_swapped_subjects_are_estimated_over_the_exact_run(gpt2):
    facts = [
        kt.Fact("The {} is", name, answer=f" {name[0]}", foil="of") for name in ("French", "France", "Italy", "Paris")
    ]
    guess, exact = (
        kt.causal_trace(gpt2, facts, kinds=("mlp",), corrupt="swap", keep="all", method=method)
        for method in ("atp", "exact")
    )
    assert guess.n_facts == exact.n_facts > 1
    for a, b in zip(guess.facts, exact.facts, strict=True):
        assert a.swapped_for == b.swapped_for is not None
        assert np.allclose(a.corrupted["logit_diff"], b.corrupted["logit_diff"], atol=TOLERANCE)
        assert np.abs(a.patched["mlp"]["logit_diff"] - a.corrupted["logit_diff"]).max() > 10 * TOLERANCE


def test_where_memory_runs_out_the_rows_are_halved(qwen2, monkeypatch):
    noise = draws(qwen2, FACTS, samples=3)
    plenty = estimated(qwen2, FACTS, noise)
    real, refused = gradients.run_from, []

    def scarce(model, prompts, *rest, graded):
        if graded and len(prompts.ids) > 2:
            refused.append(len(prompts.ids))
            raise torch.OutOfMemoryError("no")
        return real(model, prompts, *rest, graded=graded)

    monkeypatch.setattr(gradients, "run_from", scarce)
    for a, b in zip(plenty.facts, estimated(qwen2, FACTS, noise).facts, strict=True):
        assert np.allclose(a.patched["attn"]["logit_diff"], b.patched["attn"]["logit_diff"], atol=TOLERANCE)
    assert refused


def test_memory_for_not_even_one_row_is_an_error(qwen2, monkeypatch):
    def none(*_, graded):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(gradients, "run_from", none)
    rows = gradients.Prompts(torch.zeros(1, 3), None, *(torch.zeros(1, dtype=torch.long),) * 3)
    with pytest.raises(torch.OutOfMemoryError):
        gradients.slopes(qwen2, rows, gradients.Shared(), [])


def test_severed_modules_have_no_gradient_to_speak_of(qwen2, facts):
    with pytest.raises(BadFact, match=r"hidden-no-mlp.*method='exact'"):
        kt.causal_trace(qwen2, facts, kinds=("hidden-no-mlp",), keep="all", method="atp")


def test_a_model_without_gradients_says_so(qwen2, facts, monkeypatch):
    real = attribution.slopes
    monkeypatch.setattr(gradients, "readout", lambda *a: readout(*a).detach())
    with pytest.raises(WorkFailed, match="cannot be differentiated"):
        estimated(qwen2, facts, draws(qwen2, facts))
    assert attribution.slopes is real


def test_estimates_leave_no_graph_and_no_gradients_behind(qwen2, facts):
    trace = estimated(qwen2, facts, draws(qwen2, facts))
    assert trace.n_facts == len(facts)
    assert all(not p.requires_grad and p.grad is None for p in qwen2.module.parameters())
    read = qwen2.read(unpadded_batch(torch.tensor([[5, 6, 7]])), [Site(Kind.MLP, 0)])
    assert not next(iter(read.values())).requires_grad
