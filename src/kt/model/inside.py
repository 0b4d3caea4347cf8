"""What a module gives, changed inside what nnsight reads: hooks that are part of the module's own forward.

nnsight puts a controller in the place of a module's `forward`; it hands the input to a trace, runs the forward that it
found there (the body), and hands the output to the trace. Hooks of torch run outside of it: a trace reads the output
from before them, and they overwrite what it writes. So the hooks here go around the body. They are given the input that
the body is given, which a trace may have changed; a module that a trace skips is not asked.

A plain forward runs the same body, so it has the same hooks. So does a deep copy of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]
"""(module, inputs, output) -> the output that the model goes on with, as a forward hook of torch."""
Body = Callable[..., Any]


class _Hooks:
    """Hooks of one module, in their order. No function, so that nnsight's `source` looks past it at the body."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = tuple(hooks)

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        for hook in self.hooks:
            output = hook(module, inputs, output)
        return output


def _around(body: Body, hooks: _Hooks) -> Body:
    def forward(module: nn.Module, *given: Any, **named: Any) -> Any:
        return hooks.after(module, given or tuple(named.values()), body(module, *given, **named))

    return forward


_CODE: CodeType = _around(nn.Module.forward, _Hooks(())).__code__


def _parts(body: Body) -> tuple[Body, tuple[Hook, ...]]:
    """A body without hooks, and the hooks that were around it. By code: nnsight's `source` builds the function anew."""
    if not isinstance(body, FunctionType) or body.__code__ is not _CODE:
        return body, ()
    cells = dict(zip(_CODE.co_freevars, body.__closure__ or (), strict=True))
    return cells["body"].cell_contents, cells["hooks"].cell_contents.hooks


def _state(module: nn.Module) -> Any:
    """nnsight's record of a module, which holds its body; None before it has one."""
    from nnsight.intervention.source import STATE

    return vars(module).get(STATE)


def hooks_of(module: nn.Module) -> tuple[Hook, ...]:
    """The hooks inside a module's forward."""
    state = _state(module)
    return () if state is None else _parts(state.original)[1]


def hook_inside(module: nn.Module, hooks: Sequence[Hook]) -> None:
    """Put hooks inside a module's forward, in the place of those before; without any it is as nnsight found it."""
    state = _state(module)
    for name in ("original", "body"):  # the second is the first, or what nnsight's `source` made of it
        body = _parts(getattr(state, name))[0]
        setattr(state, name, _around(body, _Hooks(hooks)) if hooks else body)


def set_hooks(root: nn.Module, hooks: Sequence[tuple[nn.Module, Hook]]) -> None:
    """Make these the only hooks inside the forwards of a model's modules."""
    by_module: dict[nn.Module, list[Hook]] = {}
    for module, hook in hooks:
        by_module.setdefault(module, []).append(hook)
    for module in root.modules():  # wherever they are: a packed map may have made way for a plain one since
        if module in by_module or hooks_of(module):
            hook_inside(module, by_module.get(module, []))


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Have the hooks of a module go with its place to another one."""
    hooks = hooks_of(old)
    if hooks:
        hook_inside(old, ())
    if hooks or hooks_of(new):
        hook_inside(new, hooks)
