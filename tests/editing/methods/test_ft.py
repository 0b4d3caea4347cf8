"""FT and its variants as configurations: which plan follows; the training itself is tested in test_fine_tune.py."""

import pytest

from kt.editing.adapter import Adapter
from kt.editing.fine_tune import FineTune
from kt.editing.methods import METHODS

PLANS = {
    "ft": FineTune((1,), lr="auto"),
    "ft-l": FineTune((1,), lr="auto", norm_constraint="auto"),
    "ft-wd": FineTune((1,), "block", "target_new", lr="auto", weight_decay=1e-3),
    "lora": FineTune((1,), "mlp", "target_new", num_steps=30, lr="auto", stop_loss=0.0, adapter=Adapter(8, 32.0, 0.0)),
}


@pytest.mark.parametrize("method", PLANS)
def test_the_plan_of_the_defaults(method):
    assert METHODS[method](layers_mlp=(1,)).plan() == PLANS[method]
