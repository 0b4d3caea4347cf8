"""MEMIT-FE: every layer's target from one forward with the first layer's in place."""

import copy

import torch
from editing_help import REQUESTS
from one_layer import close
from several_layers import LAYERS, QUIET, edited, formula, only

from kt.editing.resolve import read_requests
from kt.model.tokens import template_span, token_ids

pytestmark = QUIET


def test_forward_replay_takes_each_layers_target_from_one_forward_with_the_first_layers_in_place(ready):
    model = ready[0]
    edit = edited(ready, "memit-fe")
    assert list(edit.targets) == ["hidden.0", "hidden.1", "hidden.2"] and len(edit.names) == 3
    close(edit.targets["hidden.0"], edited(ready, layers=(0,)).targets["hidden.0"], atol=1e-5, rtol=1e-5)
    module = copy.deepcopy(model.module).double()
    blocks = module.get_submodule(model.layout.blocks)
    for number, fact in enumerate(read_requests(model, REQUESTS)):
        last, seen = template_span(model.tokenizer, fact.template, fact.subject).last, {}

        def stream(layer, last=last, number=number, seen=seen):
            def hook(_, __, output):
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                if layer == 0:
                    hidden[0, last] = edit.targets["hidden.0"][number].double()
                seen[layer] = hidden[0, last]
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return hook

        handles = [block.register_forward_hook(stream(layer)) for layer, block in enumerate(blocks)]
        with torch.no_grad():
            module(torch.tensor([token_ids(model.tokenizer, fact.prompt)]))
        for handle in handles:
            handle.remove()
        for layer in LAYERS:
            close(edit.targets[f"hidden.{layer}"][number].double(), seen[layer], atol=1e-5, rtol=1e-4)
    parts = [only(edit, layer, model) for layer in LAYERS]
    with parts[0].applied(model), parts[1].applied(model):  # each layer the whole of what it still misses
        close(
            parts[2].delta(parts[2].names[0]).double(),
            formula(ready, 2, ("hidden.2", edit.targets["hidden.2"])),
            atol=1e-5,
            rtol=1e-4,
        )
