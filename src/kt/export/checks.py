"""What an export is held against before it gets its name: the edited model itself, on the requests' prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UnknownModel, WorkFailed
from ..facts.fact import fill
from ..memory import require_memory
from ..offloaded import content
from .shards import Shards, size_of

if TYPE_CHECKING:
    from ..editing import Edit
    from ..model import TracedModel

MOST_PROMPTS = 64
ROWS = 16
NEW_TOKENS = 8
SHOWN = 5


class Reloaded(NamedTuple):
    """What the folder says, loaded again: its continuations of the first prompts, and how far its logits are off."""

    max_error: float
    generated: tuple[dict[str, str], ...]


def prompts_of(edit: Edit) -> list[str]:
    """The requests' prompts, the first 64; an edit without requests is asked one word."""
    texts = [fill(str(r["prompt"]), str(r["subject"])) for r in edit.requests[:MOST_PROMPTS]]
    return texts or ["The"]


@torch.no_grad()
def next_logits(
    model: TracedModel, prompts: Sequence[str], forward: Callable[..., Any] | None = None
) -> Float[Tensor, "prompt vocab"]:
    """The logits after each prompt by a plain forward, without nnsight, as other programs make it; on the CPU."""
    run = forward or model.module
    found = []
    for start in range(0, len(prompts), ROWS):
        batch = model.encode(prompts[start : start + ROWS])
        found.append(run(**model.inputs(batch)).logits[:, -1].float().cpu())
    return torch.cat(found)


def check_files(model: TracedModel, folder: Path, names: Sequence[str]) -> None:
    """Compare the weights in the files with the model's own, byte for byte; one weight at a time is in memory.

    Raises:
        WorkFailed: a weight was written otherwise, or one of `names` is not in the files.
    """
    shards, state = Shards.open(folder), model.module.state_dict()
    absent = [name for name in names if name not in shards.files]
    if absent:
        raise WorkFailed(f"{folder}: {absent[0]} was saved under another name; this model cannot be exported as hf")
    for name in shards.files:
        held = shards.read(name)
        if name in state and not _same(held, content(model.module, name, state[name])):
            raise WorkFailed(f"{folder}: {name} was written with other bytes than the model has; export again")


def check_tokenizer(model: TracedModel, folder: Path, texts: Sequence[str]) -> None:
    """The folder's tokenizer, as `AutoTokenizer` makes it, gives the ids that the model's own gives.

    For some model types it makes a class of its own whatever was saved, and not every tokenizer survives that.
    """
    from transformers import AutoTokenizer

    try:
        again = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise WorkFailed(f"{folder}: the tokenizer does not load again ({_line(error)})") from error
    for text in texts:
        had, has = list(model.tokenizer(text)["input_ids"]), list(again(text)["input_ids"])
        if had != has:
            raise WorkFailed(
                f"{folder}: the tokenizer does not come back as it was: AutoTokenizer makes a {type(again).__name__} "
                f"that reads {text!r} as {has[:6]}..., not {had[:6]}...; save the model's own tokenizer files there"
            )


def check_reload(model: TracedModel, folder: Path, prompts: Sequence[str]) -> Reloaded:
    """Load the folder as others do and compare it with the model as it stands: all weights' bytes, logits to the bit.

    Raises:
        NotEnoughMemory: no room for the second copy.
        WorkFailed: the folder does not load, or is another model.
    """
    again = _load_again(model, folder)
    if again.fingerprint() != model.fingerprint():
        raise WorkFailed(f"{folder}: loaded again, it has other weights than the edited model; export again")
    here, there = next_logits(model, prompts), next_logits(again, prompts)
    if not torch.equal(here, there):
        gap = float((here - there).abs().max())
        raise WorkFailed(
            f"{folder}: loaded again, its logits differ from the edited model's by up to {gap:.2g}, though every "
            "weight is the same: the model in memory has settings or buffers that no file holds; cast it with --dtype, "
            "not after loading"
        )
    asked = list(prompts[:SHOWN])
    said = again.generate(asked, NEW_TOKENS)
    return Reloaded(0.0, tuple({"prompt": p, "continuation": c} for p, c in zip(asked, said, strict=True)))


def _load_again(model: TracedModel, folder: Path) -> TracedModel:
    from ..loading import load

    if model.device.type == "cpu":
        size = size_of(model.module.state_dict())
        require_memory(size, "loading the exported folder again, to compare it,", "leave the check out (--no-check)")
    config = model.module.config
    try:
        return load(
            str(folder),
            dtype=model.dtype,
            device=str(model.device),
            device_map=getattr(model.module, "hf_device_map", None),
            attn_implementation=getattr(config, "_attn_implementation", None),
        )
    except UnknownModel as error:
        raise WorkFailed(f"the exported folder does not load again: {error}") from error


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As bytes: NaN is not equal to itself, and 0 is equal to -0.
    flat = [t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
