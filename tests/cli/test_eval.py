"""`kt eval`: protocols, held-out text, KL and the judge, as typed."""

import json
from pathlib import Path

import pytest
from judge_server import Server, reply

from kt.cli import main


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "facts.jsonl"
    records = [
        {"prompt": "The mother tongue of {} is", "subject": s, "answer": "French", "target": "Italian", "id": s,
         "paraphrases": ["{} speaks"], "neighbourhood": [{"prompt": "Tomas Brill works as a", "answer": "chemist"}],
         "portability": [{"prompt": "Her profession is that of a", "answer": "physicist"}]}
        for s in ("Marie Curie", "Megan Rapinoe")
    ]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="module")
def edit_file(tmp_path_factory, model_folder, prompts_file):
    """An edit of one MLP weight, solved once."""
    folder = tmp_path_factory.mktemp("edit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KT_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(folder)
        code = main([
            "apply-edit", "-m", str(model_folder), "--edits", str(prompts_file), "--method", "ft", "--set",
            "num_steps=10", "-o", "run", "--quiet", "--force",
        ])  # fmt: skip
    assert code == 0
    return folder / "run" / "edit.safetensors"


@pytest.fixture
def scored(kt, model_folder, prompts_file):
    asked = ("-m", model_folder, "-f", prompts_file, "--json", "-", "-o", "run", "--overwrite")
    return lambda *more: kt("eval", *asked, *more)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Marie Curie was born in Warsaw.\nThe capital of Italy is Rome.\n")
    return path


def test_every_protocol_of_an_edit_beside_the_unedited_model(scored, edit_file, text_file):
    ran = scored("--edit", edit_file, "--protocol", "tf,prob,wild,ppl", "--kl", "--heldout", text_file,
                 "--max-new-tokens", 4)  # fmt: skip
    assert ran.code == 0, ran.err
    metrics, protocol = ran.json["metrics"], ran.json["protocol"]
    assert {"edit_success_tf_exact", "efficacy_prob_success", "score_prob_harmonic", "portability_wild_exact",
            "neighbourhood_kl", "neighbourhood_same_argmax", "perplexity_heldout"} <= set(metrics)  # fmt: skip
    assert all(set(m) == {"mean", "ci95", "n"} and protocol[name] for name, m in metrics.items())
    assert not any("_gen" in name or "judge" in name for name in metrics)
    assert metrics["neighbourhood_kl"]["mean"] > 0 and "neighbourhood_kl" not in ran.json["before"]
    gap = ran.json["differences"]["before"]["perplexity_heldout"]
    assert gap["mean"] == pytest.approx(
        metrics["perplexity_heldout"]["mean"] - ran.json["before"]["perplexity_heldout"]["mean"]
    )
    assert "at most 4 tokens" in protocol["wild"] and "text.txt" in protocol["perplexity_heldout"]


def test_the_default_is_teacher_forcing_and_greedy_text(scored):
    ran = scored("--limit", 1)
    assert ran.code == 0, ran.err
    ways = {"tf_token", "tf_exact", "gen_exact", "gen_contains"}
    assert {n.removeprefix("edit_success_") for n in ran.json["metrics"] if n.startswith("edit_success")} == ways
    without = scored("--limit", 1, "--no-generate")
    assert not any("_gen" in name for name in without.json["metrics"])


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (("--protocol", "tf,guess"), "'guess' is unknown; choose among tf, gen, prob, wild, mello, ppl"),
        (("--protocol", "gen", "--no-generate"), "leaves no protocol"),
        (("--protocol", "tf,wild", "--no-generate"), "nothing for wild"),
        (("--heldout", "x.txt"), "add it to --protocol"),
        (("--protocol", "ppl", "--heldout", "none.txt"), "no corpus 'none.txt'"),
        (("--kl",), "give --edit"),
        (("--judge-url", "http://h/v1", "--judge-model", "m"), "a judge reads wild"),
        (("--protocol", "wild", "--judge-url", "http://h/v1"), "--judge-url needs --judge-model"),
        (("--protocol", "wild", "--judge-model", "m"), "--judge-model needs --judge-url"),
        (("--protocol", "wild", "--judge-model", "m", "--judge-url", "h"), "no http or https address"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_before_a_model_loads(kt, typed, says):
    ran = kt("eval", "-m", "nowhere", "-f", "demo", *typed)
    assert ran.code == 2 and says in ran.err and ran.err.count("\n") == 1
    assert list(Path().iterdir()) == []


@pytest.fixture
def server():
    made = Server((200, reply("CORRECT"), {}))
    yield made
    made.close()


def test_a_judge_is_asked_once_and_its_verdicts_stay_in_the_run(scored, server, monkeypatch):
    monkeypatch.setenv("KT_JUDGE_KEY", "sk-secret")
    asked = ("--protocol", "wild", "--max-new-tokens", 3, "--judge-url", server.url, "--judge-model", "grader")
    ran = scored(*asked)
    assert ran.code == 0, ran.err
    assert ran.json["metrics"]["edit_success_wild_judge"] == {"mean": 1.0, "ci95": [1.0, 1.0], "n": 2}
    n = len(server.heard)
    assert n == len(Path("run/judge.jsonl").read_text().splitlines()) and 4 <= n <= 8
    assert server.heard[0][1]["Authorization"] == "Bearer sk-secret"
    written = "".join(path.read_text(errors="replace") for path in Path("run").iterdir())
    assert "sk-secret" not in written + ran.out + ran.err
    assert scored(*asked).json == ran.json and len(server.heard) == n  # the same folder: its verdicts are taken over


def test_nothing_is_sent_without_a_judge(scored, server):
    assert scored("--protocol", "wild", "--max-new-tokens", 3).code == 0
    assert server.heard == [] and not Path("run/judge.jsonl").exists()


def test_a_judge_that_refuses_leaves_no_run(scored, server):
    server.answers = [(401, b"", {})]
    ran = scored("--protocol", "wild", "--max-new-tokens", 3, "--judge-url", server.url, "--judge-model", "grader")
    assert ran.code == 1 and "HTTP 401" in ran.err and not Path("run").exists()


def test_every_sample_by_itself_on_request(scored, edit_file):
    ran = scored("--edit", edit_file, "--no-generate", "--log-samples", "jsonl")
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    by_role = {role: [row for row in rows if row["role"] == role] for role in {row["role"] for row in rows}}
    assert len(by_role["edit"]) == len(by_role["paraphrase"]) == len(by_role["neighbourhood"]) == 2
    assert {row["record"] for row in rows} == {"Marie Curie", "Megan Rapinoe"}
    wrong = scored("--log-samples", "csv")
    assert wrong.code == 2 and "jsonl, parquet" in wrong.err
