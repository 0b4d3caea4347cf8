"""The lens against the model's own output, plain hooks, and a sort."""

from __future__ import annotations

from functools import lru_cache

import families
import numpy as np
import pytest
import torch
from families import CONFIGS, FAMILIES, tiny_model, tiny_module

import kt
from kt.errors import BadFact, UnknownSite, WorkFailed
from kt.model.layout import unwrap_tuple
from kt.model.sites import Kind, Site
from kt.model.tokens import encode_ids, token_ids
from kt.probing import lens
from kt.probing.lens import KINDS, POSITIONS, read_lens
from kt.probing.word_sets import SetTokens

# Tails with a scale of their own, beside those of FAMILIES (Gemma 2 has a soft-cap there).
SCALED = {
    "cohere": families.BASE | families.WIDE | families.GQA | dict(logit_scale=0.25),
    "granite": families.BASE | families.WIDE | families.GQA | dict(logits_scaling=4.0, embedding_multiplier=6.0),
}
TAILS = {
    "gemma2": lambda logits: 3 * torch.tanh(logits / 3),
    "cohere": lambda logits: 0.25 * logits,
    "granite": lambda logits: logits / 4,
}
PROMPTS = ("The Space Needle is in the city of", "Megan Rapinoe plays", "The mother tongue of Danielle Darrieux is")
SUBJECT_LAST = (3, 2, 8)
EVERY = (*FAMILIES, *SCALED)


@lru_cache(maxsize=1)
def built(family: str) -> kt.TracedModel:
    CONFIGS.setdefault(family, SCALED.get(family, {}))
    try:
        return tiny_model(family)
    finally:
        if family in SCALED:
            del CONFIGS[family]


@pytest.fixture(params=EVERY)
def model(request) -> kt.TracedModel:
    return built(request.param)


def rows_of(model: kt.TracedModel) -> list[list[int]]:
    return [token_ids(model.tokenizer, prompt) for prompt in PROMPTS]


def every_token(model: kt.TracedModel, n: int) -> np.ndarray:
    return np.tile(np.arange(model.vocab_size), (n, 1))


def alone(model: kt.TracedModel, row: list[int]) -> torch.Tensor:
    """The model's own distribution after one prompt that is not padded."""
    return model.logits(encode_ids([row], 0))[0, -1].softmax(-1)


def test_the_last_layer_is_the_model_s_own_output_also_in_padded_batches(model):
    rows = rows_of(model)
    assert len({len(row) for row in rows}) > 1
    reading = read_lens(model, rows, SUBJECT_LAST, every_token(model, len(rows)))
    last = reading.prob[:, POSITIONS.index("prediction"), KINDS.index("resid"), -1]
    for row, found in zip(rows, last, strict=True):
        np.testing.assert_allclose(found, alone(model, row).numpy(), atol=1e-6, rtol=1e-4)


def test_probabilities_sum_to_one_and_follow_the_rank_at_every_site(model):
    reading = read_lens(model, rows_of(model)[:1], SUBJECT_LAST[:1], every_token(model, 1))
    np.testing.assert_allclose(reading.prob.sum(-1), 1, atol=1e-4)
    best = np.take_along_axis(reading.rank, reading.prob.argmax(-1)[..., None], -1)
    assert (best == 0).all()


def test_attention_and_mlp_readings_are_the_projections_outputs_through_the_tail(model):
    rows, at = rows_of(model), (SUBJECT_LAST, [len(row) - 1 for row in rows_of(model)])
    tokens = np.array([[5, 7], [9, 11], [13, 4]])
    reading = read_lens(model, rows, SUBJECT_LAST, tokens)
    names = {"attn": Kind.ATTN, "mlp": Kind.MLP, "resid": Kind.RESID}
    for f, row in enumerate(rows):
        seen = hooked(model, row)
        for p in range(2):
            for k, kind in enumerate(KINDS):
                for layer in range(model.n_layers):
                    vector = seen[Site(names[kind], layer)][at[p][f]]
                    want = model.unembed(vector[None])[0].softmax(-1)[tokens[f]]
                    np.testing.assert_allclose(reading.prob[f, p, k, layer], want.numpy(), atol=1e-6, rtol=2e-4)


def hooked(model: kt.TracedModel, row: list[int]) -> dict[Site, torch.Tensor]:
    """Every module's output on one prompt, by plain forward hooks."""
    seen: dict[Site, torch.Tensor] = {}
    handles = []
    for layer in range(model.n_layers):
        for kind in Kind:
            site = Site(kind, layer)
            module = model.module.get_submodule(model.layout.path(kind, layer))

            def keep(_module, _inputs, output, site=site):
                seen[site] = unwrap_tuple(output).reshape(len(row), -1).clone()

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model.module(torch.tensor([row]))
    for handle in handles:
        handle.remove()
    return seen


def test_raw_readings_skip_the_norm_and_keep_the_rest_of_the_tail(model):
    rows = rows_of(model)[:1]
    raw = read_lens(model, rows, SUBJECT_LAST[:1], every_token(model, 1), final_norm=False)
    hidden = hooked(model, rows[0])[Site(Kind.RESID, 1)][-1]
    with torch.no_grad():
        logits = model.module.get_output_embeddings()(hidden)
    tail = TAILS.get(model.module.config.model_type, lambda x: x)
    place = (0, POSITIONS.index("prediction"), KINDS.index("resid"), 1)
    np.testing.assert_allclose(raw.prob[place], tail(logits).softmax(-1).numpy(), atol=1e-6, rtol=1e-4)
    normed = read_lens(model, rows, SUBJECT_LAST[:1], every_token(model, 1))
    assert np.abs(normed.prob[place] - raw.prob[place]).max() > 1e-4


def test_what_enters_block_0_is_read_too(model):
    row = rows_of(model)[0]
    seen = {}
    block = model.module.get_submodule(model.layout.path(Kind.RESID, 0))

    def keep(_module, inputs, kwargs):
        seen["in"] = (inputs[0] if inputs else kwargs["hidden_states"])[0].clone()

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model.module(torch.tensor([row]))
    handle.remove()
    reading = read_lens(model, [row], [3], np.array([[5]]))
    for p, at in enumerate((3, len(row) - 1)):
        logits = model.unembed(seen["in"][at][None])[0]
        assert reading.start_prob[0, p, 0] == pytest.approx(float(logits.softmax(-1)[5]), rel=1e-3)
        assert reading.start_rank[0, p, 0] == int((logits > logits[5]).sum())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen2"])
def test_bfloat16_agrees_with_the_model_s_own_output_to_its_rounding(family):
    model = kt.load(tiny_module(family).to(torch.bfloat16), tokenizer=families.byte_level_tokenizer())
    rows = rows_of(model)
    reading = read_lens(model, rows, SUBJECT_LAST, every_token(model, len(rows)))
    assert reading.prob.dtype == np.float32
    for row, found in zip(rows, reading.prob[:, 1, 0, -1], strict=True):
        np.testing.assert_allclose(found, alone(model, row).numpy(), rtol=0.1, atol=1e-4)


def test_ranks_are_those_of_a_sort_with_ties_counted_for_neither_side():
    logits = torch.randint(0, 20, (7, 384), generator=torch.Generator().manual_seed(0)).float()
    tokens = torch.randint(0, 384, (7, 5), generator=torch.Generator().manual_seed(1))
    prob, rank = lens._of_tokens(logits, logits.logsumexp(-1), tokens)
    own = logits.gather(1, tokens)
    falling = -logits.sort(-1, descending=True).values
    assert torch.equal(rank.long(), torch.searchsorted(falling.contiguous(), -own))
    torch.testing.assert_close(prob, logits.softmax(-1).gather(1, tokens))


def test_tokens_with_one_row_of_the_head_share_a_rank():
    module = tiny_module("llama")
    with torch.no_grad():
        module.get_output_embeddings().weight[100:200] = module.get_output_embeddings().weight[50]
    model = kt.load(module, tokenizer=families.byte_level_tokenizer())
    reading = read_lens(model, rows_of(model), SUBJECT_LAST, every_token(model, 3))
    tied = reading.rank[..., [50, *range(100, 200)]]
    assert (tied == tied[..., :1]).all() and (tied <= 384 - 101).all()


def test_results_depend_neither_on_batches_nor_on_room_for_logits(monkeypatch):
    model = built("gemma2")
    rows, tokens = rows_of(model), np.array([[5, 7], [9, 11], [13, 4]])
    whole = read_lens(model, rows, SUBJECT_LAST, tokens)
    single = read_lens(model, rows, SUBJECT_LAST, tokens, batch_size=1)
    monkeypatch.setitem(lens._MEMORY, "cpu", 4 * lens._COPIES * model.vocab_size * 5)
    narrow = read_lens(model, rows, SUBJECT_LAST, tokens)
    for other in (single, narrow):
        np.testing.assert_allclose(other.prob, whole.prob, rtol=1e-4, atol=1e-7)
        assert (other.rank != whole.rank).mean() < 0.02
        np.testing.assert_allclose(other.start_prob, whole.start_prob, rtol=1e-4, atol=1e-7)


def test_layers_come_in_the_order_asked_for_and_must_exist():
    model = built("gpt2")
    rows, tokens = rows_of(model), np.array([[5], [9], [13]])
    whole = read_lens(model, rows, SUBJECT_LAST, tokens)
    some = read_lens(model, rows, SUBJECT_LAST, tokens, layers=[2, 0])
    np.testing.assert_allclose(some.prob, whole.prob[:, :, :, [2, 0]], rtol=1e-5)
    with pytest.raises(UnknownSite, match="layers 0 to 2, not 3"):
        read_lens(model, rows, SUBJECT_LAST, tokens, layers=[3])
    with pytest.raises(UnknownSite, match="no layers"):
        read_lens(model, rows, SUBJECT_LAST, tokens, layers=[])


def test_a_token_that_is_not_there_has_no_reading():
    model = built("gpt2")
    reading = read_lens(model, rows_of(model), SUBJECT_LAST, np.array([[5, -1], [-1, 6], [7, 8]]))
    assert np.isnan(reading.prob[0, ..., 1]).all() and (reading.rank[0, ..., 1] == -1).all()
    assert np.isnan(reading.start_prob[1, :, 0]).all() and (reading.start_rank[1, :, 0] == -1).all()
    assert np.isfinite(reading.prob[2]).all() and (reading.rank[2] >= 0).all()


@pytest.mark.parametrize(
    ("subject_last", "tokens", "batch_size", "message"),
    [
        ((3, 99, 0), [[5], [6], [7]], "auto", "no token 99"),
        ((3, -1, 0), [[5], [6], [7]], "auto", "no token -1"),
        ((3, 1, 0), [[5], [384], [7]], "auto", "384 tokens"),
        ((3, 1, 0), [[5], [-2], [7]], "auto", "384 tokens"),
        ((3, 1, 0), [[5], [6]], "auto", "2 rows of tokens"),
        ((3, 1, 0), [[5], [6], [7]], 0, "batch size 0"),
    ],
)
def test_what_does_not_exist_is_refused(subject_last, tokens, batch_size, message):
    model = built("gpt2")
    with pytest.raises(BadFact, match=message):
        read_lens(model, rows_of(model), subject_last, np.array(tokens), batch_size=batch_size)


def test_numbers_that_are_not_finite_are_an_error():
    model = tiny_model("llama")
    with torch.no_grad():
        model.linear(Site(Kind.MLP, 1)).weight[0, 0] = torch.nan
    with pytest.raises(WorkFailed, match=r"prompt [0-2]: .*not finite"):
        read_lens(model, rows_of(model), SUBJECT_LAST, np.array([[5], [6], [7]]))


def test_sets_are_means_over_their_tokens_and_the_rest_is_every_other_token():
    model = built("llama")
    rows = rows_of(model)
    ids = [
        [np.array([4, 9, 30]), np.array([], np.int64)],
        [np.array([7]), np.array([8, 2])],
        [np.array([5]), np.array([6])],
    ]
    outside = [np.array([4, 9, 30, 50]), np.array([2, 7, 8]), np.array([], np.int64)]
    got = read_lens(model, rows, SUBJECT_LAST, every_token(model, 3), masks=SetTokens(ids, outside))
    assert got.sets is not None and got.sets.shape[-1] == 3
    for f in range(3):
        for s, some in enumerate(ids[f]):
            want = got.prob[f][..., some].mean(-1) if len(some) else np.full(got.sets.shape[1:-1], np.nan)
            np.testing.assert_allclose(got.sets[f, ..., s], want, rtol=1e-4)
        rest = np.setdiff1d(np.arange(model.vocab_size), outside[f])
        np.testing.assert_allclose(got.sets[f, ..., 2], got.prob[f][..., rest].mean(-1), rtol=1e-4)


def test_progress_ends_at_all_prompts():
    model, said = built("gpt2"), []
    read_lens(
        model, rows_of(model), SUBJECT_LAST, np.array([[5]] * 3), batch_size=2, progress=lambda *n: said.append(n)
    )
    assert said == [(2, 3), (3, 3)]


def test_the_weights_keep_their_bytes():
    model = built("gpt2")
    before = model.fingerprint()
    read_lens(model, rows_of(model), SUBJECT_LAST, np.array([[5]] * 3), final_norm=False)
    assert model.fingerprint() == before
