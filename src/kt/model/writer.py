"""One thread at a time writes a model's weights.

Writing keeps bytes, writes, and puts the bytes back. Where two threads do so at once, the second keeps the first's edit
for the base, and the base is lost. The second is refused rather than left waiting: it would wait for a block whose
length nobody knows, for ever where that block waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident

from torch import Tensor, nn

from ..errors import KtError

_guard = Lock()
_holders: dict[int, list[int]] = {}
"""By module and by memory of weights, so that two handles on one module, and tied weights, count as one: the thread
of each open block. It holds nothing between blocks."""


@contextmanager
def sole_writer(module: nn.Module, name: str) -> Iterator[None]:
    """Hold a module's weights for this thread, which may nest such blocks.

    Raises:
        KtError: another thread holds them, or weights that are tied to them.
    """
    here, keys = get_ident(), {id(module), *map(_memory, module.parameters())}
    held: list[int] = []
    try:
        with _guard:
            if any(here not in _holders.get(key, (here,)) for key in keys):
                raise KtError(
                    f"another thread is writing the weights of {name} (or weights tied to them), and the base's bytes "
                    "would be lost; use one model a thread, or one thread after the other"
                )
            for key in keys:
                _holders.setdefault(key, []).append(here)
                held.append(key)
        yield
    finally:
        with _guard:  # by the thread that came in, whichever leaves
            for key in held:
                _holders[key].remove(here)
                if not _holders[key]:
                    del _holders[key]


def _memory(weight: Tensor) -> int:
    return weight.untyped_storage().data_ptr() or id(weight)  # offloaded and empty ones have no address
