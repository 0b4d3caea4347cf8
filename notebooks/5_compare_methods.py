# %% [markdown]
# # Compare methods
#
# Several methods, the same facts, the same questions. A difference between two methods is paired by fact; `=` stands where it is not
# told apart from zero.

# %%
import os

import kt
from kt.experiments import distinct
from kt.experiments.methods_table import Place, methods_table

model = kt.load(os.environ.get("KT_MODEL", "demo"))
facts = distinct(kt.load_facts(os.environ.get("KT_FACTS", "demo"), limit=20))[:6]
methods = {"memit": {"method": "memit"}, "ft": {"method": "ft"}, "ice": {"method": "ice"}}
table = methods_table(model, facts, methods, [Place("batch", 6)], against=("memit",), fluency=0)
table

# %% [markdown]
# `ice` leaves the weights alone: it puts the new fact before the question. On the command line:
# `kt run methods --only memit,ft,ice`, which also edits one fact at a time, and hundreds in steps.

# %%
[(row.series, row.seconds["solve"]) for row in table.rows]
