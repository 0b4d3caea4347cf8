"""Edits that leave the weights alone, from the command line: solved, shown, compared, scored, and never exported."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


def test_an_edit_of_kind_context_is_solved_shown_compared_scored_and_not_exported(kt, model_folder, facts_file):
    asked = ("-m", model_folder, "-f", facts_file, "--limit", "1-2")
    ran = kt("apply-edit", *asked, "--method", "ice", "--force", "-o", "ice")
    assert ran.code == 0, ran.err
    assert "alpha" not in ran.out and "words before the prompt" in ran.out
    file = "ice/edit.safetensors"
    shown = kt("edits", "show", file, "-m", model_folder, "--json", "-")
    assert shown.code == 0 and shown.json["effect"]["kind"] == "context" and shown.json["now"] == "fits"
    compared = kt("edits", "diff", file, file, "--json", "-")
    assert [entry["among"] for entry in compared.json["entries"]] == ["both", "both"]
    scored = kt("eval", *asked, "--no-generate", "--edit", file, "-o", "scores", "--json", "-")
    assert scored.code == 0, scored.err
    assert kt("report", "ice", "-o", "page.html").code == 0
    for kind in ("hf", "peft"):
        refused = kt("export", file, "-m", model_folder, "--format", kind, "--to", "out")
        assert refused.code == 2 and "cannot hold ice, of kind context" in refused.err
    merged = kt("apply-edit", *asked, "--method", "ice", "--merge-to", "out")
    assert merged.code == 2 and "changes none" in merged.err
    assert kt("revert", "ice", "--edit", file).code == 2
    own, nothing = Path("own.jsonl"), Path("nothing.jsonl")
    own.write_text("".join(Path(facts_file).read_text().splitlines(keepends=True)[:2]))
    nothing.write_text("")
    for options, words in (
        (("--method", "grace", "--set", "eps=0"), "eps 0 is a radius"),
        (("--method", "grace", "--set", "eps=-1"), "eps -1 must be zero or more"),
        (("--method", "melo", "--set", "eps=0"), "eps 0 is a radius"),
        (("--method", "melo", "--set", "block_size=0"), "block_size must be at least 1"),
        (("--method", "wise", "--set", "ratio=0"), "ratio 0 must be a share above 0"),
        (("--method", "wise", "--set", "ratio=-0.5"), "ratio -0.5 must be zero or more"),
        (("--method", "memoir", "--set", "overlap=0"), "overlap 0 must be a share above 0"),
        (("--method", "ice", "--set", "retriever=google"), "retriever 'google' is unknown"),
        (("--method", "scr", "--set", "nearness=3"), "nearness 3 is a cosine"),
        (
            ("--method", "ike", "--set", f"demonstrations={own}"),
            "no demonstrations in 'own.jsonl' about other subjects",
        ),
        (("-f", str(nothing), "--method", "ice"), "nothing.jsonl"),
        (("--method", "ike", "--set", "demonstrations=none.json"), "none.json"),
        (("--method", "scr", "--set", "candidates=0"), "candidates"),
    ):
        refused = kt("apply-edit", *asked, *options)
        assert refused.code == 2 and words in refused.err, (options, refused.err)
        assert refused.err.count("\n") == 1, refused.err
