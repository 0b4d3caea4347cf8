"""An edit merged into its model: a Hugging Face folder like the one that the model came in.

The folder holds what `save_pretrained` writes (weights in as many files as the source's, config, generation config,
tokenizer), and in `kt/` the edit, the touched weights' bytes from before it, and which is which (see undo.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import save_arrays
from ..errors import WorkFailed
from ..loading import no_bars
from .checks import check_files, check_reload, check_tokenizer, prompts_of
from .folder import refuse_full, refuse_taken, whole_folder
from .result import EDIT, OWN, UNDO, Exported, keep_about
from .shards import Shards, Source, shard_size, size_of, source_of

if TYPE_CHECKING:
    from ..editing import Edit
    from ..model import TracedModel


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
