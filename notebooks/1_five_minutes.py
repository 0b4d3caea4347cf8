# %% [markdown]
# # Five minutes with kt
#
# Where does a language model keep a fact, and how is the fact rewritten there? This notebook runs the whole loop once: trace,
# edit, judge. It takes the small model that comes with kt; set `KT_MODEL` to a folder or a Hub id for another one, and
# `KT_FACTS` to a file of your own facts.

# %%
import os

import kt

model = kt.load(os.environ.get("KT_MODEL", "demo"))
facts = kt.load_facts(os.environ.get("KT_FACTS", "demo"), limit=12)
model

# %% [markdown]
# A fact is a prompt about a subject, with the answer that the model gives now, and another answer to contrast it with.

# %%
facts[0]

# %% [markdown]
# ## Trace
#
# Noise on the subject's embeddings destroys the answer. Then one output at a time, of an MLP or of attention at one layer and token,
# is put back to what it was. Where much of the answer returns, the fact passes.

# %%
trace = kt.causal_trace(model, facts, kinds=("mlp", "attn"), samples=3)
trace.heatmap("mlp")

# %% [markdown]
# The balance factor α is attention's share of the effect at the subject's last token. Its interval says how sure that is.

# %%
balance = kt.balance_factor(trace)
balance

# %% [markdown]
# ## Edit
#
# MEMIT writes the new answers into the MLP of a few layers. Each fact's `foil` is its new answer where it has no `target`.
# The verdict says in words what came of it.

# %%
requests = facts[:5]
edit = kt.edit(model, requests, method="memit")
print(edit.verdict)
edit

# %% [markdown]
# ## Judge
#
# The edit is in the model inside the `with` block and out again after it, to the exact bytes.

# %%
before = kt.evaluate(model, requests, generate=False)
with edit.applied(model):
    after = kt.evaluate(model, requests, before=before, generate=False)
after
