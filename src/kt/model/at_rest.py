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
from nnsight.tracing.backend import Backend
from torch import Tensor, nn

from ..errors import KtError


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


_FORWARDS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # type: ignore[type-arg]


@contextmanager
def one_forward(module: nn.Module) -> Iterator[None]:
    """One thread at a time runs a module: nnsight keeps what a trace reads in the model, where a second thread's would
    be taken for it. The others wait, as they do for one processor; a forward waits for nothing but its own numbers.
    """
    with _LOCK:
        lock = _FORWARDS.setdefault(module, threading.RLock())
    with lock:
        yield


class _OneAtATime(Backend):
    """Runs a trace by `inner` while no other thread runs its module."""

    def __init__(self, inner: Backend, model: TransformersModel) -> None:
        self.inner, self.model = inner, model

    def __call__(self, tracer: Any) -> None:
        with one_forward(self.model._module):
            try:
                self.inner(tracer)
            except Exception as error:
                refuse_new_parts(self.model, error)
                raise


def refuse_new_parts(model: TransformersModel, error: Exception) -> None:
    """Say that a forward failed because the module has other parts than it was loaded with. (Asked only then.)

    Raises:
        KtError: it has.
    """
    known = model.interleaver.envoys
    strange = next((path for path, part in model._module.named_modules() if id(part) not in known), None)
    if strange is not None:
        raise KtError(
            f"the module was changed after kt.load ({strange} is new in it); load it again with kt.load(module, "
            "tokenizer=tokenizer), or take out what was put in"
        ) from error


class SharedModel(TransformersModel):
    """nnsight's model of a module that several threads may read."""

    def trace(self, *given: Any, backend: Backend | None = None, remote: bool | str = False, **named: Any) -> Any:
        """A trace that runs while no other thread runs the module; a remote one, elsewhere, is nnsight's own."""
        here = backend if remote else _OneAtATime(backend or Backend(), self)
        return super().trace(*given, backend=here, remote=remote, **named)

    def interleave(self, *given: Any, **named: Any) -> Any:
        """Every forward of a trace and of a generation goes through here."""
        with one_forward(self._module):
            return super().interleave(*given, **named)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What travels to NDIF, or to its simulation, is nnsight's own class."""
        _, _, *state = super().__reduce_ex__(protocol)
        return (object.__new__, (TransformersModel,), *state)


class RestingModel(SharedModel):
    """nnsight's model of a module that somebody else may train."""

    def interleave(self, *given: Any, **named: Any) -> Any:
        with at_rest(self._module):
            return super().interleave(*given, **named)


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
