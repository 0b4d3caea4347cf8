"""`kt export --push`: the card, what is sent to the Hub, and what is refused before any work."""

from __future__ import annotations

import socket
from pathlib import Path
from types import MappingProxyType

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError

import kt as library
from kt.editing import Edit
from kt.editing.apply import fingerprints
from kt.evaluation.scores import Scores
from kt.export.card import MARK, card
from kt.model.sites import Kind, Site
from kt.model.update import LowRank

HOSTILE = "<script>alert(1)</script> [x](javascript:alert(1)) ![i](http://t/p.png) a|b `c` www.evil.example\n---"


@pytest.fixture(scope="module")
def edit_file(model_folder, tmp_path_factory):
    base = library.load(model_folder, device="cpu")
    draw, name = torch.Generator().manual_seed(0), base.weight_name(Site(Kind.MLP, 1))
    d_out, d_in = base.weight(name).shape
    update = LowRank(torch.randn(d_out, 2, generator=draw) * 0.2, torch.randn(2, d_in, generator=draw) * 0.2)
    about = {"model": base.name, "method": "memit", "dtype": "float32", "fingerprints": fingerprints(base, [name])}
    requests = [
        {
            "id": str(i),
            "prompt": "The {} is",
            "subject": f"{HOSTILE} {i}",
            "target_true": {"str": "a"},
            "target_new": {"str": "b"},
        }
        for i in range(25)
    ]
    return Edit({name: update}, about | {"requests": requests}).save(
        tmp_path_factory.mktemp("run") / "edit.safetensors"
    )


class Hub:
    """A stand-in of HfApi: repositories by name, and what was asked of it."""

    def __init__(self, **repos):
        self.repos, self.calls, self.role, self.failing = (
            {k.replace("__", "/"): v for k, v in repos.items()},
            [],
            "write",
            "",
        )

    def __call__(self):
        return self

    def whoami(self):
        return {"name": "me", "auth": {"accessToken": {"role": self.role}}}

    def list_repo_files(self, repo):
        if repo not in self.repos:
            raise RepositoryNotFoundError("404", response=Reply())
        return self.repos[repo]

    def create_repo(self, repo, **named):
        self.calls.append(("create_repo", repo, named))
        self.repos.setdefault(repo, [".gitattributes"])

    def upload_folder(self, **named):
        if self.failing:
            raise ConnectionError(self.failing)
        self.calls.append(("upload_folder", sorted(p.name for p in Path(named["folder_path"]).iterdir()), named))
        return f"https://hub.example/{named['repo_id']}/commit/1"


class Reply:
    """As much of an HTTP response as the Hub's errors look at."""

    headers = MappingProxyType({})
    request = None
    status_code = 404


@pytest.fixture
def hub(kt, monkeypatch):
    """A Hub that answers at a local port, with a token for it."""
    stand_in = Hub(me__full=["config.json", "x"], me__empty=[".gitattributes"])
    monkeypatch.setattr(huggingface_hub, "HfApi", stand_in)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("kt.export.hub.unreachable", lambda: None)
    return stand_in


FORMATS = {
    "hf": ("transformers", {"config.json", "model.safetensors", "kt/undo.safetensors"}, "AutoModelForCausalLM"),
    "peft": ("peft", {"adapter_config.json", "adapter_model.safetensors"}, "PeftModel.from_pretrained"),
    "edit": ("kt-interp", {"edit.safetensors"}, "kt.Edit.load"),
}


@pytest.mark.parametrize("format", FORMATS)
def test_a_dry_run_writes_the_card_and_lists_the_files_offline(kt, model_folder, edit_file, format):
    of = () if format == "edit" else ("-m", model_folder)
    ran = kt("export", edit_file, *of, "--format", format, "--push", "me/x", "--dry-run", "--json", "-")
    assert ran.code == 0, ran.err
    library_name, expected, line = FORMATS[format]
    files = ran.json["push"]["files"]
    assert ran.json["push"]["url"] is None and {"README.md", *expected} <= set(files)
    assert files == {name: (Path("x") / name).stat().st_size for name in files}
    found = ModelCard.load("x/README.md")
    assert found.data.library_name == library_name and found.data.pipeline_tag == "text-generation"
    assert "memit" in found.data.tags and found.data.base_model is None  # a folder's name is no Hub id
    assert line in found.text and "Not scored" in found.text and "## Licence" in found.text
    assert str(model_folder.parent) not in found.text


def test_facts_in_a_card_are_inert_and_bounded(edit_file):
    text = card(Edit.load(edit_file), "hf", "me/x", "org/base")
    rows = [line for line in text.splitlines() if "alert" in line]
    assert len(rows) == 20 and "5 more" in text
    assert all("<script" not in row and "](javascript:" not in row and "http://" not in row for row in rows)
    assert all(row.count("|") - row.count("\\|") == 4 and "www." not in row for row in rows)
    data = ModelCard(text).data
    assert data.base_model == "org/base" and data.to_dict()["base_model_relation"] == "finetune"


def test_a_card_loads_the_base_in_the_revision_that_was_edited(edit_file):
    edit = Edit.load(edit_file)
    for format, line in (("peft", 'revision="abc"'), ("edit", 'kt.load("org/base", revision="abc")')):
        assert line in card(edit, format, "me/x", "org/base", revision="abc")
    assert "--base" in (text := card(edit, "hf", "me/x", "org/base", undo=False, revision="abc"))
    assert '"org/base@abc"' in text and "revision" not in text


def test_a_card_has_the_scores_that_lie_beside_the_edit(kt, edit_file):
    values = {"edit_success_gen_exact": {"1": 1.0, "2": 0.0}}
    scores = Scores("m", ("1", "2"), (), values, {"edit_success_gen_exact": "whether [it] is said"})
    folder = Path("run")
    folder.mkdir()
    (folder / "edit.safetensors").write_bytes(edit_file.read_bytes())
    scores.save(folder / "scores.json")
    assert kt("export", folder / "edit.safetensors", "--format", "edit", "--push", "me/x", "--dry-run").code == 0
    text = Path("x/README.md").read_text()
    assert "0.500 [0.000, 1.000] | 2 |" in text and r"whether \[it\] is said" in text and "Not scored" not in text


def test_a_push_makes_a_private_repository_and_uploads_the_folder_in_one_commit(kt, hub, model_folder, edit_file):
    ran = kt("export", edit_file, "-m", model_folder, "--push", "me/new", "--json", "-")
    assert ran.code == 0, ran.err
    (_, repo, how), (_, files, upload) = hub.calls
    assert (repo, how) == ("me/new", {"private": True, "exist_ok": True})
    assert {"README.md", "kt", "model.safetensors"} <= set(files) and "delete_patterns" not in upload
    assert ran.json["push"]["url"] == "https://hub.example/me/new/commit/1"
    assert kt("export", "new", "--push", "me/empty", "--public").code == 0  # the folder once more, without a model
    assert hub.calls[2] == ("create_repo", "me/empty", {"private": False, "exist_ok": True})
    assert kt("export", "new", "--push", "me/full", "--overwrite").code == 0
    assert hub.calls[-1][2]["delete_patterns"] == "*"


def test_a_failed_upload_leaves_the_folder_and_says_how_to_go_on(kt, hub, edit_file):
    hub.failing = "connection reset"
    ran = kt("export", edit_file, "--format", "edit", "--push", "me/new")
    assert ran.code == 1 and "connection reset" in ran.err and "kt export new --push me/new" in ran.err.splitlines()[-1]
    Path("new/README.md").write_text("a card of mine")
    hub.failing = ""
    assert kt("export", "new", "--push", "me/new").code == 0
    assert Path("new/README.md").read_text() == "a card of mine"


REFUSED = [
    (("--push", "no-owner"), "OWNER/NAME"),
    (("--push", "me/a b"), "OWNER/NAME"),
    (("--push", "a/b/c"), "OWNER/NAME"),
    (("--push", "https://huggingface.co/me/x"), "did you mean me/x"),
    (("--push", "me/full"), "--overwrite"),
    (("--public", "--to", "x"), "for --push only"),
    (("--dry-run", "--to", "x"), "for --push only"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED)
def test_what_cannot_be_pushed_is_refused_before_any_work(kt, hub, model_folder, edit_file, arguments, says):
    ran = kt("export", edit_file, "-m", model_folder, *arguments)
    assert ran.code == 2 and says in ran.err and ran.err.count("\n") == 1
    assert not list(Path().iterdir()) and not hub.calls


def test_no_token_one_that_only_reads_and_no_hub_are_one_line_each(
    kt, hub, model_folder, edit_file, monkeypatch, tmp_path
):
    def line():
        ran = kt("export", edit_file, "-m", model_folder, "--push", "me/x")
        assert ran.code == 2 and ran.err.count("\n") == 1 and not list(Path().iterdir())
        return ran.err

    hub.role = "read"
    assert "may only read" in line()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in line()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        assert "does not answer" in line()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "hf auth login" in line()


def test_a_reverted_folder_has_no_card_of_the_edit(kt, model_folder, edit_file):
    assert kt("export", edit_file, "-m", model_folder, "--push", "me/x", "--dry-run", "--no-check").code == 0
    assert MARK in Path("x/README.md").read_text()
    assert kt("revert", "x", "--to", "plain").code == 0 and not Path("plain/README.md").exists()
    assert Path("x/README.md").exists() and kt("revert", "x").code == 0 and not Path("x/README.md").exists()
