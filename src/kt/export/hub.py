"""An exported folder on the Hugging Face Hub. Everything that can be refused is refused before the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .._util.data import read_json
from .._util.files import atomic_write
from .._util.kinds import takes
from .._util.online import unreachable
from ..editing.edit import AN_EDIT
from ..errors import BadFile, KtError, WorkFailed, said_by
from ..runs.folder import FILES
from .card import CARD, card
from .hf import ABOUT, EDIT, OWN, Exported, keep_about, public_name
from .shards import whole_folder

if TYPE_CHECKING:
    from ..editing import Edit

T = TypeVar("T")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def check_repo_id(repo: str) -> str:
    """The name itself, if it is OWNER/NAME as the Hub has them.

    Raises:
        KtError: it is not.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    bare = repo.removeprefix("https://huggingface.co/").strip("/")
    try:
        validate_repo_id(bare)
        wrong = "" if bare.count("/") == 1 else "OWNER is missing"
    except HFValidationError as error:
        wrong = str(error).split(":")[0]
    if wrong or bare != repo:
        hint = f"; did you mean {bare}?" if not wrong else f" ({wrong}); write OWNER/NAME"
        raise KtError(f"{repo!r} is no name of a repository on the Hub{hint}")
    return repo


def check_push(repo: str, overwrite: bool = False) -> None:
    """Find out that the folder may go there, before it is made.

    Raises:
        KtError: no token, or one that may not write; the Hub does not answer; the repository holds files.
    """
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise KtError(f"a push to {repo} needs a token of the Hub: {LOGIN}; --dry-run needs none")
    if why := unreachable():
        raise KtError(f"cannot push to {repo}: {why}; connect, or add --dry-run and push the folder later")
    api = HfApi()
    user = _asked(f"the token is not taken; {LOGIN}", KtError, api.whoami)
    access = (user.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise KtError(f"the token may only read; make one that writes at huggingface.co/settings/tokens, then {LOGIN}")
    refuse_full_repo(api, repo, overwrite)


def refuse_full_repo(api: Any, repo: str, overwrite: bool) -> None:
    """Refuse a repository that holds more than what the Hub puts into a new one."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = _asked(f"cannot look at {repo}", KtError, api.list_repo_files, repo)
    except KtError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return
        raise
    if not overwrite and (held := [file for file in files if file != ".gitattributes"]):
        raise KtError(
            f"{repo} exists and holds {held[0]}{' and more' if len(held) > 1 else ''}; name another repository, or "
            "--overwrite replaces its files (earlier ones stay in its history)"
        )


@takes(edit=AN_EDIT)
def to_edit(edit: Edit, folder: str | Path) -> Exported:
    """Write the edit file alone as a folder that can be pushed, atomically; no model is needed.

    Raises:
        NotWritable: the folder is not empty, or the disk is full or read-only.
    """
    name, revision = str(edit.manifest.get("model", "")), edit.manifest.get("revision")
    with whole_folder(folder) as temporary:
        edit.save(temporary / EDIT)
        keep_about(temporary, name, revision, edit, format="edit")
    about = {"base_model": public_name(name)}
    return Exported(Path(folder), "edit", str(edit.manifest.get("dtype", "")), about=about)


@takes(edit=AN_EDIT)
def write_card(folder: str | Path, edit: Edit, repo: str, run: Path | None = None) -> None:
    """Write the card of an exported folder.

    Args:
        run: the folder of the run that the edit is of, whose scores the card then has.
    """
    from ..evaluation.scores import Comparison

    about = exported(folder)
    scores = None if run is None else run / FILES["after"]
    found = Comparison.load(scores) if scores is not None and scores.is_file() else None
    text = card(edit, about["format"], repo, str(about["model"]), found, about.get("undo", True), about.get("revision"))
    atomic_write(Path(folder) / CARD, text)


def exported(folder: str | Path) -> dict[str, Any]:
    """The record of an exported folder.

    Raises:
        BadFile: it is none.
    """
    path = Path(folder) / OWN / ABOUT
    about = read_json(path) if path.is_file() else {}
    if about.get("kind") != "export" or "format" not in about:
        raise BadFile(f"{folder} is no folder that kt export wrote (no {OWN}/{ABOUT}); export the edit first")
    return about


def files(folder: str | Path) -> list[tuple[str, int]]:
    """What a push uploads: paths in the folder and their bytes."""
    root = Path(folder)
    found = (path for path in root.rglob("*") if path.is_file() and ".git" not in path.relative_to(root).parts)
    return sorted((path.relative_to(root).as_posix(), path.stat().st_size) for path in found)


@takes()
def push(folder: str | Path, repo: str, private: bool = True, overwrite: bool = False) -> str:
    """Upload an exported folder in one commit.

    Args:
        folder: with its card.
        repo: OWNER/NAME; made if it is not there.
        private: of a new repository; one that is there stays as it is.
        overwrite: replace all files of a repository that holds some.

    Returns:
        The address of the commit.

    Raises:
        KtError: the repository holds files.
        WorkFailed: the Hub refuses, or does not answer; the folder is as it was.
    """
    from huggingface_hub import HfApi

    about, api = exported(folder), HfApi()
    if not (Path(folder) / CARD).is_file():
        raise BadFile(f"{folder} holds no {CARD}; export the edit with --push, which writes one")
    refuse_full_repo(api, repo, overwrite)
    again = f"nothing was published; kt export {folder} --push {repo} tries again"
    _asked(again, WorkFailed, api.create_repo, repo, private=private, exist_ok=True)
    done = _asked(
        again,
        WorkFailed,
        api.upload_folder,
        repo_id=repo,
        folder_path=folder,
        commit_message=f"kt export: {about['format']}, edit {str(about['edit'])[:12]}",
        **({"delete_patterns": "*"} if overwrite else {}),
    )
    return str(getattr(done, "commit_url", done))


def _asked(then: str, kind: type[KtError], call: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """A call of the Hub, whose client raises the errors of whichever HTTP library it is built on."""
    try:
        return call(*arguments, **named)
    except Exception as error:
        why = said_by(error, 200)
        raise kind(f"the Hub: {why}; {then}") from error
