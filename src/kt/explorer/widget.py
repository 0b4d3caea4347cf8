"""The explorer as a widget of Jupyter, Colab, VS Code and marimo, through anywidget."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.kinds import A_RUN, takes
from ..errors import need
from ..report.html import page_style
from .live import Live
from .page import ASSETS, bundle

if TYPE_CHECKING:
    from anywidget import AnyWidget

    from ..model.model import TracedModel

ROOT = ".kt-root"


@takes(runs=A_RUN)
def widget(model: TracedModel, runs: str | Path | Sequence[str | Path] = (), **options: Any) -> AnyWidget:
    """The fact explorer with a model behind it: type a prompt, trace it, apply an edit and take it back.

        kt.widget(kt.load("demo"), ["runs/edit"])      # the last line of a notebook's cell

    The edits stand in `model` itself while they are applied, so other cells see them; `widget.live.revert()` takes them
    out to the byte.

    Args:
        model: unedited.
        runs: run folders whose facts are shown, and whose edits can be applied.
        options: of `kt.edit`, for each edit that is solved here; `samples` of `kt.causal_trace`.

    Returns:
        The widget, with `live` behind it.

    Raises:
        KtError: anywidget is not installed.
        BadFile: a run's file is not the result that its name says.
    """
    kind = _kind()
    return kind(model, runs, **options)


def script() -> str:
    """The page's modules as one that exports `render`; each view has modules of its own, with a state of its own."""
    render = "export default { render: (given) => kt().render(given) };"
    return f"function kt() {{\n{bundle('widget')}\nreturn kt_widget;\n}}\n{render}\n"


def style() -> str:
    """The page's style, for a root that is not the document's."""
    return page_style(ROOT) + (ASSETS / "explorer.css").read_text(encoding="utf-8")


@cache
def _kind() -> type[AnyWidget]:
    """The class, made when it is first needed: anywidget is an extra."""
    need("anywidget", "kt.widget")
    import anywidget
    import traitlets

    class Explorer(anywidget.AnyWidget):
        _esm = script()
        style = traitlets.Unicode(style()).tag(sync=True)
        data = traitlets.Unicode().tag(sync=True)
        edits: Any = traitlets.List().tag(sync=True)
        status = traitlets.Dict().tag(sync=True)
        methods: Any = traitlets.List().tag(sync=True)
        view = traitlets.Unicode().tag(sync=True)

        def __init__(self, model: Any, runs: Any, **options: Any) -> None:
            super().__init__()
            self.live = Live(model, runs, **options)
            for name in self.live.state:
                self.take(name)
            self.live.changed = self.take
            self.on_msg(lambda _, message, buffers: self.live.act(message))

        def take(self, name: str) -> None:
            """Show what the model's side has."""
            setattr(self, name, self.live.state[name])

    return Explorer
