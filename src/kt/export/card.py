"""The model card of a folder that goes to the Hugging Face Hub: README.md, its front matter as the Hub checks it.

What comes from facts, edit files and models is escaped: it shows as text, and is no link, image or HTML.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.text import count
from ..errors import DISTRIBUTION
from ..report import Column, Table
from ..report.table import shown

if TYPE_CHECKING:
    from ..editing import Edit
    from ..evaluation.scores import Comparison, Scores

CARD = "README.md"
MARK = "<!-- written by kt export -->"
"""Tells kt's card from one that its user, or another program, wrote."""
MOST_ROWS = 20
"""Facts and weights that the card names; it counts the others."""
WHAT = {"hf": "a merged model", "peft": "a PEFT adapter", "edit": "an edit file of kt"}
LIBRARY = {"hf": "transformers", "peft": "peft", "edit": "kt-interp"}
RELATION = {"hf": "finetune", "peft": "adapter", "edit": "adapter"}
ACTIVE = re.compile(r"([\\`*_\[\]!#~$:@]|(?<=www)\.)")
"""Marks that Markdown acts on. Table.markdown and `plain` escape the others."""


def card(
    edit: Edit,
    format: str,
    repo: str,
    base: str,
    scores: Scores | Comparison | None = None,
    undo: bool = True,
    revision: str | None = None,
) -> str:
    """The card's text, Markdown behind a YAML front matter.

    Args:
        edit: what was exported.
        format: "hf", "peft" or "edit".
        repo: OWNER/NAME on the Hub.
        base: the base model, a Hub id or the last part of a folder's name.
        scores: those of the run that the edit is of.
        undo: whether a merged folder holds the bytes from before.
        revision: of the base model.
    """
    parts = [
        f"---\n{front_matter(edit, format, base)}\n---\n{MARK}\n",
        f"# {repo.partition('/')[2]}\n",
        f"{plain(base)} with {count(len(edit.requests), 'fact')} changed by the method {plain(_method(edit))}, as "
        f"{WHAT[format]}. Written by kt (`pip install {DISTRIBUTION}`).\n",
        "The new answers below were written into the model on purpose, true or not. Do not take its word for them.\n",
        "## Facts\n\n" + facts(edit).markdown() + _more(len(edit.requests), "in the edit file"),
        "## Scores\n\n" + measured(edit, scores),
        "## Load\n\n" + load(format, repo, base, revision),
        "## Undo\n\n" + back(format, repo, f"{base}@{revision}" if revision else base, undo),
        "## Edit\n\n" + weights(edit).markdown() + _more(len(edit.names), "in all"),
        "## Licence\n\nNot chosen. The base model's licence holds for what is made of it: set `license:` in the front "
        "matter above accordingly, before you publish.",
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def front_matter(edit: Edit, format: str, base: str) -> str:
    """What the Hub files a model under. A base that is no Hub id is left out: the Hub would refuse a folder's name."""
    from huggingface_hub import ModelCardData

    data: dict[str, Any] = {
        "library_name": LIBRARY[format],
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-editing", "model-editing", _method(edit), "kt-interp"],
    }
    if "/" in base:
        data |= {"base_model": base, "base_model_relation": RELATION[format]}
    return str(ModelCardData(**data).to_yaml())


def plain(text: Any) -> str:
    """Foreign text in a line of Markdown: one line of at most 160 characters, nothing of it acts."""
    return _inactive(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")


def _inactive(text: Any) -> str:
    return ACTIVE.sub(r"\\\1", str(shown("" if text is None else str(text))))


def facts(edit: Edit) -> Table:
    """The first requests: prompt, old answer, new one."""
    columns = [Column(name, _inactive) for name in ("prompt", "before", "after")]
    rows = []
    for request in edit.requests[:MOST_ROWS]:
        old, new = ((request.get(key) or {}).get("str", "–") for key in ("target_true", "target_new"))
        rows.append([str(request.get("prompt", "")).replace("{}", str(request.get("subject", ""))), old, new])
    return Table(columns, rows)


def weights(edit: Edit) -> Table:
    """The first weights that it writes, and how far it moves them."""
    columns: list[Column | str] = [Column("weight", _inactive), "shape", "rank", "‖ΔW‖ / ‖W‖"]
    rows = [
        [name, "×".join(map(str, row["shape"])), row["rank"], row["relative_norm"]]
        for name, row in list(edit.deltas().items())[:MOST_ROWS]
    ]
    return Table(columns, rows)


def measured(edit: Edit, scores: Scores | Comparison | None) -> str:
    """The verdict of the solve, and the run's scores with n, intervals and protocol."""
    said = [] if edit.verdict is None else [f"After solving: {plain(edit.verdict)}."]
    if scores is None:
        return "\n\n".join([*said, "Not scored; `kt eval --edit` does it."])
    table, protocol, *_ = scores.tables()
    means = "Means over n records with 95% bootstrap intervals; what each name means is below."
    lines = [f"- {plain(name)}: {_long(says)}" for name, says in protocol.rows]
    folded = "<details><summary>Protocol</summary>\n\n" + "\n".join(lines) + "\n\n</details>"
    return "\n\n".join([*said, means, table.markdown(), folded])


def _long(text: str) -> str:
    return " ".join(plain(word) for word in text.split())


def load(format: str, repo: str, base: str, revision: str | None = None) -> str:
    """The lines that load it with kt, transformers and peft."""
    named = _quoted(repo if format == "hf" else base)
    more = f", revision={_quoted(revision)}" if revision and format != "hf" else ""
    transformers = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({named}{more})
model = AutoModelForCausalLM.from_pretrained({named}, dtype="auto"{more})
"""
    if format == "hf":
        return _python(transformers) + "\n\n" + _python(f"import kt\n\nmodel = kt.load({named})")
    if format == "peft":
        return _python(
            f"from peft import PeftModel\n{transformers}model = PeftModel.from_pretrained(model, {_quoted(repo)})"
        )
    return _python(
        "import kt\nfrom huggingface_hub import hf_hub_download\n\n"
        f"model = kt.load({named}{more})\n"
        f'edit = kt.Edit.load(hf_hub_download({_quoted(repo)}, "edit.safetensors"))\n'
        "with edit.applied(model):\n    ...  # here the model is edited"
    )


def back(format: str, repo: str, base: str, undo: bool) -> str:
    """How to have the model from before."""
    if format == "edit":
        return "The base model is edited inside the `with` block alone; its exact bytes are back behind it."
    if format == "peft":
        return _python("with model.disable_adapter():\n    ...  # the base model\nmodel = model.unload()  # for good")
    name = repo.partition("/")[2]
    more = "" if undo else f" --base {_quoted(base)}"
    where = "the folder" if undo else "the base model"
    return (
        f"```sh\nhf download {repo} --local-dir {name}\nkt revert {name}{more}\n```\n\n"
        f"The exact bytes from before come from {where}; each weight's SHA-256 is checked."
    )


def _quoted(text: str) -> str:
    """A Python and shell string of a name, which may be any folder's."""
    return json.dumps(re.sub(r"[`$\n]", "", text))


def _python(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


def _method(edit: Edit) -> str:
    return str(edit.manifest.get("method") or "unknown")


def _more(n: int, where: str) -> str:
    return f"\n\n{n - MOST_ROWS} more {where}." if n > MOST_ROWS else ""


def is_ours(path: Path) -> bool:
    """Whether a file is a card that kt wrote."""
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")
