"""The gradient methods with no setting given: steps that follow the weights take ten facts, on both models.

`python -m pytest -m real tests/real/test_rates.py --log-cli-level=INFO` prints the numbers of docs/methods-measured.md.
"""

import logging

import pytest
from real_help import perplexity

import kt
from kt.editing.resolve import layers_by_depth

pytestmark = pytest.mark.real

HARM = {"ultraedit": 1.05, "ft": 1.2, "ft-l": 1.2}
"""How many times as large the perplexity may become. Ten facts of fine-tuning are not free of charge."""


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
@pytest.mark.parametrize("method", HARM)
def test_ten_facts_take_without_a_setting(request, facts, name, method):
    model = request.getfixturevalue(name)
    before, fluent = model.fingerprint(), perplexity(model)
    layers = {} if method == "ultraedit" else {"layers_mlp": layers_by_depth(model, "layers_mlp")}
    edit = kt.edit(model, facts[:10], method=method, **layers)
    with edit.applied(model):
        harm = perplexity(model) / fluent
    above = [each.target_prob[1] > each.answer_prob[1] for each in edit.report]
    first = [each.target_rank[1] == 0 for each in edit.report]
    logging.info(
        f"| {name} | {method} | {sum(above)} of 10 | {sum(first)} of 10 | {harm:.3f} |"
        f" {max(delta['relative_norm'] for delta in edit.deltas().values()):.3f} |"
    )
    assert sum(above) >= 9 and sum(first) >= (8 if method == "ultraedit" else 9)
    assert harm < HARM[method]
    assert all("lr" in chosen for chosen in edit.manifest["chosen"].values())
    assert model.fingerprint() == before
