"""A caller's module, at rest (evaluation mode, no gradients for its weights) only while kt works with it.

The caller may train it before, between and after: its flags are set for the time of a forward of kt's, and of what
trains or wraps it, and then are as they were. A module that kt loaded itself is at rest for good.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from nnsight import TransformersModel
from torch import Tensor, nn


@dataclass
class _Flags:
    """How often a module is in use, and what to give back after: modules that trained, tensors that took gradients."""

    depth: int = 0
    training: list[nn.Module] = field(default_factory=list)
    graded: list[Tensor] = field(default_factory=list)


_LOCK = threading.RLock()
_IN_USE: WeakKeyDictionary[nn.Module, _Flags] = WeakKeyDictionary()
"""By module, not by handle: two handles and two threads may use one module at a time."""


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode and without gradients inside the block; as it was after the outermost one."""
    with _LOCK:
        flags = _IN_USE.setdefault(module, _Flags())
        flags.depth += 1
        if flags.depth == 1:
            _rest(module, flags)
    try:
        yield
    finally:
        with _LOCK:
            flags.depth -= 1
            if flags.depth == 0:
                del _IN_USE[module]
                for each in flags.training:
                    each.training = True
                for tensor in flags.graded:
                    tensor.requires_grad_()


def _rest(module: nn.Module, flags: _Flags) -> None:
    # A walk of its own: `modules()` and `parameters()` take milliseconds on a model of hundreds, at every forward.
    waiting: list[Any] = [module]
    while waiting:
        each = waiting.pop()
        if each.training:
            flags.training.append(each)
            each.training = False
        for tensor in each._parameters.values():
            if tensor is not None and tensor.requires_grad:
                flags.graded.append(tensor)
                tensor.requires_grad_(False)
        waiting += [child for child in each._modules.values() if child is not None]


class RestingModel(TransformersModel):
    """nnsight's model of a module that somebody else may train."""

    def interleave(self, *given: Any, **named: Any) -> Any:
        """Every forward of a trace and of a generation goes through here."""
        with at_rest(self._module):
            return super().interleave(*given, **named)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What travels to NDIF, or to its simulation, is nnsight's own class."""
        _, _, *state = super().__reduce_ex__(protocol)
        return (object.__new__, (TransformersModel,), *state)


@contextmanager
def padding_kept(tokenizer: Any) -> Iterator[None]:
    """nnsight gives a tokenizer a padding token and side; they are as they were after the block."""
    before = {name: getattr(tokenizer, name, None) for name in ("pad_token", "padding_side")}
    try:
        yield
    finally:
        for name, value in before.items():
            if getattr(tokenizer, name, None) != value:
                setattr(tokenizer, name, value)
