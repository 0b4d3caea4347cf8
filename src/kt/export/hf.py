"""An edit merged into its model: a Hugging Face folder like the one that the model came in.

The folder holds what `save_pretrained` writes (weights in as many files as the source's, config, generation config,
tokenizer), and in `kt/` the edit, the touched weights' bytes from before it, and which is which (see undo.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .._util.data import read_json, save_arrays, write_json
from ..errors import UnknownModel, WorkFailed
from ..facts.fact import fill
from ..model.devices import content
from ..model.load import no_bars
from ..model.memory import require_memory
from ..runs.folder import FILES
from ..runs.provenance import versions
from .shards import Shards, Source, refuse_full, refuse_taken, shard_size, size_of, source_of, whole_folder

if TYPE_CHECKING:
    from ..editing import Edit
    from ..model.model import TracedModel


# What an export says of itself: `Exported`, and the `kt/` folder that travels with it.

OWN = "kt"
"""The folder, inside an exported one, of what is kt's own.

Not beside the weights: servers that load `*.safetensors` of a folder without an index would take the bytes from
before the edit for weights, and undo the edit without a word.
"""

EDIT = FILES["edit"]
UNDO = "undo.safetensors"
ABOUT = "export.json"


@dataclass(frozen=True)
class Exported:
    """`max_error` is the largest difference of a logit between what was written, as others load it, and the edited
    model; `relative_error` the same over the largest change that the edit makes. None: not checked.

    `weights` has a row per edited weight, `about` what else is to be told of this format.
    """

    path: Path
    format: str
    dtype: str
    max_error: float | None = None
    relative_error: float | None = None
    prompts: int = 0
    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "about"}
        return kept | {"path": str(self.path), **self.about}


def keep_about(folder: Path, model: TracedModel, edit: Edit, **about: Any) -> None:
    """Write `kt/export.json`: which edit of which model this is. No path of this machine is in it."""
    known = {
        "kind": "export",
        "edit": edit.digest,
        "model": public_name(model.name),
        "revision": model.revision,
        "versions": versions(),
    }
    write_json(folder / OWN / ABOUT, known | about)


def carries(folder: str | Path, edit: Edit) -> bool:
    """Whether a folder is a finished export of this very edit."""
    about = Path(folder) / OWN / ABOUT
    return about.is_file() and read_json(about).get("edit") == edit.digest


def public_name(name: str) -> str:
    """A model's name for files that are passed on: a Hub id as it is, of a local folder only its last part."""
    local = Path(name).is_absolute() or name.startswith(".") or Path(name).exists()
    return Path(name).resolve().name if local else name


# What an export is held against before it gets its name: the edited model itself, on the requests' prompts.

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
    _align_like(again, model)
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


def _align_like(model: TracedModel, like: TracedModel) -> None:
    """Give every weight of `model` the memory alignment that it has in `like`; the values stay the same.

    A matrix product on the CPU takes another order of additions for weights that do not start at a multiple of 64
    bytes. Weights read from a safetensors file start anywhere, so equal weights gave logits 2e-7 apart.
    """
    wanted = dict(like.module.named_parameters())
    for name, weight in model.module.named_parameters():
        if weight.device.type == "cpu" and name in wanted and weight.is_contiguous():
            size = weight.numel() * weight.element_size()
            memory = torch.empty(size + 64, dtype=torch.uint8)
            start = (wanted[name].data_ptr() - memory.data_ptr()) % 64
            weight.data = memory[start : start + size].view(weight.dtype).view(weight.shape).copy_(weight.data)


def _load_again(model: TracedModel, folder: Path) -> TracedModel:
    from ..model.load import load

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


def to_hf(
    model: TracedModel,
    edit: Edit,
    folder: str | Path,
    check: bool = True,
    undo: bool = True,
    force: bool = False,
) -> Exported:
    """Write the edited model as a Hugging Face folder, whole or not at all; the model itself is as before on return.

    The weights keep the dtype that the model was loaded in, which may be another than its files'. Every weight that
    was written is compared with the model's, byte for byte, and the tokenizer's ids on the requests' texts.

    Args:
        check: also load the folder again, as others do: all weights, logits after the requests' prompts to the bit,
            and some greedy text. Takes as much memory again as the model.
        undo: keep the touched weights' bytes from before in the folder, for `revert_folder`.
        force: also on weights that the edit was not solved for.

    Raises:
        KtError: the edit was solved for other weights.
        NotWritable: the folder is taken, or the disk is full or read-only.
        NotEnoughMemory: no room for the check's second copy of the model.
        WorkFailed: what was written is not the edited model.
    """
    refuse_taken(folder)
    refuse_full(folder, size_of(model.module.state_dict()))
    source = source_of(model)
    before = {name: model.fingerprint([name]) for name in edit.names}
    prompts = prompts_of(edit)
    with whole_folder(folder) as temporary:
        _keep_own(model, edit, temporary, undo)
        with edit.applied(model, force=force):
            _save(model, temporary, source)
            check_files(model, temporary, edit.names)
            check_tokenizer(model, temporary, _texts(edit, prompts))
            found = check_reload(model, temporary, prompts) if check else None
            after = {name: model.fingerprint([name]) for name in edit.names}
        about = {
            "shards": len(set(Shards.open(temporary).files.values())),
            "source_shards": source.number if source else None,
            "undo": undo,
        }
        keep_about(temporary, model, edit, format="hf", fingerprints=before, fingerprints_after=after, **about)
    return Exported(
        path=Path(folder),
        format="hf",
        dtype=str(model.dtype).removeprefix("torch."),
        max_error=found.max_error if found else None,
        relative_error=found.max_error if found else None,
        prompts=len(prompts) if found else 0,
        weights={name: {"before": before[name], "after": after[name]} for name in edit.names},
        about=about | {"generated": list(found.generated) if found else []},
    )


def _keep_own(model: TracedModel, edit: Edit, folder: Path, undo: bool) -> None:
    """The edit and the bytes that it will replace, in the module's own layout and dtype."""
    (folder / OWN).mkdir()
    edit.save(folder / OWN / EDIT)
    if undo:
        copies = {name: model.own(name).detach().cpu() for name in edit.names}
        save_arrays(folder / OWN / UNDO, copies, {"kind": "undo", "edit": edit.digest})


def _save(model: TracedModel, folder: Path, source: Source | None) -> None:
    """`save_pretrained`, in files like the source's; where those are not known, of transformers' own size."""
    size: dict[str, Any] = {}
    if source is not None:
        size["max_shard_size"] = shard_size(model.module, source)
    try:
        with no_bars():
            model.module.save_pretrained(folder, **size)
        model.tokenizer.save_pretrained(folder)
    except ValueError as error:
        # A generation config that contradicts itself is refused by save_pretrained.
        raise WorkFailed(f"transformers does not save this model: {' '.join(str(error).split())[:300]}") from error


def _texts(edit: Edit, prompts: list[str]) -> list[str]:
    targets = [str((r.get("target_new") or {}).get("str", "")) for r in edit.requests[: len(prompts)]]
    return [*prompts, *filter(None, targets)]
