"""Edits in the formats of other tools, and back.

`to_hf` writes a merged Hugging Face folder, `to_peft` a LoRA adapter; `revert_folder` removes an edit from a merged
folder. Every folder is written atomically, and checked before it gets its name. `push` uploads one to the Hub, with
the card of `write_card`.
"""

from .adapter import to_peft
from .hf import Exported, carries, to_hf
from .hub import push, to_edit, write_card
from .undo import Reverted, revert_folder

__all__ = ["Exported", "Reverted", "carries", "push", "revert_folder", "to_edit", "to_hf", "to_peft", "write_card"]
