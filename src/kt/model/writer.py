"""One thread at a time writes a model's weights.

Writing keeps bytes, writes, and puts the bytes back. Where two threads do so at once, the second keeps the first's edit
for the base, and the base is lost. The second is refused rather than left waiting: it would wait for a block whose
length nobody knows, for ever where that block waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, get_ident
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..errors import KtError
from .effects import Effect, without
from .packed import parts

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


@dataclass(eq=False)
class Kept:
    """What an open block of `restored` puts back: weights' bytes by name, and the effects that the model had."""

    copies: dict[str, Tensor | nn.Module]
    effects: tuple[Effect, ...]


_open: WeakKeyDictionary[nn.Module, list[Kept]] = WeakKeyDictionary()


def open_blocks(module: nn.Module) -> list[Kept]:
    """The blocks that have begun and not ended, in the order of their beginning."""
    return _open.setdefault(module, [])


def for_good(blocks: Sequence[Kept], added: Sequence[Effect], gone: Sequence[Effect]) -> None:
    """Effects that came, or went, for good while these blocks were open: what they put back has them, or has not."""
    for block in blocks:
        block.effects = (*without(block.effects, gone), *added)


def leave(kept: Kept, identity: Callable[[str], Hashable], blocks: list[Kept], effects: Sequence[Effect]) -> list[str]:
    """End a block, also one inside which others go on (two tasks of one thread that take turns).

    A later block has kept this one's edit as what it found. It is given the bytes from before this one instead, so that
    the base comes back whichever block ends last; effects are taken out of both.

    Args:
        identity: a number of each weight by name, the same for tied ones.
        effects: the model's now.

    Returns:
        Names of weights that a later block has kept too: they hold this block's edit until that one ends.
    """
    at = blocks.index(kept)
    later = blocks[at + 1 :]
    del blocks[at]
    if not later:
        return []
    added = [each for each in later[0].effects if not any(each is old for old in kept.effects)]
    kept.effects = tuple(each for each in effects if not any(each is mine for mine in added))
    for block in later:
        block.effects = tuple(each for each in block.effects if not any(each is mine for mine in added))
    shared = []
    for name in list(kept.copies):
        heir = next(((b, n) for b in later for n in b.copies if identity(n) == identity(name)), None)
        if heir is not None:
            heir[0].copies[heir[1]] = kept.copies.pop(name)
            shared.append(name)
    return shared


def _memory(weight: Tensor) -> int:
    return next(parts(weight)).untyped_storage().data_ptr() or id(weight)  # offloaded and empty ones have no address
