"""`kt run methods`: methods at the same numbers of edits, shared searches, failures, and rows that are kept."""

import json
import sys
import warnings
from dataclasses import replace

import pytest
import torch

import kt
from kt.cli.app import main
from kt.editing.methods import METHODS
from kt.errors import BadFile, KtError
from kt.experiments.methods_table import SHOWN, Place, methods_table, told_apart
from kt.recipes import read_recipe
from kt.stats import Interval

FAST = {"v_num_grad_steps": 3, "layers": (1, 2), "clamp_norm_factor": 1.0}
ROW = '[[rows]]\nlabel = "{}"\nmethod = "ft"\n'
PLACES = [Place("single", 1), Place("batch", 3), Place("steps", 4)]


@pytest.fixture(scope="module")
def demo():
    torch.set_num_threads(1)
    return kt.load("demo")


@pytest.fixture(scope="module")
def facts():
    from kt.demo.loop import spread
    from kt.experiments import distinct

    return spread(distinct([fact for fact in kt.load_facts("demo") if fact.neighbours]), 4)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The settings of a small table: little text, few tokens."""
    text = tmp_path_factory.mktemp("text") / "held.txt"
    text.write_text("The capital of France is Paris.\nThe sea is wide.\n", encoding="utf-8")
    return {"heldout": text, "max_tokens": 2_000, "fluency": 0}


@pytest.fixture(scope="module")
def found(demo, facts, few):
    methods = {"memit": {"method": "memit", **FAST}, "emmet": {"method": "emmet", **FAST}, "scr": {"method": "scr"}}
    return methods_table(demo, facts, methods, PLACES, against=("memit",), singles=2, step=2, **few | {"fluency": 1})


def test_a_row_is_what_kt_edit_and_kt_evaluate_give(demo, facts, found):
    row = next(r for r in found.rows if (r.series, r.label) == ("memit", "3"))
    edit = kt.edit(demo, facts[:3], "memit", max_tokens=2_000, check=False, **FAST)
    before = kt.evaluate(demo, facts[:3], generate=False)
    with edit.applied(demo, force=True):
        after = kt.evaluate(demo, facts[:3], before, generate=False)
    assert row.values[SHOWN["edit success"]] == after.values[SHOWN["edit success"]]
    assert row.values[SHOWN["locality"]] == after.values[SHOWN["locality"]]


def test_every_method_has_a_row_at_every_place_and_the_model_is_as_before(demo, found):
    assert [(r.series, r.label) for r in found.rows] == [
        (name, place) for place in ("1", "3", "4 in steps") for name in ("memit", "emmet", "scr")
    ]
    assert demo.fingerprint() == kt.load("demo").fingerprint()
    assert [row.metrics[SHOWN["edit success"]]["n"] for row in found.rows] == [2, 2, 2, 3, 3, 3, 4, 4, 4]


def test_values_that_two_methods_search_for_alike_are_searched_once_and_counted_in_both(demo, facts, few, monkeypatch):
    from kt.editing.closed_form import targets

    searched = []
    whole = targets._find_batch
    monkeypatch.setattr(targets, "_find_batch", lambda *a: searched.append(len(a[1])) or whole(*a))
    both = {name: {"method": name, **FAST} for name in ("memit", "emmet")}
    two = methods_table(demo, facts[:3], both, [Place("batch", 3)], **few)
    assert sum(searched) == 3
    alone = methods_table(demo, facts[:3], {"emmet": both["emmet"]}, [Place("batch", 3)], **few)
    assert sum(searched) == 6
    assert two.rows[1].values == alone.rows[0].values
    assert two.rows[1].seconds["solve"] > 0.5 * two.rows[0].seconds["solve"]


def test_a_run_that_goes_on_with_another_method_takes_the_values_that_were_found_before(
    demo, facts, few, monkeypatch, tmp_path
):
    from kt.editing.closed_form import targets

    searched = []
    whole = targets._find_batch
    monkeypatch.setattr(targets, "_find_batch", lambda *a: searched.append(len(a[1])) or whole(*a))
    both = {name: {"method": name, **FAST} for name in ("memit", "emmet")}
    kept = {"folder": tmp_path / "run", **few}
    one = methods_table(demo, facts[:3], both, [Place("batch", 3)], only=["memit"], **kept)
    two = methods_table(demo, facts[:3], both, [Place("batch", 3)], only=["emmet"], resume=True, **kept)
    assert sum(searched) == 3 and [row.series for row in two.rows] == ["memit", "emmet"]
    assert two.rows[0].values == one.rows[0].values
    assert two.rows[1].seconds["solve"] > 0.5 * two.rows[0].seconds["solve"]
    assert two.rows[1].values == methods_table(demo, facts[:3], both, [Place("batch", 3)], **few).rows[1].values


def test_a_search_with_tensors_of_its_own_is_not_shared(demo, facts, few, monkeypatch):
    """EAMET searches fact by fact with what it found before: the second time as often as the first."""
    from kt.editing.closed_form import targets

    searched = []
    whole = targets._find_batch
    monkeypatch.setattr(targets, "_find_batch", lambda *a: searched.append(len(a[1])) or whole(*a))
    twice = {name: {"method": "eamet", **FAST} for name in ("one", "two")}
    methods_table(demo, facts[:2], twice, [Place("batch", 2)], **few)
    assert sum(searched) == 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a peak begins anew on Linux alone")
def test_a_peak_begins_anew_and_that_of_the_whole_process_is_kept():
    from kt.runs.provenance import peak_memory, peaks_from_now

    large = torch.ones(60_000_000)  # 240 MB
    del large
    since, before = peaks_from_now(), peak_memory()["host"]
    assert since()["host"] < before - 100_000_000
    assert peak_memory()["host"] >= before


def test_a_method_that_cannot_be_run_says_why_and_the_others_run(demo, facts, few):
    methods = {"mend": {"method": "mend"}, "scr": {"method": "scr"}}
    got = methods_table(demo, facts[:2], methods, [Place("batch", 2)], **few)
    assert [bool(row.metrics) for row in got.rows] == [False, True]
    assert "editor" in got.tables()[-1].rows[0][2]


def test_differences_are_paired_and_a_tie_is_called_one(found):
    row = next(r for r in found.rows if (r.series, r.label) == ("scr", "3"))
    gap = found.difference(row, "memit")["edit success"]
    memit = next(r for r in found.rows if (r.series, r.label) == ("memit", "3"))
    mean = lambda r: r.metrics[SHOWN["edit success"]]["mean"]  # noqa: E731
    assert gap.mean == pytest.approx(mean(row) - mean(memit))
    same = found.difference(memit, "memit")["edit success"]
    assert (same.mean, same.ci95) == (0.0, (0.0, 0.0))
    assert told_apart(same) == "= +0.000 [+0.000, +0.000]"
    assert told_apart(Interval(0.2, 0.1, 0.3, 5)) == "+0.200 [+0.100, +0.300]"
    assert told_apart(Interval(0.2, -0.1, 0.3, 5)) == "= +0.200 [-0.100, +0.300]"


def test_more_methods_are_added_to_a_run_and_kept_rows_are_not_measured_again(tmp_path, capsys):
    run = ["run", "methods", "--smoke", "--quiet", "--no-progress"]
    main([*run, "--only", "scr", "-o", str(tmp_path / "a")])
    first = json.loads((tmp_path / "a/results.json").read_text())["models"]["smollm2"]["rows"]
    main([*run, "--only", "ice", "--resume", str(tmp_path / "a")])
    both = json.loads((tmp_path / "a/results.json").read_text())["models"]["smollm2"]["rows"]
    assert {row["series"] for row in both} == {"scr", "ice"}
    assert [row for row in both if row["series"] == "scr"] == first


def test_a_run_that_is_cut_in_its_first_search_goes_on_with_what_it_found(tmp_path, capsys, monkeypatch):
    from kt.editing.closed_form import targets

    searched, whole, run = [], targets._find_batch, ["run", "methods", "--smoke", "--quiet", "--no-progress"]

    def cut(*arguments):
        if len(searched) == 1:
            raise KeyboardInterrupt
        searched.append(1)
        return whole(*arguments)

    monkeypatch.setattr(targets, "_find_batch", cut)
    assert main([*run, "--only", "memit", "-o", str(tmp_path / "a")]) == 130
    assert "go on with --resume" in capsys.readouterr().err and not list(tmp_path.rglob("points/*"))
    assert main([*run, "--only", "memit", "-o", str(tmp_path / "a")]) == 2
    assert "holds a run that was cut; go on with --resume" in capsys.readouterr().err
    monkeypatch.setattr(targets, "_find_batch", lambda *a: searched.append(len(a[1])) or whole(*a))
    assert main([*run, "--only", "scr", "--resume", str(tmp_path / "a")]) == 0  # another row, and memit's has no point
    took, rows = {}, {}
    for folder, way in (("a", "--resume"), ("b", "-o")):
        searched.clear()
        assert main([*run, "--only", "memit", way, str(tmp_path / folder)]) == 0
        every = json.loads((tmp_path / folder / "results.json").read_text())["models"]["smollm2"]["rows"]
        took[folder], rows[folder] = sum(searched), [row["metrics"] for row in every if row["series"] == "memit"]
    assert rows["a"] == rows["b"] and took["a"] == took["b"] - 1


def test_a_damaged_searched_value_is_searched_for_again(demo, facts, few, tmp_path):
    both = {name: {"method": name, **FAST} for name in ("memit", "emmet")}
    kept = {"folder": tmp_path / "run", **few}
    methods_table(demo, facts[:2], both, [Place("batch", 2)], only=["memit"], **kept)
    values = sorted((tmp_path / "run").rglob("-searched/phases/*"))
    for path in values:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.warns(UserWarning, match="this value is searched for again"):
        found = methods_table(demo, facts[:2], both, [Place("batch", 2)], only=["emmet"], resume=True, **kept)
    assert [row.settings.get("failed") for row in found.rows] == [None, None]
    assert len(values) == 2 and min(path.stat().st_size for path in values) > 60


def test_a_row_that_failed_is_measured_again_where_its_run_goes_on(demo, facts, few, tmp_path, monkeypatch):
    from kt.experiments.sweep_solving import Solver

    def failing(self, *arguments):
        raise KtError("no room on the disk")

    methods, kept = {"scr": {"method": "scr"}}, {"folder": tmp_path / "run", **few}
    with monkeypatch.context() as patch:
        patch.setattr(Solver, "solve", failing)
        first = methods_table(demo, facts[:2], methods, [Place("batch", 2)], **kept)
    assert first.rows[0].settings["failed"] == "no room on the disk"
    again = methods_table(demo, facts[:2], methods, [Place("batch", 2)], resume=True, **kept)
    assert "failed" not in again.rows[0].settings and again.rows[0].metrics


def test_the_recipe_has_every_method_and_wrong_ones_are_one_line(tmp_path):
    recipe = read_recipe("methods")
    assert [line.label for line in recipe.rows] == list(METHODS)
    with pytest.raises(KtError, match="memit"):
        recipe.named(["memti"])
    path = tmp_path / "own.toml"
    text = (
        'kind = "methods"\nsummary = ""\npaper = ""\nplace = ""\nagainst = ["memti"]\n[data]\nfacts = "demo"\n'
        'edits = 5\n[places]\nbatches = [5]\n[models]\ndemo = "demo"\n'
    )
    for old, new, words in [
        ('"memti"', '"memti"', "memti"),
        ('["memti"]\n[data]', "[]\n[data]\nseeds = [1, 2]", "one seed"),
        (
            '["memti"]\n',
            "[]\n[[rows]]\nlabel = 'a b'\nmethod = 'ft'\n[[rows]]\nlabel = 'a/b'\nmethod = 'ft'\n",
            "label",
        ),
        ('["memti"]', "[]", None),
        ("batches = [5]", "batches = [9]", "data.edits = 5"),
        ("batches = [5]", "singles = 6", "data.edits = 5"),
        ("batches = [5]", "batches = [5, 5]", "twice"),
        ("batches = [5]", "batches = [2.7]", "batches is 2.7; give a whole number of at least 1"),
        ("batches = [5]", "batches = [true]", "batches is True; give a whole number"),
        ("batches = [5]", "singles = -3", "singles is -3; give a whole number of at least 0"),
        ("batches = [5]", "steps = [4]\nstep = 0", "step is 0; give a whole number of at least 1"),
        ("batches = [5]", "batches = [5]\nfluency = -1", "fluency is -1"),
        ("batches = [5]", "", "names no number of edits"),
        ("edits = 5", "edits = 5.5", "edits is 5.5; give a whole number"),
        ("edits = 5", "edits = 5\nseeds = [true]", "seeds is True; give a whole number"),
        ("edits = 5", "edits = 5\nseeds = []", "seeds is empty"),
        ("[data]", "[[rows]]\nlabel = 'a'\nmethod = 'memit'\noptions = { v_lrr = 1 }\n[data]", "did you mean v_lr?"),
        (
            "[data]",
            "[[rows]]\nlabel = 'a'\nmethod = 'memit'\noptions = { v_num_grad_steps = 0 }\n[data]",
            "row 'a': v_num_grad_steps must be at least 1",
        ),
    ]:
        path.write_text(text.replace(old, new) if "memti" in old else text.replace('"memti"', "").replace(old, new))
        if words is None:
            assert read_recipe(path).limited(2).batches == (2,)
            continue
        with pytest.raises(BadFile, match=words):
            read_recipe(path)


def test_a_smoke_run_has_a_size_of_its_own_and_takes_no_limit(capsys):
    assert main(["run", "jeep-figure-2", "--smoke", "--limit", "3"]) == 2
    assert "leave --model, --facts and --limit out" in capsys.readouterr().err


def test_a_limit_takes_numbers_of_edits_away_and_adds_none_beside_them():
    recipe = replace(read_recipe("methods"), singles=5, batches=(10, 100), steps=(100, 500))
    sizes = lambda limit, **own: (lambda r: (r.singles, r.batches, r.steps))(replace(recipe, **own).limited(limit))  # noqa: E731
    assert sizes(None) == (5, (10, 100), (100, 500))
    assert sizes(200) == (5, (10, 100), (100,))
    assert sizes(3) == (3, (3,), ())
    assert sizes(3, batches=(), steps=(2, 6)) == (3, (), (2,))
    assert sizes(3, batches=(), steps=(6,)) == (3, (), (3,))


def test_single_facts_are_as_many_as_asked_for_whatever_else_is_edited(demo, facts, few):
    alone = methods_table(demo, facts, {"scr": {"method": "scr"}}, [Place("single", 1)], singles=3, **few)
    assert alone.rows[0].metrics[SHOWN["edit success"]]["n"] == 3
    with pytest.raises(KtError, match="places is empty"):
        methods_table(demo, facts, {"scr": {"method": "scr"}}, [], **few)


def test_a_seed_takes_the_place_of_the_recipes_own(tmp_path, capsys):
    run = ["run", "methods", "--smoke", "--quiet", "--no-progress", "--only", "memit"]
    found = []
    for seed, given in ((0, []), (7, ["--seed", "7"])):
        main([*run, *given, "-o", str(tmp_path / f"s{seed}")])
        held, manifest = (
            json.loads((tmp_path / f"s{seed}/{name}.json").read_text()) for name in ("results", "manifest")
        )
        model = held["models"]["smollm2"]
        assert manifest["seed"] == model["seed"] == seed
        found.append([row["metrics"] for row in model["rows"]])
        assert any((tmp_path / f"s{seed}").rglob("-searched/phases/*"))  # a run that goes on takes them
    assert found[0] != found[1]
    capsys.readouterr()
    assert main([*run, "--seed", "8", "--resume", str(tmp_path / "s7")]) == 2
    assert "was begun with seeds [7], now it is [8]" in capsys.readouterr().err
    assert read_recipe("jeep-figure-2").seeded(1).seeds == (1,)
    assert read_recipe("intattn-figures-1-2").seeded(3).seeds == (3,)
    assert read_recipe("intattn-table-1").seeded(3).seeds == (3,)


def test_rows_that_differ_in_alpha_alone_each_cost_their_own_solve(demo, facts, few):
    rows = {
        f"{alpha:g}": {"method": "intattn", "alpha": alpha, "layers_attn": (3,), **FAST, "layers": (1,)}
        for alpha in (0.2, 0.8)
    }
    found = methods_table(demo, facts[:3], rows, [Place("batch", 3)], **few)
    one, two = (row.seconds["solve"] for row in found.rows)
    assert two > 0.5 * one > 0
    edit = kt.edit(demo, facts[:3], max_tokens=2_000, check=False, **rows["0.8"])
    with edit.applied(demo, force=True):
        after = kt.evaluate(demo, facts[:3], kt.evaluate(demo, facts[:3], generate=False), generate=False)
    assert found.rows[1].values[SHOWN["edit success"]] == after.values[SHOWN["edit success"]]


def test_what_a_method_does_not_read_is_not_given_to_it_to_be_told_of(demo, facts, few):
    methods = {"ike": {"method": "ike"}, "ft": {"method": "ft", "num_steps": 1, "layers": (1,)}}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        methods_table(demo, facts[:2], methods, [Place("batch", 2), Place("steps", 2)], step=1, **few)
    assert not [str(each.message) for each in said if "without effect" in str(each.message)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settings", []),
        ("values", None),
        ("values", {"edit_success_tf_exact": 1}),
        ("metrics", {"edit_success_tf_exact": 3}),
        ("metrics", {"edit_success_tf_exact": {"mean": 1.0}}),
        ("metrics", {"edit_success_tf_exact": {"mean": "x", "ci95": None, "n": 2}}),
        ("metrics", {"edit_success_tf_exact": {"mean": 1.0, "ci95": [0.0], "n": 2}}),
        ("values", {"edit_success_tf_exact": {"0": "x"}}),
        ("seconds", {"solve": "3"}),
        ("x", "3"),
        ("series", None),
    ],
)
def test_a_damaged_row_is_named_with_what_to_do(demo, facts, few, tmp_path, name, value):
    methods, kept = {"scr": {"method": "scr"}}, {"folder": tmp_path / "run", **few}
    methods_table(demo, facts[:2], methods, [Place("batch", 2)], **kept)
    (path,) = (tmp_path / "run").glob("scr/points/*.json")
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}), encoding="utf-8")
    with pytest.raises(
        BadFile, match=rf"points.*: not a whole point \(TypeError: {name} has another form\); delete it"
    ):
        methods_table(demo, facts[:2], methods, [Place("batch", 2)], resume=True, **kept)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("settings", {}, "it is of scr, None 2, not of scr, batch 2"),
        ("settings", {"mode": "batch"}, "settings solves is missing"),
        ("seconds", {}, "seconds solve is missing"),
        ("metrics", {}, "metrics edit success is missing"),
        ("label", "zzz", "it is of scr, batch zzz, not of scr, batch 2"),
        ("series", "memit", "it is of memit, batch 2, not of scr, batch 2"),
    ],
)
def test_a_kept_row_of_another_place_or_with_a_part_missing_is_no_row(demo, facts, few, tmp_path, name, value, words):
    methods, kept = {"scr": {"method": "scr"}}, {"folder": tmp_path / "run", **few}
    methods_table(demo, facts[:2], methods, [Place("batch", 2)], **kept)
    (path,) = (tmp_path / "run").glob("scr/points/*.json")
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}), encoding="utf-8")
    with pytest.raises(BadFile, match=rf"points.*: not a whole point \(ValueError: {words}\); delete it"):
        methods_table(demo, facts[:2], methods, [Place("batch", 2)], resume=True, **kept)
