"""Recipes are read strictly: a value of another kind is refused with one line that says what to give."""

import re

import pytest

import kt
from kt.errors import BadFile, KtError, WorkFailed
from kt.recipes import read_recipe, run_recipe

HEAD = """
summary = "s"
paper = "p"
place = "Table 9"
"""
TABLES = """
[data]
facts = "demo"
edits = 2
[models]
"m" = "demo"
"""
ROW = '[[rows]]\nlabel = "MEMIT"\nmethod = "memit"\n'
COLUMNS = '[columns]\n"ES" = "edit_success_tf_token"\n'
EDITS = HEAD + TABLES + COLUMNS + ROW + '[rows.paper]\n"m" = [[50.0, 0.5]]\n'
CASE = 'kind = "case"\n' + HEAD + TABLES + ROW + '[rows.paper]\n"m" = ["a", ["b", true], "c"]\n'
ABILITIES = (
    'kind = "abilities"\n' + HEAD + TABLES + '[columns]\n"ACC" = "gsm8k/exact_match,none"\n'
    '[abilities]\ntasks = ["gsm8k"]\n[scales]\n"ACC" = 1.0\n' + ROW
)
METHODS = 'kind = "methods"\nagainst = ["MEMIT"]\n' + HEAD + TABLES + "[places]\nbatches = [1, 2]\n" + ROW
OF_EDITS = {"edits": EDITS, "case": CASE, "abilities": ABILITIES, "methods": METHODS}
FIGURE = HEAD + '[data]\nfacts = "demo"\n[models]\n"m" = "demo"\n'
CLAIM = '[[claims]]\nsays = "so"\nsection = "1"\ncheck = '
TRACE = f'kind = "trace"\n{FIGURE}[trace]\nsamples = 2\n{CLAIM}"peak"\nkind = "attn"\nlayers = [1, 5]\n'
PROBE = f'kind = "probe"\n{FIGURE}[probe]\ndraws = "answers"\n{CLAIM}"steps-back"\nanswer = "target"\nlayer = -2\n'
TEXTS = {**OF_EDITS, "trace": TRACE, "probe": PROBE}


@pytest.fixture
def own(tmp_path):
    def write(kind, old="", new=""):
        assert old in TEXTS[kind]
        path = tmp_path / "own.toml"
        path.write_text(TEXTS[kind].replace(old, new), encoding="utf-8")
        return path

    return write


def check_refused(path, words):
    with pytest.raises(BadFile, match=re.escape(words)) as error:
        read_recipe(path)
    assert error.value.exit_code == 2 and "\n" not in str(error.value) and str(path) in str(error.value)


def test_the_recipes_of_these_tests_are_read_as_they_stand(own):
    assert [read_recipe(own(kind)).kind for kind in TEXTS] == list(TEXTS)


@pytest.mark.parametrize("name", ["method", "seed", "journal", "requests", "progress", "history"])
def test_the_options_of_a_row_cannot_replace_what_the_recipe_or_its_run_gives(own, name):
    new = f'method = "memit"\noptions = {{ {name} = "rome" }}\n'
    for kind in OF_EDITS:
        check_refused(own(kind, 'method = "memit"\n', new), f"row 'MEMIT': options hold {name!r}")


@pytest.mark.parametrize("kind", ["edits", "case", "abilities"])
def test_two_rows_of_one_label_are_refused(own, kind):
    check_refused(own(kind, ROW, ROW + ROW), "[[rows]] label names 'MEMIT' twice")


@pytest.mark.parametrize(
    ("new", "words"),
    [
        ("unedited = true", "method 'memit' and unedited = true are two rows"),
        ('unedited = "false"', "unedited is 'false'; give true or false"),
        ("unedited = 0", "unedited is 0; give true or false"),
        ("options = 3", "options is 3; give a table"),
        ("options = { alpha = true }", "alpha True"),
        ("options = { alpha = 0.5 }", "alpha 0.5 was given to a method that leaves attention alone"),
        ("options = { v_num_grad_steps = true }", "v_num_grad_steps True"),
    ],
)
def test_a_row_says_strictly_what_it_edits(own, new, words):
    for kind in OF_EDITS:
        check_refused(own(kind, 'method = "memit"', f'method = "memit"\n{new}'), words)


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        ("true", "is True; give the paper's figure"),
        ('"50"', "is '50'; give the paper's figure"),
        ("nan", "is nan; give"),
        ("[50.0, -0.5]", "is [50.0, -0.5]; give"),
        ("[50.0, 0.5, 0.1]", "[figure, half-width from 0]"),
        ("[]", "is []; give"),
    ],
)
def test_a_figure_of_the_paper_is_a_number_with_a_half_width(own, figure, words):
    check_refused(own("edits", "[50.0, 0.5]", figure), words)


def test_a_text_of_the_paper_is_right_or_not(own):
    check_refused(own("case", '["b", true]', '["b", "false"]'), "is ['b', 'false']; give a text")
    check_refused(own("case", '["b", true]', "3"), "is 3; give a text")
    assert read_recipe(own("case")).rows[0].cited["m"][1] == ("b", True)


def with_axis(own, name, values, option="", paper=""):
    options = f"options = {{ {option} }}\n" if option else ""
    cited = f"[rows.paper]\n{paper} = [50.0]\n" if paper else ""
    axis = f"[axis]\nname = {name}\nvalues = {values}\n"
    return own("edits", EDITS[len(HEAD + TABLES) :], axis + COLUMNS + ROW + options + cited)


@pytest.mark.parametrize(
    ("name", "values", "option", "words"),
    [
        ('"edits"', "[1, 1.0]", "", "[axis] values names '1' twice"),
        ('"v_lr"', "[0.1, 0.1]", "", "[axis] values names '0.1' twice"),
        ('"v_lr"', "[]", "", "[axis] values is []; give a list"),
        ('"v_lr"', "[true, false]", "", "[axis] values is [True, False]; give a list"),
        ('"v_lr"', "[[1, 2]]", "", "[axis] values is [[1, 2]]; give a list"),
        ('"v_lr"', "0.5", "", "[axis] values is 0.5; give a list"),
        ('"v_lr"', '["fast"]', "", "v_lr 'fast' is no float"),
        ('"v_num_grad_steps"', "[2.5]", "", "v_num_grad_steps 2.5 is no int"),
        ('"v_num_grad_stepz"', "[2]", "", "v_num_grad_stepz"),
        ('"alpha"', "[0.1, 0.2]", "", "alpha 0.1 was given to a method that leaves attention alone"),
        ('"method"', '["memit", "rome"]', "", "[axis] name is 'method'"),
        ('"v_lr"', "[0.1, 0.2]", "v_lr = 0.5", "options hold 'v_lr', which is the axis"),
        ("3", "[1]", "", "[axis] name is 3; give a text"),
        ('"edits"', '["two"]', "", "edits between 1 and data.edits = 2"),
        ('"edits"', "[3]", "", "edits between 1 and data.edits = 2"),
    ],
)
def test_an_axis_holds_values_that_the_methods_of_the_rows_take(own, name, values, option, words):
    check_refused(with_axis(own, name, values, option), words)


def test_an_axis_keeps_whole_numbers_whole_and_texts_texts(own):
    whole = read_recipe(with_axis(own, '"v_num_grad_steps"', "[2, 3]", paper='"m/2"'))
    assert whole.values == (2, 3) and all(type(value) is int for value in whole.values)
    texts = read_recipe(with_axis(own, '"spread"', '["even", "rest"]', paper='"m/rest"'))
    assert texts.values == ("even", "rest") and list(texts.rows[0].cited) == ["m/rest"]


@pytest.mark.filterwarnings("ignore")
def test_the_values_of_an_axis_reach_the_edit_and_stand_in_the_table(own):
    demo = kt.load("demo")
    recipe = read_recipe(with_axis(own, '"v_num_grad_steps"', "[2, 3]", paper='"m/2.0"'))
    found = run_recipe(recipe, lambda name: demo, corpus="demo")
    assert [row.settings["v_num_grad_steps"] for row in found.sweeps["m"].rows] == [2, 3]
    assert [(cell.at, cell.paper is not None) for cell in found.cells] == [(2, True), (3, False)]
    assert [line[1] for line in found.lines()] == ["2", "3"]


def test_a_metric_that_kt_does_not_have_is_refused_before_a_model_is_loaded(own):
    recipe = read_recipe(own("edits", "edit_success_tf_token", "edit_success_tf_tokn"))
    with pytest.raises(BadFile, match=r"no metric 'edit_success_tf_tokn'; did you mean edit_success_tf_token\?"):
        run_recipe(recipe, lambda name: pytest.fail("loaded"))
    recipe = read_recipe(own("edits", "edit_success_tf_token", "neighbourhood_kl"))
    with pytest.raises(BadFile, match="'ES': neighbourhood_kl is of kt eval --kl alone; name another"):
        run_recipe(recipe, lambda name: pytest.fail("loaded"))
    check_refused(own("edits", '"edit_success_tf_token"', "3"), "[columns] 'ES' is 3; give a text")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("metric", ["neighbourhood_same_argmax", "score_prob_harmonic", "perplexity_heldout"])
def test_a_column_is_measured_whatever_its_metrics_name_says(own, metric):
    demo = kt.load("demo")
    recipe = read_recipe(own("edits", '"edit_success_tf_token"', f'"{metric}"'))
    found = run_recipe(recipe, lambda name: demo, corpus="demo")
    (cell,) = found.cells
    assert cell.mean is not None
    if metric == "perplexity_heldout":
        assert recipe.scales == {"ES": 1.0}, "as it is, in no percent"


OF_TABLES = [
    ("edits", "edits = 2", "edits = 2\nseeds = [0, 0]", "[data] seeds names 0 twice"),
    ("edits", "edits = 2", "edits = 2\nseeds = 3", "[data] seeds is 3; give a list"),
    ("edits", "edits = 2", "edits = 2\nvariant = 3", "[data] variant is 3; give a text"),
    ("edits", "[columns]", "[statistics]\ncorpus = true\n[columns]", "[statistics] corpus is True; give a text"),
    ("methods", 'against = ["MEMIT"]', 'against = "MEMIT"', "against is 'MEMIT'; give a list of texts"),
    ("methods", 'against = ["MEMIT"]', 'against = ["MEMIT", "MEMIT"]', "against names 'MEMIT' twice"),
    ("methods", "batches = [1, 2]", "batches = 2", "[places] batches is 2; give a list"),
    ("abilities", 'tasks = ["gsm8k"]', 'tasks = "gsm8k"', "[abilities] tasks is 'gsm8k'; give a list"),
    ("abilities", 'tasks = ["gsm8k"]', "tasks = []", "[abilities] tasks is []; give a list"),
    ("abilities", "[scales]", "limit = true\n[scales]", "[abilities] limit is True; give"),
    ("abilities", "[scales]", "limit = -3\n[scales]", "[abilities] limit is -3; give"),
    ("abilities", "[scales]", 'apart = "ACC"\n[scales]', "[abilities] apart is 'ACC'; give a list"),
    ("abilities", "[scales]", "include_path = 3\n[scales]", "[abilities] include_path is 3; give a text"),
    ("abilities", '"ACC" = 1.0', '"ACC" = true', "[scales] 'ACC' is True; give a number"),
    ("case", "[[rows]]\nlabel", "[case]\nsubject = 3\n[[rows]]\nlabel", "[case] subject is 3; give a text"),
]
OF_CLAIMS = [
    ("trace", "layers = [1, 5]", "layers = [1.5, 5]", "layers is [1.5, 5]; give the first and the last layer"),
    ("trace", "layers = [1, 5]", "layers = [0, 5]", "layers is [0, 5]; give"),
    ("trace", "layers = [1, 5]", "layers = [5, 1]", "layers is [5, 1]; give"),
    ("trace", "layers = [1, 5]", "layers = [1]", "layers is [1]; give"),
    ("trace", "layers = [1, 5]", "layers = [true, 5]", "layers is [True, 5]; give"),
    ("trace", "layers = [1, 5]", 'layers = "15"', "layers is '15'; give"),
    ("trace", "layers = [1, 5]", 'layers = [1, 5]\npart = "low"', "layers and part both say where"),
    ("trace", "layers = [1, 5]", 'layers = [1, 5]\neither_count = "false"', "either_count is 'false'; give true"),
    ("trace", "layers = [1, 5]", "either_count = true", "either_count is about layers, which are not there"),
    ("trace", "layers = [1, 5]", "metrics = []", "metrics is []; give a list of texts"),
    ("trace", "layers = [1, 5]", 'metrics = "prob"', "metrics is 'prob'; give a list of texts"),
    ("trace", "layers = [1, 5]", 'metrics = ["prob", "prob"]', "metrics names 'prob' twice"),
    ("trace", 'kind = "attn"', 'kind = ["attn"]', "kind is ['attn']; give a text"),
    ("trace", 'says = "so"', "says = 3", "says is 3; give a text"),
    ("trace", 'check = "peak"', "check = 3", "no check 3; there are peak"),
    ("trace", "layers = [1, 5]", f'{CLAIM}"falls"\nkind = "mlp"\nafter = 2.5', "after is 2.5; give a whole number"),
    ("trace", "layers = [1, 5]", f'{CLAIM}"falls"\nkind = "mlp"\nafter = 0', "after is 0; give a whole number"),
    ("trace", "layers = [1, 5]", f'{CLAIM}"alpha"\nnear = "0.3"', "near is '0.3'; give a number"),
    ("trace", "layers = [1, 5]", f'{CLAIM}"alpha"\nnear = 0.3\nby = 0', "by is 0; give a number above 0"),
    ("trace", "layers = [1, 5]", f'{CLAIM}"role"\nkind = "mlp"\nroles = []', "roles is []; give a list"),
    ("trace", "layers = [1, 5]", f'{CLAIM}"role"\nkind = "mlp"\nroles = ["object"]', "roles has no 'object'"),
    ("probe", "layer = -2", "layer = 5", "layer is 5; give a layer counted from the end"),
    ("probe", "layer = -2", "layer = -1.5", "layer is -1.5; give a layer counted from the end"),
    ("probe", 'answer = "target"', 'answer = ["target"]', "answer is ['target']; give a text"),
    (
        "probe",
        "layer = -2",
        f'layer = -2\n{CLAIM}"mirrors"\nset = "x"\nabove = true',
        "above is True; give a number",
    ),
    ("probe", "layer = -2", f'layer = -2\n{CLAIM}"rises"\nset = 3', "set is 3; give a text"),
    ("case", ROW, f'{CLAIM}"all-right"\nroles = "edited"\n{ROW}', "roles is 'edited'; give a list of texts"),
]
OF_FIGURES = [
    ("probe", 'draws = "answers"', 'draws = "answers"\nfinal_norm = "false"', "final_norm is 'false'; give true"),
    ("probe", 'draws = "answers"', 'draws = "sets"\nsets = 5', "[probe] sets is 5; give a text"),
    ("probe", 'draws = "answers"', 'draws = ["answers"]', "[probe] draws is ['answers']; give a text"),
    ("trace", "samples = 2", "samples = true", "[trace] samples is True; give a whole number"),
    ("trace", "samples = 2", "samples = 0", "[trace] samples is 0; give a whole number of at least 1"),
    ("trace", "samples = 2", 'kinds = "mlp"', "[trace] kinds is 'mlp'; give a list of texts"),
    ("trace", "samples = 2", "kinds = []", "[trace] kinds is []; give a list of texts"),
    ("trace", "samples = 2", "noise_scale = -1", "[trace] noise_scale is -1; give a number"),
    ("trace", "samples = 2", "noise_scale = 0.0", "[trace] noise_scale is 0.0; give a number above 0"),
    ("trace", "samples = 2", "window = 1.5", "[trace] window is 1.5; give a whole number"),
    ("trace", "samples = 2", 'corrupt = "swop"', "[trace] corrupt has no 'swop'; there are noise, swap"),
    ("trace", "samples = 2", "keep = true", "[trace] keep is True; give a text"),
    ("trace", "samples = 2", 'direction = "back"', "[trace] direction has no 'back'; there are denoise, noise"),
    ("trace", 'place = "Table 9"', 'place = "Table 9"\nnotes = "abc"', "notes is 'abc'; give a list of texts"),
    ("trace", 'facts = "demo"', "facts = 3", "[data] facts is 3; give a text"),
]


@pytest.mark.parametrize(("kind", "old", "new", "words"), [*OF_TABLES, *OF_CLAIMS, *OF_FIGURES])
def test_a_value_of_another_kind_is_one_line(own, kind, old, new, words):
    check_refused(own(kind, old, new), words)


def test_kinds_that_no_trace_has_are_refused_before_a_model_is_loaded(own):
    recipe = read_recipe(own("trace", "samples = 2", 'kinds = ["attn", "mpl"]'))
    with pytest.raises(KtError, match=r"recipe own: kinds mpl: choose among mlp, attn, hidden"):
        run_recipe(recipe, lambda name: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ('check = "peak"\nkind = "mlp"', "kind has no 'mlp'; there are heads"),
        ('check = "alpha"\nnear = 0.3', "a claim is about α, and [trace] kinds is heads; trace mlp and attn"),
    ],
)
def test_a_claim_about_what_is_not_traced_is_refused_before_the_trace(own, claim, words):
    text = f'samples = 2\nkinds = ["heads"]\n[[claims]]\nsays = "s"\nsection = "4"\n{claim}'
    path = own("trace", "samples = 2", "samples = 2")
    kept = path.read_text(encoding="utf-8").partition("[[claims]]")[0]
    path.write_text(kept.replace("samples = 2", text), encoding="utf-8")
    check_refused(path, words)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "old", "new", "words"),
    [
        ("trace", "layers = [1, 5]", "layers = [8, 9]", "layers = [8, 9] is beyond a model of 8 layers"),
        ("probe", "layer = -2", "layer = -9", "layer = -9 is beyond a model of 8 layers"),
    ],
)
def test_a_claim_about_layers_that_a_model_lacks_is_a_line_of_the_table(own, kind, old, new, words):
    demo = kt.load("demo")
    (verdict,) = run_recipe(read_recipe(own(kind, old, new)).limited(3), lambda name: demo).verdicts
    assert verdict.holds is None and verdict.finding.reason == words and words in verdict.line()


@pytest.mark.parametrize(
    ("kind", "old", "new", "words"),
    [
        ("edits", '[data]\nfacts = "demo"\nedits = 2\n[models]', "[models]", "'data' is missing"),
        ("edits", "[models]\n", "[[models]]\n", "models is [{'m': 'demo'}]; give a table, under [models]"),
        ("edits", "[[rows]]", "[rows]", "give a list of tables, each under [[rows]]"),
        ("methods", "[places]", "[[places]]", "places is [{'batches': [1, 2]}]; give a table, under [places]"),
        ("abilities", '[scales]\n"ACC" = 1.0\n', "[[scales]]\n", "scales is [{}]; give a table, under [scales]"),
        ("trace", "[[claims]]", "[claims]", "give a list of tables, each under [[claims]]"),
        ("case", 'place = "', 'statistics = ""\nplace = "', "statistics is ''; give a table, under [statistics]"),
        ("methods", 'summary = "s"', 'summary = "s"\nstatistics = 0', "statistics is 0; give a table"),
    ],
)
def test_a_part_of_another_form_is_refused_by_its_name(own, kind, old, new, words):
    check_refused(own(kind, old, new), words)


@pytest.mark.parametrize("kind", ["edits", "methods", "case"])
@pytest.mark.parametrize("name", ["nosuch.jsonl", "a\\u0000b"])
def test_a_corpus_that_is_not_there_is_said_before_a_model_is_loaded(own, kind, name):
    recipe = read_recipe(own(kind, "[models]", f'[statistics]\ncorpus = "{name}"\n[models]'))
    with pytest.raises(BadFile, match=r"no corpus '.*'; give demo, english"):
        run_recipe(recipe, lambda name: pytest.fail("loaded"))


@pytest.mark.filterwarnings("ignore")
def test_a_row_whose_own_settings_do_not_fit_the_model_is_refused(own):
    recipe = read_recipe(own("methods", 'method = "memit"\n', 'method = "memit"\noptions = { layers_mlp = [99] }\n'))
    with pytest.raises(KtError, match="row 'MEMIT': demo has layers 0 to 7, not 99") as error:
        run_recipe(recipe, lambda name: kt.load(name))
    assert error.value.exit_code == 2


@pytest.mark.filterwarnings("ignore")
def test_an_editor_that_is_not_there_is_its_rows_own_fault(own):
    named = 'method = "malmen"\noptions = { editor = "nowhere.safetensors" }\n'
    recipe = read_recipe(own("methods", 'method = "memit"\n', named))
    with pytest.raises(BadFile, match=r"row 'MEMIT': .*nowhere\.safetensors"):
        run_recipe(recipe, lambda name: kt.load(name))


@pytest.mark.filterwarnings("ignore")
def test_a_table_of_methods_that_could_not_measure_anything_is_no_success(own, tmp_path):
    recipe = read_recipe(own("methods", 'method = "memit"', 'method = "malmen"'))
    with pytest.raises(WorkFailed, match=r"nothing was measured on m: MEMIT at 1: .*editor"):
        run_recipe(recipe, lambda name: kt.load(name), folder=tmp_path / "run")
