"""What an export says of itself: `Exported`, and the `kt/` folder that travels with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import read_json, write_json
from ..environment import versions
from ..run_folder import FILES

if TYPE_CHECKING:
    from ..editing import Edit
    from ..model import TracedModel

OWN = "kt"
"""The folder, inside an exported one, of what is kt's own.

Not beside the weights: servers that load `*.safetensors` of a folder without an index would take the bytes from
before the edit for weights, and undo the edit without a word.
"""

EDIT = FILES["edit"]
UNDO = "undo.safetensors"
ABOUT = "export.json"


@dataclass(frozen=True)
class Exported:
    """`max_error` is the largest difference of a logit between what was written, as others load it, and the edited
    model; `relative_error` the same over the largest change that the edit makes. None: not checked.

    `weights` has a row per edited weight, `about` what else is to be told of this format.
    """

    path: Path
    format: str
    dtype: str
    max_error: float | None = None
    relative_error: float | None = None
    prompts: int = 0
    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "about"}
        return kept | {"path": str(self.path), **self.about}


def keep_about(folder: Path, model: TracedModel, edit: Edit, **about: Any) -> None:
    """Write `kt/export.json`: which edit of which model this is. No path of this machine is in it."""
    known = {
        "kind": "export",
        "edit": edit.digest,
        "model": public_name(model.name),
        "revision": model.revision,
        "versions": versions(),
    }
    write_json(folder / OWN / ABOUT, known | about)


def carries(folder: str | Path, edit: Edit) -> bool:
    """Whether a folder is a finished export of this very edit."""
    about = Path(folder) / OWN / ABOUT
    return about.is_file() and read_json(about).get("edit") == edit.digest


def public_name(name: str) -> str:
    """A model's name for files that are passed on: a Hub id as it is, of a local folder only its last part."""
    local = Path(name).is_absolute() or name.startswith(".") or Path(name).exists()
    return Path(name).resolve().name if local else name
