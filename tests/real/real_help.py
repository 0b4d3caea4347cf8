"""Measurements on real weights that need no part of kt beside the model itself."""

import numpy as np
import torch

import kt
from kt.model.tokens import template_span

TEXT = (
    "The river rises in the hills and runs through a wide valley to the sea. For most of the year it is quiet, but in "
    "spring, when the snow melts, it can flood the fields on both sides. The people who live there have built their "
    "houses on higher ground, and every family keeps a small boat. In the nineteenth century a railway was built "
    "along the valley, and with it came the first factories. Most of them are closed today, and the old buildings "
    "are used as schools, offices and museums."
)


@torch.no_grad()
def first_probability(model, prompt, answer):
    """The probability of the answer's first token, and the most likely token, by a plain forward."""
    odds = model.module(**model.tokenizer(prompt, return_tensors="pt")).logits[0, -1].float().softmax(-1)
    wanted = model.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"][0]
    return float(odds[wanted]), int(odds.argmax()) == wanted


@torch.no_grad()
def perplexity(model):
    """Of a paragraph that no edit is about."""
    batch = model.tokenizer(TEXT, return_tensors="pt")
    return float(model.module(**batch, labels=batch["input_ids"]).loss.exp())


def assert_trace_equals_plain_hooks(model, fact, modules, tolerance):
    """Every layer and token of both kinds against PyTorch's own hooks, one forward a cell.

    Args:
        modules: kind -> what in a block adds that kind's output to the residual stream.
    """
    span, embedding = template_span(model.tokenizer, fact.template, fact.subject), model.module.get_input_embeddings()
    draws = torch.randn(
        1, span.stop - span.start, embedding.weight.shape[1], generator=torch.Generator().manual_seed(0)
    )
    noise = 3 * float(embedding.weight.std()) * draws
    traced = kt.causal_trace(model, [fact], kinds=tuple(modules), noise=[noise], keep="all").facts[0]
    for kind, name in modules.items():
        plain = hooked_trace(model.module, traced, noise, name)
        for metric, expected in plain.items():
            ours = traced.patched[kind][metric][..., 0]
            assert ours.shape == expected.shape and np.isfinite(ours).all()
            assert np.abs(ours - expected).max() < tolerance, (kind, metric)
        assert np.ptp(plain["logit_diff"]) > 0.1, "nothing was patched"


@torch.no_grad()
def hooked_trace(module, traced, noise, name):
    """metric -> (layer, token): the corrupted run with that module's clean output put back in one cell."""
    blocks, ids = module.model.layers, torch.tensor([list(traced.ids)])
    places = [block.get_submodule(name) for block in blocks]

    def corrupt(_, __, output):
        output = output.clone()
        output[:, traced.span[0] : traced.span[1]] += noise
        return output

    clean = []
    hooks = [place.register_forward_hook(lambda _, __, out: clean.append(first(out).clone())) for place in places]
    module(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = {metric: np.zeros((len(blocks), ids.shape[1])) for metric in ("prob", "logit_diff")}
    embedding = module.get_input_embeddings().register_forward_hook(corrupt)
    for layer, place in enumerate(places):
        for token in range(ids.shape[1]):

            def restore(_, __, output, layer=layer, token=token):
                first(output)[:, token] = clean[layer][:, token]

            hook = place.register_forward_hook(restore)
            logits = module(ids, use_cache=False).logits[0, -1].float()
            hook.remove()
            found["prob"][layer, token] = logits.softmax(-1)[traced.answer_id]
            found["logit_diff"][layer, token] = logits[traced.answer_id] - logits[traced.foil_id]
    embedding.remove()
    return found


def first(output):
    """The tensor of a module's output; attention gives its weights beside it."""
    return output[0] if isinstance(output, tuple) else output
