"""MALMEN (Tan, Zhang and Fu 2024, arXiv 2311.04661): a trained network's value shifts, joined by least squares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ...errors import KtError
from ..config import Config, linear_maps, method, setting

if TYPE_CHECKING:
    from ...model.model import TracedModel
    from ..hyper.editor import Learned


@method("malmen", "MALMEN: least squares over a trained network's shifts, one an answer token", place=16)
@dataclass(frozen=True)
class MALMEN(Config):
    """See kt.editing.hyper.malmen for the formulas; docs/train-editor.md for the training.

    Raises:
        KtError: the editor is of another method, or was trained for other layers than those given.
        BadFile: the editor's file cannot be read.
    """

    depth = (22, 27, 27)  # of a new editor: the authors' for GPT-J

    layers_mlp: tuple[int, ...] = setting((), source="the editor's file, which knows its layers")
    editor: str = setting("", about="the file of a trained editor, as kt train-editor writes it", source="kt's own")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.editor:
            return
        header = self._header()
        if header["method"] != self.name:
            raise KtError(f"{self.editor} is an editor of {header['method']}, not of {self.name}; give its method")
        layers = tuple(sorted({int(text.rpartition(".")[2]) for text in header["sites"]}))
        if self.layers_mlp not in ((), layers):
            shown = ",".join(map(str, layers))
            raise KtError(f"{self.editor} was trained for layers {shown}; leave the layers out, or train another")
        object.__setattr__(self, "layers_mlp", layers)

    def _header(self) -> Mapping[str, Any]:
        from ..hyper.editor import read_header

        return read_header(self.editor)

    def require(self, model: TracedModel) -> None:
        from ..hyper.editor import refuse_other_model

        if not self.editor:
            raise KtError(
                f"{self.name} needs an editor trained for this model: give editor=FILE, which kt train-editor makes"
            )
        refuse_other_model(self._header(), model, self.editor)

    def as_dict(self) -> dict[str, Any]:
        """As every method's; of the editor its name alone, for a file that is handed on names no folder."""
        return super().as_dict() | {"editor": PurePath(self.editor).name}

    def plan(self) -> Learned:
        from ..hyper.editor import Learned

        sites = (
            self._header()["sites"]
            if self.editor
            else [f"{m}.{i}" for i in self.layers_mlp for m in linear_maps("mlp")]
        )
        return Learned(self.name, self.editor, tuple(sites))
