# %% [markdown]
# # What an edit leaves
#
# The model gives the new answer. Is the old one gone? The residual check reads both answers through the layers before and after the
# edit, and attacks: texts before the prompt that may bring the old answer back.

# %%
import os

import kt

model = kt.load(os.environ.get("KT_MODEL", "demo"))
facts = kt.load_facts(os.environ.get("KT_FACTS", "demo"), limit=20)
requests = facts[:4]
edit = kt.edit(model, requests, method="memit")
residual = kt.residual_fact(model, edit, requests, pool=facts)
residual

# %% [markdown]
# The old answer's rank by layer, before and after:

# %%
residual.figures()[0].figure
