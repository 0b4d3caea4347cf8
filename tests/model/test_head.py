"""In a 16-bit model the head is read in float32, from the model's own states; otherwise it is the model's own."""

import pytest
import torch
from families import byte_level_tokenizer, tiny_module

import kt
from kt.model.head import is_widened, wide_linear
from kt.model.scoring import answer_row, teacher_force

PROMPTS = ["The Space Needle is in the city of", "Paris"]


def loaded(family, dtype):
    return kt.load(tiny_module(family).to(dtype), tokenizer=byte_level_tokenizer())


def at_head(model, text):
    """The head's input at the last token and the model's own logits, by a plain forward."""
    seen = []
    hook = model.module.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model.module(input_ids=model.encode([text]).ids).logits[0, -1]
    hook.remove()
    return seen[0][0, -1], logits


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gptj", "opt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_is_read_from_its_own_states_in_float32(family, dtype):
    model = loaded(family, dtype)
    head = model.module.get_output_embeddings()
    for text in PROMPTS:
        states, own = at_head(model, text)
        expected = states.double() @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
        if family == "gemma2":
            expected = 3.0 * torch.tanh(expected / 3.0)
        batch = model.encode([text])
        read = model.logits(batch)[0, 0]
        assert read.dtype == torch.float32
        torch.testing.assert_close(read.double(), expected, atol=2e-6, rtol=2e-6)
        # the states are the plain forward's to the bit: rounded, the logits are its own
        assert (read - own.float()).abs().max() <= 4 * torch.finfo(dtype).eps * own.abs().max()
        with torch.no_grad(), model.nnsight.trace(**model.inputs(batch)):
            seen = model.envoy(model.layout.unembed).input[0, -1].clone().save()
            traced = model.last_logits().save()
        assert torch.equal(seen, states) and torch.equal(traced[0, 0], read)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_models_keep_their_own_head(family, dtype):
    model = loaded(family, dtype)
    _, own = at_head(model, PROMPTS[0])
    assert not is_widened(model.module.get_output_embeddings())
    torch.testing.assert_close(model.logits(model.encode(PROMPTS[:1]))[0, 0], own.float(), atol=1e-6, rtol=1e-6)


def test_lens_trace_and_scores_agree_beyond_the_steps_of_bfloat16():
    model = loaded("qwen2", torch.bfloat16)
    with torch.no_grad():
        model.module.get_output_embeddings().weight *= 16  # logits that bfloat16 rounds to steps of 1/8
    logits = model.logits(model.encode(PROMPTS[:1]))[0, 0]
    assert logits.abs().max() > 16 and len(set(logits.tolist())) > 380
    assert len(set(at_head(model, PROMPTS[0])[1].tolist())) < 330
    row = answer_row(model, (PROMPTS[0], "Paris"))
    at = row.target[0]
    scored = teacher_force(model, [row])[row.question]
    assert scored.token_log_probs[0] == pytest.approx(float(logits.log_softmax(-1)[at]), abs=1e-5)
    fact = kt.Fact("The {} is in the city of", "Space Needle", answer="Paris", foil="Rome")
    probe = kt.contrast_probe(model, [fact])
    assert probe.reading.prob[0, 1, 0, -1, 0] == pytest.approx(float(logits.softmax(-1)[at]), rel=1e-4)
    trace = kt.causal_trace(model, [fact], samples=2, keep="all", window=1)
    foil = answer_row(model, (PROMPTS[0], "Rome")).target[0]
    assert trace.facts[0].ld_clean == pytest.approx(float(logits[at] - logits[foil]), abs=1e-4)


def test_a_large_head_is_multiplied_in_parts_and_has_the_gradient_of_the_whole():
    torch.manual_seed(0)
    head = torch.nn.Linear(96, 30_000, dtype=torch.bfloat16).requires_grad_(False)
    states = torch.randn(2, 3, 96, requires_grad=True)
    logits = wide_linear(head, states)
    expected = states @ head.weight.float().T + head.bias.float()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(logits)
    (found,) = torch.autograd.grad((logits * weights).sum(), states)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), states)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)


def test_a_head_that_is_trained_is_the_models_own():
    head = torch.nn.Linear(8, 16, dtype=torch.bfloat16)
    assert not is_widened(head) and is_widened(head.requires_grad_(False))
