"""An edit as other tools load it, and the way back.

`to_hf` writes a merged Hugging Face folder, `to_peft` a LoRA adapter; `revert_folder` takes an edit out of a merged
folder again. Each is written whole or not at all, and checked before it has its name.
"""

from .adapter import to_peft
from .hf import Exported, carries, to_hf
from .undo import Reverted, revert_folder

__all__ = ["Exported", "Reverted", "carries", "revert_folder", "to_hf", "to_peft"]
