"""An edit's file: the same edit is the same bytes; what is broken, changed or foreign is one clear line."""

import hashlib
import json
import math
import random
import zipfile

import pytest
import torch
from editing_help import ATTENTION, REQUESTS, fast, statistics
from edits_by_hand import random_edit
from families import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import kt
from kt._util.data import save_arrays
from kt.editing.context_edit import Context
from kt.editing.edit_io import FIELDS, contents, digest_of
from kt.errors import BadFile, KtError, WorkFailed
from kt.model.update import Dense, LowRank

NAMES = ("transformer.h.0.mlp.c_proj.weight", "transformer.h.1.attn.c_proj.weight", "transformer.h.1.ln_1.bias")
DOWN, OUT, BIAS = NAMES
ROW = {
    "id": "1", "prompt": "p", "subject": "s", "target": "t", "answer": None, "target_prob": [0.1, None],
    "target_rank": [4, 0], "answer_prob": None, "answer_rank": None, "control_prob": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def edit():
    edit = random_edit(tiny_model("gpt2"), NAMES)
    edit.targets["hidden.1"] = torch.randn(1, 32)
    edit.keys[DOWN] = torch.randn(1, 128)
    return edit


@pytest.fixture
def context_edit():
    facts = [f"{name} speaks Welsh" for name in ("Ann", "Bob")]
    texts = tuple(facts), tuple(f"New Fact: {fact}\n" for fact in facts)
    parts = {"nearness": 0.5, "vectors": torch.eye(2, 4), "centre": torch.zeros(1, 4)}
    return kt.Edit({}, {"method": "ice"}, effect=Context(*texts, retriever="embeddings", **parts))


@pytest.fixture
def file(edit, tmp_path):
    return edit.save(tmp_path / "edit.safetensors")


def forge(path, arrays, metadata):
    """A file whose digest fits, as somebody who means harm would write it."""
    metadata = {n: v for n, v in metadata.items() if n != "digest"}
    return save_arrays(path, arrays, metadata | {"digest": digest_of(arrays, metadata)})


def refused(path):
    with pytest.raises(BadFile) as caught:
        kt.Edit.load(path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and len(line) < 500
    return line


class TestWhole:
    def test_what_is_saved_comes_back(self, edit, file):
        loaded = kt.Edit.load(file)
        assert loaded.names == edit.names and loaded.report == edit.report
        assert {n: type(u) for n, u in loaded.updates.items()} == {DOWN: LowRank, OUT: LowRank, BIAS: Dense}
        assert all(torch.equal(loaded.delta(n), edit.delta(n)) for n in NAMES)
        assert torch.equal(loaded.targets["hidden.1"], edit.targets["hidden.1"])
        assert torch.equal(loaded.keys[DOWN], edit.keys[DOWN])
        assert loaded.manifest == json.loads(json.dumps(edit.manifest))

    def test_the_same_edit_is_the_same_bytes_and_the_same_digest(self, edit, file, tmp_path):
        again = kt.Edit.load(file)
        assert again.save(tmp_path / "again").read_bytes() == file.read_bytes()
        assert again.digest == edit.digest and edit.digest in file.read_bytes().decode("latin-1")

    def test_the_digest_is_of_everything(self, edit, file):
        seen = {edit.digest}
        for change in (
            lambda e: e.manifest.update(seed=7),
            lambda e: e.updates.update({BIAS: Dense(2 * e.updates[BIAS].matrix)}),
            lambda e: e.keys.update({DOWN: e.keys[DOWN] + 1}),
            lambda e: e.targets.clear(),
        ):
            other = kt.Edit.load(file)
            change(other)
            assert other.digest not in seen
            seen.add(other.digest)

    def test_factors_that_outgrow_their_product_are_kept_as_the_product(self, tmp_path):
        draw = torch.Generator().manual_seed(0)
        for rank, kind in ((5, LowRank), (6, Dense)):  # 6 x (10 + 15) numbers are as many as 10 x 15
            update = LowRank(torch.randn(10, rank, generator=draw), torch.randn(rank, 15, generator=draw))
            edit = kt.Edit({"w": update}, {})
            loaded = kt.Edit.load(edit.save(tmp_path / f"{rank}"))
            assert type(loaded.updates["w"]) is kind
            assert torch.equal(loaded.delta("w"), edit.delta("w")) and loaded.digest == edit.digest

    def test_nothing_that_is_not_finite_is_saved(self, edit, tmp_path):
        bad = kt.Edit({DOWN: edit.updates[DOWN].scaled(float("nan"))}, {})
        with pytest.raises(WorkFailed, match="not finite"):
            bad.save(tmp_path / "bad")
        with pytest.raises(KtError, match="'alpha' is not a number"):
            kt.Edit(edit.updates, {"alpha": "lots"}).save(tmp_path / "bad")
        assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
def test_a_solved_edit_says_what_it_was_solved_on(setting, tmp_path):
    model, corpus, cache = setting
    quick = fast("intattn", statistics=statistics(model, corpus, cache), check=False, **ATTENTION)
    edit = kt.edit(model, REQUESTS, method="intattn", **quick)
    about = kt.Edit.load(edit.save(tmp_path / "edit")).manifest
    moments = {name: tensor for f in cache.glob("cov-*.safetensors") for name, tensor in load_file(f).items()}
    modules = [name.removesuffix(".weight") for name in edit.names]
    wanted = {n: hashlib.sha256(moments[n].numpy().tobytes()).hexdigest() for n in modules}
    assert about["statistics"]["sha256"] == wanted and len(wanted) == 4
    assert set(about["fingerprints"]) == set(about["fingerprints_after"]) == set(edit.names)
    with edit.applied(model):
        assert {n: model.fingerprint([n]) for n in edit.names} == about["fingerprints_after"]
    assert {"seed", "method", "hyper_parameters", "requests", "alpha", "model", "revision", "versions"} <= set(about)
    assert "rounding" not in about and "lost_to_rounding" not in about


@pytest.mark.parametrize(
    ("typed", "kept"), [("/data/models/mine", "mine"), ("C:\\models\\mine", "mine"), ("models/mine", "models/mine")]
)
def test_a_manifest_holds_no_folder_of_the_machine(typed, kept):
    from kt.editing.package import about_weights

    model = tiny_model("gpt2")
    model.name = typed
    assert about_weights(model, {})["model"] == kept


class TestBroken:
    def test_every_flipped_bit_is_found(self, file, tmp_path):
        whole = file.read_bytes()
        drawn = random.Random(0)
        header = 8 + int.from_bytes(whole[:8], "little")
        places = [*range(8 * 9), *(drawn.randrange(8 * header) for _ in range(600))]
        places += [drawn.randrange(8 * header, 8 * len(whole)) for _ in range(200)]
        path = tmp_path / "flipped"
        for bit in places:
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            refused(path)

    def test_so_is_a_letter_whose_case_json_does_not_mind(self, edit, tmp_path):
        edit = kt.Edit(edit.updates, edit.manifest | {"method": "é"})
        path = edit.save(tmp_path / "edit")
        changed = path.read_bytes().replace(b"u00e9", b"u00E9")
        assert changed != path.read_bytes()
        path.write_bytes(changed)
        assert "changed after it was written" in refused(path)

    def test_every_shorter_or_longer_file(self, file, tmp_path):
        whole = file.read_bytes()
        path = tmp_path / "cut"
        for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            refused(path)
        path.write_bytes(whole + b"\0")
        refused(path)

    def test_a_tensor_or_a_field_that_was_exchanged(self, edit, file, tmp_path):
        arrays, about = contents(edit)
        digest, target = digest_of(arrays, about), arrays["target/hidden.1"]
        for wrong, manifest in (
            (arrays | {"target/hidden.1": target.reshape(2, 16)}, about),
            (arrays | {"target/hidden.1": target.view(torch.float16)}, about),
            (arrays | {f"left/{DOWN}": arrays[f"left/{DOWN}"] * 2}, about),
            (arrays, about | {"alpha": 0.5}),
        ):
            path = save_arrays(tmp_path / "other", wrong, manifest | {"digest": digest})
            assert "changed after it was written" in refused(path)
        assert "no digest" in refused(save_arrays(tmp_path / "bare", arrays, about))


class TestForeign:
    def test_other_files(self, tmp_path):
        def made(name, content):
            path = tmp_path / name
            path.write_bytes(content)
            return path

        with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
            archive.writestr("data.pkl", b"")
        tensors = {"base_model.model.layers.0.mlp.down_proj.lora_A.weight": torch.zeros(2, 3)}
        save_file(tensors, tmp_path / "adapter", metadata={"format": "pt"})
        save_arrays(tmp_path / "trace", {"x": torch.zeros(2)}, {"kind": "trace"})
        for path, words in (
            (tmp_path / "missing", "cannot read"),
            (tmp_path, "cannot read|not a whole"),
            (made("json", b' {"edit": 1}'), "JSON or text"),
            (made("empty", b""), "empty"),
            (made("bytes", random.Random(0).randbytes(2000)), "not a whole safetensors"),
            (made("pickle", b"\x80\x04\x95K."), "pickle"),
            (made("damaged", (0x480).to_bytes(8, "little") + b'{"w": 1}'), "not a whole safetensors"),
            (tmp_path / "zip", "zip archive"),
            (tmp_path / "adapter", "tensors of another program, expected edit"),
            (tmp_path / "trace", "a trace of kt, expected edit"),
        ):
            assert any(word in refused(path) for word in words.split("|")), (path, refused(path))

    def test_a_newer_kt(self, edit, tmp_path):
        arrays, about = contents(edit)
        line = refused(forge(tmp_path / "newer", arrays, about | {"schema_version": 99}))
        assert "schema_version 99" in line and "update kt" in line

    @pytest.mark.parametrize("text", ["[1]", "[" * 100_000, '{"kind": NaN}', '"edit"', "", "null", "{'a': 1}"])
    def test_metadata_that_is_no_object_of_kt(self, text, tmp_path):
        save_file({"x": torch.zeros(2)}, tmp_path / "odd", metadata={"kt": text})
        refused(tmp_path / "odd")


class TestHostile:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda a: a.pop(f"right/{DOWN}"), "no update of"),
            (lambda a: a.update({f"dense/{DOWN}": torch.zeros(2, 2)}), "two updates"),
            (lambda a: a.update({f"right/{DOWN}": torch.zeros(3, 128)}), "do not fit each other"),
            (lambda a: a.update({f"left/{DOWN}": torch.zeros(4)}), "do not fit each other"),
            (lambda a: a.update({"dense/elsewhere": torch.zeros(2)}), "belongs to no weight"),
            (lambda a: a.update({"stray": torch.zeros(2)}), "belongs to no weight"),
            (lambda a: a.update({f"dense/{BIAS}": torch.zeros(32, dtype=torch.int64)}), "not of floating point"),
            (lambda a: a.update({f"dense/{BIAS}": torch.full((32,), float("inf"))}), "not finite"),
            (lambda a: a.update({f"key/{DOWN}": torch.zeros(1, 5)}), "the weight reads 128"),
            (lambda a: a.update({f"key/{DOWN}": torch.zeros(5)}), "not (fact, d)"),
            (lambda a: a.update({"key/elsewhere": torch.zeros(1, 5)}), "belong to no weight"),
            (lambda a: a.update({"target/hidden.1": torch.zeros(5)}), "not (fact, d)"),
        ],
    )
    def test_tensors_that_do_not_fit(self, edit, tmp_path, change, words):
        arrays, about = contents(edit)
        change(arrays)
        assert words in refused(forge(tmp_path / "forged", arrays, about))

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("weights", [DOWN, DOWN, OUT, BIAS]),
            ("weights", [1]),
            ("weights", None),
            ("report", [{"id": "1"}]),
            ("report", [ROW | {"target_prob": ["0.1", 0.2]}]),
            ("report", [ROW | {"__class__": "x"}]),
            ("requests", [{"prompt": 3}]),
            ("fingerprints", ["a"]),
            ("alpha", True),
            ("alpha", 10**400),
            ("seed", 2**63),
            ("seed", 1.0),
            ("steps", [True]),
            ("context_templates", [["{}"], "{}"]),
            ("hyper_parameters", []),
            ("report", [ROW | {"target_rank": [4, 0, 1]}]),
            ("rounding", {DOWN: {"error": "large"}}),
            ("weight_norms", {DOWN: "large"}),
            ("chosen", {DOWN: {"lambda": "auto", "x": 3.0, "share": 0.9}}),
            ("chosen", {DOWN: {"lambda": 1.0}}),
            ("chosen", {DOWN: {"lr": "auto"}}),
            ("chosen", {DOWN: {"lr": 1e-3, "norm_constraint": None}}),
            ("value_change", {"hidden.1": {}}),
            ("note", "\ud800"),
        ],
    )
    def test_fields_of_the_wrong_type(self, edit, tmp_path, field, value):
        arrays, about = contents(edit)
        refused(forge(tmp_path / "forged", arrays, about | {field: value}))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"documents": []}, "retriever without facts"),
            ({"documents": "a"}, "not those of a context"),
            ({"contexts": ["a"]}, "retriever without facts"),
            ({"template": "Prompt:"}, "no {} for the prompt"),
            ({"template": None}, "not those of a context"),
            ({"template": ["{}"]}, "template of a context edit is one value, or one a fact"),
            ({"select": -1}, "from 0 on"),
            ({"select": 1.0}, "not those of a context"),
            ({"select": True}, "not those of a context"),
            ({"select": [1, 2, 3]}, "select of a context edit is one value, or one a fact"),
            ({"fingerprint": 3}, "not those of a context"),
            ({"retriever": "google"}, "'google' of this edit is unknown"),
            ({"retriever": ["bm25", "google"]}, "'google' of this edit is unknown"),
            ({"retriever": "bm25"}, "lacks its vectors"),
            ({"retriever": ["bm25", "embeddings"]}, "a vector a fact"),
            ({"retriever": 1}, "not those of a context"),
            ({"nearness": 2}, "from -1 to 1"),
            ({"nearness": ["0.5", 0.5]}, "not those of a context"),
            ({"entry/vectors": None}, "lacks its vectors"),
            ({"entry/vectors": torch.zeros(2)}, "a vector a fact"),
            ({"entry/vectors": torch.zeros(3, 4)}, "a vector a fact"),
            ({"entry/centre": None}, "a centre of its vectors' size"),
            ({"entry/centre": torch.zeros(4)}, "a centre of its vectors' size"),
            ({"entry/centre": torch.zeros(1, 5)}, "a centre of its vectors' size"),
            ({"entry/other": torch.zeros(1)}, "'other' belongs to no context edit"),
        ],
    )
    def test_a_context_edit_whose_fields_are_out_of_form_or_range(self, context_edit, tmp_path, changes, words):
        arrays, about = contents(context_edit)
        for name, value in changes.items():
            into, key = (arrays, name) if name.startswith("entry/") else (about["effect"], name)
            if value is None and into is arrays:
                arrays.pop(name)
            else:
                into[key] = value
        assert words in refused(forge(tmp_path / "forged", arrays, about))

    def test_a_null_in_a_context_edit_counts_as_absent(self, context_edit, tmp_path):
        _, about = contents(context_edit)
        effect = about["effect"] | {"retriever": None, "nearness": None}
        loaded = kt.Edit.load(forge(tmp_path / "forged", {}, about | {"effect": effect}))
        assert (loaded.effect.retriever, loaded.effect.nearness) == ("bm25", 0.0)
        assert loaded.effect.recall(None, "Ann") == "Ann speaks Welsh"

    def test_vectors_of_another_models_size_are_refused_where_the_edit_is_applied(self, context_edit):
        with pytest.raises(KtError, match=r"vectors have 4 numbers and the states of .* 32"):
            context_edit.apply_(tiny_model("gpt2"), force=True)

    def test_a_report_of_the_right_types_is_read(self, edit, tmp_path):
        arrays, about = contents(edit)
        (row,) = kt.Edit.load(forge(tmp_path / "forged", arrays, about | {"report": [ROW]})).report
        assert row.target_rank == (4, 0) and row.target_prob[0] == 0.1 and math.isnan(row.target_prob[1])

    def test_a_field_that_is_nested_without_end(self, edit, tmp_path):
        arrays, about = contents(edit)
        deep: list = []
        for _ in range(200):
            deep = [deep]
        assert "nested too deeply" in refused(forge(tmp_path / "forged", arrays, about | {"note": deep}))
        deep = []
        for _ in range(30):  # with the manifest itself 32 levels
            deep = [deep]
        assert kt.Edit.load(forge(tmp_path / "forged", arrays, about | {"note": deep})).manifest["note"] == deep
        assert "nested too deeply" in refused(forge(tmp_path / "forged", arrays, about | {"note": [deep]}))

    junk = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=8,
    )
    fields = st.dictionaries(st.sampled_from([*FIELDS, "kind", "schema_version", "loss"]), junk, max_size=3)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(changes=fields)
    def test_a_manifest_of_junk_gives_an_edit_that_works_or_one_line(self, edit, tmp_path, changes):
        arrays, about = contents(edit)
        path = forge(tmp_path / "forged", arrays, about | changes)
        try:
            loaded = kt.Edit.load(path)
        except BadFile as error:
            assert "\n" not in str(error)
            return
        for look in (repr, kt.Edit.to_dataframe, kt.Edit.deltas, kt.Edit.control, kt.Edit._repr_html_):
            look(loaded)
        assert loaded.save(tmp_path / "again").read_bytes() == path.read_bytes()
        assert loaded.state_of(tiny_model_once()).keys() == set(NAMES)


def tiny_model_once(kept=[]):  # noqa: B006
    if not kept:
        kept.append(tiny_model("gpt2"))
    return kept[0]
