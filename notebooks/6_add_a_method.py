# %% [markdown]
# # Add a method
#
# A method is a class of settings and a plan. This one is MEMIT that writes half of the change, to see how much of an edit's success
# depends on its size.

# %%
import os
from dataclasses import dataclass

import kt
from kt.editing import closed_form as cf
from kt.editing.config import method, setting
from kt.editing.methods.memit import MEMIT
from kt.model.sites import Kind


@method("memit-half", "MEMIT, with a share of its change", place=99)
@dataclass(frozen=True)
class MEMITHalf(MEMIT):
    """MEMIT whose update is multiplied by `share`."""

    share: float = setting(0.5, source="this notebook", about="how much of the update is written")

    def plan(self) -> cf.LocateThenEdit:
        write = cf.Write(Kind.MLP, self.layers_mlp, self.target, self.solver, spread=self.spread_rule, scale=self.share)
        return cf.LocateThenEdit((write,), self.objective)


# %%
model = kt.load(os.environ.get("KT_MODEL", "demo"))
requests = kt.load_facts(os.environ.get("KT_FACTS", "demo"), limit=4)
whole = kt.edit(model, requests, method="memit")
layers = whole.manifest["hyper_parameters"]["layers_mlp"]  # what kt layers keeps for MEMIT is for MEMIT alone
half = kt.edit(model, requests, method="memit-half", layers_mlp=layers, check=False)
print(whole.verdict)
print(half.report[0])
{name: (d["norm"], half.deltas()[name]["norm"]) for name, d in whole.deltas().items()}

# %% [markdown]
# In kt itself a method is one file in `src/kt/editing/methods/` and its test; docs/add-a-method.md has the steps.
