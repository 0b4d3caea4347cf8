# %% [markdown]
# # Choose layers
#
# Which layers should an edit write? A trace proposes some, but the layer where a fact is recalled is not always the best one to
# edit (Hase et al. 2023). `kt.find_layers` therefore compares windows of layers by editing in them.

# %%
import os

import kt

model = kt.load(os.environ.get("KT_MODEL", "demo"))
facts = kt.load_facts(os.environ.get("KT_FACTS", "demo"), limit=40)
found = kt.find_layers(model, facts, method="memit", n_trace=8, n_edits=4, windows=3)
found

# %% [markdown]
# Every window was scored on the same facts: success, neighbours, perplexity of other text.

# %%
found.sweep

# %% [markdown]
# The choice is kept for this model: `kt.edit` without layers takes it. A preset file holds it with every other value, each with its
# source, for the command line (`--preset`).
