"""`kt export` and `kt revert`: an edit as other tools load it, and a merged folder without its edit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._util.text import count, size_text
from ..errors import need
from . import checks, parse
from .command import BadOption, Options, as_flag
from .console import Screen
from .options import ForceOptions, ModelOptions, Opt
from .session import load_model, screen_for, settle_libraries, write_result

if TYPE_CHECKING:
    from ..export import Exported, Reverted


FORMATS = ("hf", "peft", "edit")
DTYPES = ("float32", "fp32", "bfloat16", "bf16", "float16", "fp16")
OF_PEFT = ("max_rank", "max_error", "adapter_dtype")
MAX_ERROR = 1e-3


@dataclass(frozen=True)
class ExportOptions(ForceOptions, ModelOptions):
    edit: Annotated[
        Path | None,
        typer.Argument(
            metavar="EDIT", help="The edit file of kt apply-edit, a stack's JSON, or (--push) an exported folder."
        ),
    ] = None
    format: Annotated[
        str,
        Opt(
            "--format",
            help="hf: a merged Hugging Face folder; peft: a LoRA adapter; edit: the edit file alone.",
        ),
    ] = "hf"
    to: Annotated[
        Path | None, Opt("--to", help="The folder to write; new or empty [default: NAME of --push, here].")
    ] = None
    push: Annotated[
        str | None,
        Opt("--push", metavar="OWNER/NAME", help="Upload the folder to the Hugging Face Hub, with a model card."),
    ] = None
    dry_run: Annotated[
        bool, Opt("--dry-run", help="push: write folder and card, list what would be uploaded; offline.")
    ] = False
    public: Annotated[bool, Opt("--public", help="push: make a new repository public [default: private].")] = False
    overwrite: Annotated[bool, Opt("--overwrite", help="push: replace all files of a repository that holds some.")] = (
        False
    )
    max_rank: Annotated[int | None, Opt("--max-rank", min=1, help="peft: most columns of a factor.")] = None
    max_error: Annotated[
        float | None,
        Opt("--max-error", min=0, help=f"peft: how much of the edit's norm may be missing [default: {MAX_ERROR}]."),
    ] = None
    adapter_dtype: Annotated[
        str | None,
        Opt("--adapter-dtype", help="peft: of the factors: float32/fp32, bfloat16/bf16, float16/fp16 [default: fp32]."),
    ] = None
    no_undo: Annotated[
        bool, Opt("--no-undo", help="hf: leave out the bytes from before the edit, which kt revert puts back.")
    ] = False
    no_check: Annotated[
        bool,
        Opt("--no-check", help="Do not load the result to compare it: for hf that takes as much memory again."),
    ] = False


@dataclass(frozen=True)
class RevertOptions(Options):
    folder: Annotated[Path | None, typer.Argument(metavar="FOLDER", help="The merged folder.")] = None
    edit: Annotated[Path | None, Opt("--edit", help="The edit to take out [default: the one in the folder].")] = None
    base: Annotated[
        str | None, Opt("--base", help="Take the bytes from this model [default: those kept in the folder].")
    ] = None
    to: Annotated[Path | None, Opt("--to", help="Write a new folder [default: in place, file by file].")] = None


def export(options: ExportOptions) -> None:
    """Write an edit as a merged Hugging Face folder or as a PEFT adapter, checked before it has its name; push it."""
    format = parse.one(options.format, FORMATS, "--format")
    if options.push is not None:
        from ..export.hub import check_repo_id

        check_repo_id(options.push)
    checks.idle(options)
    if options.push is not None and options.edit is not None and options.edit.is_dir():
        push_folder(options, options.push, options.edit)
        return
    folder = options.to or (Path(options.push.partition("/")[2]) if options.push else None)
    if options.edit is None or folder is None:
        raise BadOption("kt export needs an edit file and a folder: kt export edit.safetensors --to FOLDER")
    stray = [name for name in OF_PEFT if getattr(options, name) is not None] if format != "peft" else []
    if stray:
        raise BadOption(f"{as_flag(stray[0])} belongs to --format peft; add that, or leave it out")
    if format != "hf" and options.no_undo:
        raise BadOption("--no-undo belongs to --format hf; an adapter leaves the base model as it is")
    dtype = parse.one(options.adapter_dtype or DTYPES[0], DTYPES, "--adapter-dtype")
    checks.typed(options)
    checks.edit_files(options.edit)
    checks.new_folder(folder, "--to")
    if format == "peft":
        need("peft", "an export for peft")
    if format != "edit":
        checks.model(options)
    check_push(options)
    settle_libraries()
    screen = screen_for(options)
    from ..editing import Edit
    from ..editing.stack import open_edit
    from ..export import to_edit, to_hf, to_peft, write_card
    from ..model.load import DTYPES as KINDS

    edit = open_edit(options.edit)
    if format == "edit":
        if not isinstance(edit, Edit):
            raise BadOption(f"{options.edit} is a stack of files; --format hf or peft takes them together")
        made = to_edit(edit, folder)
    else:
        edit.require_updates("a merged folder" if format == "hf" else "a PEFT adapter")  # before a model loads
        model = load_model(options)
        if not isinstance(edit, Edit):
            edit = edit.total(model, options.force)
        shared: dict[str, Any] = {"check": not options.no_check, "force": options.force}
        if format == "hf":
            made = to_hf(model, edit, folder, undo=not options.no_undo, **shared)
        else:
            limit = MAX_ERROR if options.max_error is None else options.max_error
            made = to_peft(model, edit, folder, options.max_rank, limit, KINDS[dtype], **shared)
    if options.push is not None:
        write_card(folder, edit, options.push, options.edit.parent)
    show_export(screen, made)
    sent = pushed(screen, options, options.push, folder) if options.push else {}
    write_result(options, made.as_dict() | sent, made.path)


def check_push(options: ExportOptions) -> None:
    """What a push can be refused for, before a model loads."""
    if options.push is not None and not options.dry_run:
        from ..export import hub

        hub.check_push(options.push, options.overwrite)


def push_folder(options: ExportOptions, repo: str, folder: Path) -> None:
    """Push a folder of an earlier export, with the card in it, which its owner may have gone over."""
    from ..export.hub import exported

    if options.to is not None:
        raise BadOption(f"--to has no use here: {folder} is an exported folder, and is pushed as it is")
    exported(folder)
    check_push(options)
    screen = screen_for(options)
    write_result(options, {"path": str(folder)} | pushed(screen, options, repo, folder))


def pushed(screen: Screen, options: ExportOptions, repo: str, folder: Path) -> dict[str, Any]:
    """Show what goes to the Hub, and send it unless this is a dry run; the same for `--json`."""
    from ..export import hub
    from ..report import Table

    files = hub.files(folder)
    title = f"{count(len(files), 'file')}, {size_text(sum(size for _, size in files))}, for {repo}"
    screen.tables(Table(["file", "size"], [[name, size_text(size)] for name, size in files], title))
    if options.dry_run:
        screen.say(f"kt: nothing was uploaded; read {folder / hub.CARD}, then: kt export {folder} --push {repo}")
        url = None
    else:
        url = hub.push(folder, repo, not options.public, options.overwrite)
        screen.say(f"kt: uploaded to {url}; a new repository is {'public' if options.public else 'private'}")
    return {"push": {"repo": repo, "files": dict(files), "url": url}}


def show_export(screen: Screen, made: Exported) -> None:
    """The files, the tables, how near the result is to the edited model."""
    about = made.about
    if made.format == "hf":
        files = f"{count(about['shards'], 'file')} of weights in {made.dtype}"
        source = about["source_shards"]
        if source is not None and source != about["shards"]:
            files += f" (the model came in {source})"
        screen.say(f"kt: {files}" + ("" if about["undo"] else "; without the bytes that kt revert would put back"))
    screen.tables(*made.tables())
    if made.format == "peft":
        missing = about["weight_error"]
        screen.say(f"kt: the adapter misses {missing:.2g} of the edit's norm" if missing else "kt: no part is missing")
    if made.format == "edit":
        pass
    elif made.max_error is None:
        screen.say("kt: not loaded again, so its logits were not compared (--no-check)")
    else:
        screen.say(f"kt: logits after {made.prompts} prompts: {_gap(made)}")


def _gap(made: Exported) -> str:
    if not made.max_error:
        return "the edited model's, to the bit"
    return f"off by at most {made.max_error:.2g}, {made.relative_error:.2g} of what the edit changes"


def revert(options: RevertOptions) -> None:
    """Take an edit out of a merged folder, or prove that it is out."""
    if options.folder is None:
        raise BadOption("kt revert needs a merged folder: kt revert FOLDER")
    if not options.folder.is_dir():
        raise BadOption(f"{options.folder}: no such folder; kt export writes merged ones")
    checks.edit_files(*([] if options.edit is None else [options.edit]))
    if not any((options.folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise BadOption(f"{options.folder} holds no model.safetensors and no index of several; name a merged folder")
    settle_libraries()
    screen = screen_for(options)
    from ..export import revert_folder
    from ..model.hub import split_revision

    if options.base is not None:
        checks.config_file(*split_revision(options.base, None))  # a Hub id that cannot be had is refused within seconds
    reverted = revert_folder(options.folder, options.edit, options.base, options.to)
    show_revert(screen, reverted)
    write_result(options, reverted.as_dict(), *[reverted.path] * (options.to is not None or not reverted.already))


def show_revert(screen: Screen, reverted: Reverted) -> None:
    """Print the state of each weight, and that the edit is out."""
    from ..export.undo import RECORD

    screen.tables(*reverted.tables())
    done = (
        "the edit is already out; nothing to restore" if reverted.already else "every weight has its bytes from before"
    )
    screen.say(f"kt: {done}, by {reverted.proof}; the model's fingerprint is {reverted.fingerprint}")
    if reverted.proof == RECORD:
        screen.say("kt: the proof rests on that record alone; name the model with --base (or the edit with --edit)")
