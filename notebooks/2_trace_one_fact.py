# %% [markdown]
# # Trace one fact
#
# One prompt, layer by layer and token by token.

# %%
import os

import kt

model = kt.load(os.environ.get("KT_MODEL", "demo"))
fact = kt.load_facts(os.environ.get("KT_FACTS", "demo"), limit=1)[0]
fact

# %% [markdown]
# A fact of your own needs a prompt with `{}` for the subject, what the model answers, and a wrong answer of the same kind:
# `kt.Fact("The capital of {} is", "France", answer="Paris", foil="Rome")`.
#
# ## The map
#
# Each cell is one experiment: the subject's embeddings are noisy, and one output is restored. The value is the share of the
# logit difference between answer and foil that comes back; 1 is all of it.

# %%
trace = kt.causal_trace(model, [fact], kinds=("mlp", "attn"), samples=5)
trace.heatmap("mlp")

# %%
trace.heatmap("attn")

# %% [markdown]
# The numbers behind the figure are a table:

# %%
trace.to_dataframe().head()

# %% [markdown]
# ## Both answers through the layers
#
# The contrast probe reads the residual stream with the model's own head: at which layer does the answer overtake the foil?

# %%
probe = kt.contrast_probe(model, [fact])
probe.figure()
