# %% [markdown]
# # Edit, judge, undo
#
# An edit is a file. It goes into a model and comes out again to the last bit.

# %%
import os
import tempfile
from pathlib import Path

import kt

model = kt.load(os.environ.get("KT_MODEL", "demo"))
requests = kt.load_facts(os.environ.get("KT_FACTS", "demo"), limit=5)
untouched = model.fingerprint()
edit = kt.edit(model, requests, method="memit")
print(edit.verdict)

# %% [markdown]
# Solving wrote nothing into the model. What it wants to write, per weight:

# %%
edit.sizes_figure()

# %% [markdown]
# ## Save and load

# %%
path = Path(tempfile.mkdtemp()) / "edit.safetensors"
edit.save(path)
again = kt.Edit.load(path)
again

# %% [markdown]
# ## Judge
#
# `success`: the new answer stands first. `paraphrase`: also where the question is worded otherwise. `neighbourhood`: other
# subjects answer as before.

# %%
before = kt.evaluate(model, requests, generate=False)
with again.applied(model):
    after = kt.evaluate(model, requests, before=before, generate=False)
after

# %% [markdown]
# ## Undo
#
# After the block the model holds its own bytes. For good: `again.apply_(model)`, and `again.revert_(model)` to undo it.

# %%
assert model.fingerprint() == untouched
again.apply_(model)
again.revert_(model)
assert model.fingerprint() == untouched
