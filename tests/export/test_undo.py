"""A merged folder gives its edit back: the exact bytes from before, whatever happens on the way."""

import errno
import json
import os

import pytest
import torch
from export_help import farthest, logits, plain, random_edit, saved, sums
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import kt
from kt._util.files import NotWritable
from kt.errors import BadFile, KtError
from kt.export import revert_folder, to_hf, undo
from kt.export.shards import Shards
from kt.model.update import fingerprint_of


def test_every_family_comes_back_to_the_last_byte(model, tmp_path):
    saved(model, tmp_path / "base")
    to_hf(model, random_edit(model), tmp_path / "merged", check=False)
    assert sums(tmp_path / "merged")["model.safetensors"] != sums(tmp_path / "base")["model.safetensors"]
    found = revert_folder(tmp_path / "merged")
    assert found.restored and not found.already
    assert found.fingerprint == model.fingerprint()
    assert set(found.weights.values()) == {"applied"}
    assert sums(tmp_path / "merged")["model.safetensors"] == sums(tmp_path / "base")["model.safetensors"]


@pytest.fixture
def tiny():
    return tiny_model("qwen2")


@pytest.fixture
def merged(tiny, tmp_path):
    """A merged folder with its weights in four files."""
    saved(tiny, tmp_path / "first")
    saved(kt.load(tmp_path / "first", device="cpu"), tmp_path / "base", max_shard_size="60KB")
    model = kt.load(tmp_path / "base", device="cpu")
    to_hf(model, random_edit(model), tmp_path / "merged", check=False)
    return tmp_path / "merged"


def weights_of(folder):
    return {name: digest for name, digest in sums(folder).items() if name.startswith("model-")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_bytes_come_back_in_every_dtype(tiny, tmp_path, dtype):
    model = kt.load(saved(tiny, tmp_path / "base"), dtype=dtype, device="cpu")
    to_hf(model, random_edit(model), tmp_path / "merged", check=False)
    assert revert_folder(tmp_path / "merged").fingerprint == model.fingerprint()


def test_a_second_time_it_says_that_the_edit_is_out(merged):
    first = revert_folder(merged)
    files = sums(merged)
    second = revert_folder(merged)
    assert second.restored and second.already and second.fingerprint == first.fingerprint
    assert set(second.weights.values()) == {"base"}
    assert sums(merged) == files


def test_a_new_folder_leaves_the_first_one_as_it_is(merged, tiny, tmp_path):
    before = sums(merged)
    (merged / "notes").mkdir()
    (merged / "notes" / "mine.txt").write_text("kept")
    found = revert_folder(merged, to=tmp_path / "plain")
    assert weights_of(merged) == {n: d for n, d in before.items() if n.startswith("model-")}
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "base")
    assert found.fingerprint == tiny.fingerprint() and found.path == tmp_path / "plain"
    assert not (tmp_path / "plain" / "kt").exists()
    assert (tmp_path / "plain" / "notes" / "mine.txt").read_text() == "kept"
    assert farthest(logits(plain(tmp_path / "plain"), tiny.tokenizer), logits(tiny.module, tiny.tokenizer)) == 0


def test_cut_off_between_two_files_it_finishes_the_next_time(merged, tiny, monkeypatch):
    write, done = Shards.write, []

    def dies(self, file, replaced, into):
        if done:
            raise KeyboardInterrupt
        done.append(file)
        write(self, file, replaced, into)

    monkeypatch.setattr(Shards, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        revert_folder(merged)
    monkeypatch.undo()
    found = revert_folder(merged)
    assert set(found.weights.values()) == {"base", "applied"}  # half way, and every weight one or the other
    assert found.fingerprint == tiny.fingerprint() and not found.already


def test_a_full_disk_in_the_middle_of_a_file_leaves_the_old_file(merged, monkeypatch):
    before = weights_of(merged)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotWritable, match="the disk is full"):
        revert_folder(merged)
    assert weights_of(merged) == before
    assert not [path for path in merged.rglob("*") if ".tmp-" in path.name]


def test_without_kept_bytes_the_base_model_gives_them(tiny, tmp_path):
    saved(tiny, tmp_path / "base")
    to_hf(tiny, random_edit(tiny), tmp_path / "merged", check=False, undo=False)
    assert not (tmp_path / "merged" / "kt" / "undo.safetensors").exists()
    with pytest.raises(KtError, match="name the base model with --base"):
        revert_folder(tmp_path / "merged")
    with pytest.raises(BadFile, match="as it was before the edit"):
        revert_folder(tmp_path / "merged", base=tiny_model("qwen2", seed=1))
    assert revert_folder(tmp_path / "merged", base=str(tmp_path / "base")).fingerprint == tiny.fingerprint()


def test_a_folder_that_carries_no_edit_needs_its_name(tiny, tmp_path):
    edit = random_edit(tiny)
    edit.save(tmp_path / "edit.safetensors")
    with edit.applied(tiny):
        saved(tiny, tmp_path / "merged")
        edit.manifest["fingerprints_after"] = {name: tiny.fingerprint([name]) for name in edit.names}
    edit.save(tmp_path / "edit.safetensors")
    with pytest.raises(KtError, match="--edit"):
        revert_folder(tmp_path / "merged")
    found = revert_folder(tmp_path / "merged", edit=tmp_path / "edit.safetensors", base=tiny)
    assert found.fingerprint == tiny.fingerprint() and not found.already


def spoil(path, change):
    """One weight of a safetensors file, changed."""
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = change(tensors[name])
    with safe_metadata(path) as about:
        save_file(tensors, path, metadata=about)


def safe_metadata(path):
    from contextlib import nullcontext

    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return nullcontext(file.metadata())


def test_weights_that_were_changed_since_are_named_and_nothing_is_written(merged):
    shards = Shards.open(merged)
    name = "model.layers.1.mlp.down_proj.weight"
    shards.write(shards.files[name], {name: shards.read(name) + 1}, merged)
    before = sums(merged)
    with pytest.raises(KtError, match="1 of 3 weights are neither") as error:
        revert_folder(merged)
    assert name in str(error.value)
    assert sums(merged) == before


def test_kept_bytes_that_are_not_the_weights_from_before_are_refused(merged, tiny):
    before = weights_of(merged)
    spoil(merged / "kt" / "undo.safetensors", lambda weight: weight + 1)
    with pytest.raises(BadFile, match=r"undo\.safetensors does not hold"):
        revert_folder(merged)
    assert weights_of(merged) == before
    assert revert_folder(merged, base=tiny).fingerprint == tiny.fingerprint()


def test_another_edit_is_not_taken_out(merged, tiny, tmp_path):
    random_edit(tiny, seed=5).save(tmp_path / "other.safetensors")
    with pytest.raises(KtError, match="another edit than the one named"):
        revert_folder(merged, edit=tmp_path / "other.safetensors")


@pytest.mark.parametrize("file", ["../base/model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", "", 3, None])
def test_an_index_that_points_outside_its_folder_is_refused(merged, file):
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = file
    (merged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadFile, match="is no file of this folder"):
        revert_folder(merged)


@pytest.mark.parametrize("content", ['{"weight_map": 1}', '{"weight_map": {}}', "[]", "{"])
def test_an_index_that_is_none_is_refused(merged, content):
    (merged / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BadFile):
        revert_folder(merged)


JUNK = [
    {"fingerprints": 1},
    {"fingerprints": []},
    {"fingerprints": {"a": "b"}},
    {"fingerprints_after": [1]},
    {"edit": {"a": 1}},
    {"edit": None},
]


@pytest.mark.parametrize("junk", JUNK)
def test_a_record_of_junk_is_one_line(merged, junk):
    path = merged / "kt" / "export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | junk))
    with pytest.raises(KtError):
        revert_folder(merged)


KEYS = st.sampled_from(["fingerprints", "fingerprints_after", "edit", "weight_map", "schema_version", "x"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    """A folder for junk, with an edit in it."""
    folder = tmp_path_factory.mktemp("junk")
    (folder / "kt").mkdir()
    edit = random_edit(tiny_model("qwen2"))
    edit.save(folder / "kt" / "edit.safetensors")
    return folder, edit


@settings(max_examples=300, deadline=None)
@given(junk=st.dictionaries(KEYS, ANYTHING) | ANYTHING, own=st.booleans())
def test_whatever_a_record_or_an_index_says_the_answer_is_one_line(around, junk, own):
    folder, edit = around
    if own and isinstance(junk, dict):
        junk |= {"edit": edit.digest}
    for name in ("kt/export.json", "model.safetensors.index.json"):
        (folder / name).write_text(json.dumps(junk))
    for read in (lambda: undo.known_fingerprints(folder, edit), lambda: Shards.open(folder)):
        try:
            read()
        except KtError as error:
            assert str(error) and "\n" not in str(error)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=64) | st.text(max_size=40).map(str.encode))
def test_whatever_bytes_a_file_of_weights_holds_the_answer_is_one_line(around, content):
    folder, edit = around
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(KtError):
        Shards.open(folder).read(edit.names[0])


def test_a_file_that_is_cut_short_is_one_line(merged):
    for path in (merged / "kt" / "undo.safetensors", merged / "kt" / "edit.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(BadFile):
            revert_folder(merged)
    shard = next(merged.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(BadFile):
        Shards.open(merged).read(next(n for n, f in Shards.open(merged).files.items() if f == shard.name))


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(BadFile, match=r"holds no model\.safetensors"):
        revert_folder(tmp_path)
    with pytest.raises(BadFile, match=r"holds no model\.safetensors"):
        revert_folder(tmp_path / "nowhere")


def test_a_folder_called_demo_is_not_the_embedded_model(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    to_hf(tiny, random_edit(tiny), "demo")
    assert revert_folder("demo").fingerprint == tiny.fingerprint()


def test_a_weight_that_rounding_left_alone_counts_as_before(tiny, tmp_path):
    model = kt.load(saved(tiny, tmp_path / "base"), dtype=torch.bfloat16, device="cpu")
    edit = random_edit(model)
    lost = edit.names[0]
    edit.updates[lost] = edit.updates[lost].scaled(1e-9)
    to_hf(model, edit, tmp_path / "merged", check=False)
    found = revert_folder(tmp_path / "merged")
    assert found.weights[lost] == "base" and found.fingerprint == model.fingerprint()


def test_the_states_are_told_by_fingerprints_alone():
    known = undo.Fingerprints(
        {"w": fingerprint_of([("w", torch.zeros(2))])}, {"w": fingerprint_of([("w", torch.ones(2))])}
    )
    found = [known.state("w", tensor) for tensor in (torch.zeros(2), torch.ones(2), -torch.zeros(2))]
    assert found == ["base", "applied", "other"]  # minus zero has another byte


# What the user names decides


def test_a_forged_record_proves_nothing_to_whoever_names_the_edit_or_the_base(merged, tiny, tmp_path):
    edit = kt.Edit.load(merged / "kt" / "edit.safetensors")
    edit.save(tmp_path / "edit.safetensors")
    shards = Shards.open(merged)
    touched, rest = edit.names[0], "model.norm.weight"
    shards.write(shards.files[touched], {touched: shards.read(touched) * 2}, merged)
    shards.write(shards.files[rest], {rest: shards.read(rest) + 1}, merged)
    path = merged / "kt" / "export.json"
    about = json.loads(path.read_text())
    about["fingerprints"] = {name: fingerprint_of([(name, shards.read(name))]) for name in edit.names}
    path.write_text(json.dumps(about))
    before = sums(merged)
    named, base = {"edit": tmp_path / "edit.safetensors"}, {"base": tmp_path / "base"}
    for chosen in (named, base, named | base):
        with pytest.raises(KtError, match=r"neither as before|as it was before|does not touch"):
            revert_folder(merged, **{k: str(v) for k, v in chosen.items()})
    assert sums(merged) == before
    assert revert_folder(merged).proof == "the folder's own record"  # the forger's word, and called that


def test_weights_that_the_edit_does_not_touch_are_compared_with_a_base_that_is_named(merged, tmp_path):
    shards, rest = Shards.open(merged), "model.norm.weight"
    shards.write(shards.files[rest], {rest: shards.read(rest) + 1}, merged)
    with pytest.raises(KtError, match=r"does not touch are not the base model's \(model\.norm\.weight\)"):
        revert_folder(merged, base=str(tmp_path / "base"))


def test_the_proof_says_whose_word_it_is(merged, tiny, tmp_path):
    edit, base = merged / "kt" / "edit.safetensors", str(tmp_path / "base")
    assert revert_folder(merged, to=tmp_path / "1").proof == "the folder's own record"
    assert revert_folder(merged, edit=edit, to=tmp_path / "2").proof == "the edit that was named"
    for chosen in ({}, {"edit": edit}):
        found = revert_folder(merged, base=base, to=tmp_path / f"3{len(chosen)}", **chosen)
        assert found.proof == "the base model" and found.fingerprint == tiny.fingerprint()
    assert revert_folder(tmp_path / "1", base=tiny, edit=edit).already


@pytest.mark.parametrize("place", ["notes.txt", "sub/notes.txt", "config.json", "sub"])
def test_nothing_from_outside_is_copied(merged, tmp_path, place):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "key").write_text("secret")
    link = merged / place
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside if place == "sub" else outside / "key")
    with pytest.raises(BadFile, match="leads out of"):
        revert_folder(merged, to=tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_pipe_is_not_copied(merged, tmp_path):
    os.mkfifo(merged / "pipe")
    with pytest.raises(BadFile, match="no regular file"):
        revert_folder(merged, to=tmp_path / "plain")


def test_a_hub_snapshots_links_into_its_own_blobs_are_copied_as_files(merged, tiny, tmp_path):
    repository = tmp_path / "models--someone--merged"
    snapshot, blobs = repository / "snapshots" / "1a2b", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (snapshot / "kt").mkdir()
    for number, path in enumerate(p for p in sorted(merged.rglob("*")) if p.is_file()):
        path.rename(blobs / str(number))
        (snapshot / path.relative_to(merged)).symlink_to(blobs / str(number))
    kept = sums(blobs)
    assert revert_folder(snapshot, to=tmp_path / "plain").fingerprint == tiny.fingerprint()
    assert sums(blobs) == kept
    assert not [path for path in (tmp_path / "plain").rglob("*") if path.is_symlink()]
