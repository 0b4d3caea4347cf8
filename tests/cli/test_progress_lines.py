"""Where stderr is no terminal, a long run says now and then how far it is."""

from __future__ import annotations

from kt._util import progress
from kt.cli import console, main
from kt.errors import tell_user
from kt.runs.journal import Journal


def test_a_line_comes_after_a_while_and_not_before(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    screen = console.Screen()
    screen.hold()  # tables wait, progress does not
    with screen.progress("tracing") as tick:
        for done in range(1, 1001):
            now[0] += 0.03
            tick(done, 1000)
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) in (2, 3) and said[0].startswith("kt: tracing: 33") and said[0].endswith(" of 1,000, about 20 s left")
    )
    for silent in (console.Screen(quiet=True), console.Screen(progress=False)):
        with silent.progress("tracing") as tick:
            now[0] += 100
            tick(1, 2)
    assert capsys.readouterr().err == ""


def test_work_of_more_than_a_minute_is_announced_once_with_its_length(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    long = "kt: tracing: 100 in all, about 3 min at the pace of the first 2"
    for seconds_each, said_first in ((2.0, long), (0.5, "kt: ")):
        with console.Screen().progress("tracing") as tick:
            for done in range(101):
                tick(done, 100)
                now[0] += seconds_each
        said = capsys.readouterr().err.splitlines()
        assert said[0].startswith(said_first)
        assert sum("in all" in line for line in said) == (seconds_each == 2.0)
        assert all(line.endswith(" left") for line in said if " of 100" in line and "100 of 100" not in line)


def test_a_length_is_told_in_the_unit_that_a_person_would_use():
    assert [console.minutes(s) for s in (50, 100, 3000, 9000)] == ["50 s", "2 min", "50 min", "2.5 h"]


def test_what_was_done_before_units_were_counted_says_nothing_of_the_pace(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    pace = console.Pace()
    now[0] = 4.0
    assert pace.left(1, 2) == 4.0
    assert pace.left(5, 10) is None  # another count: five were kept
    now[0] = 14.0
    assert pace.left(6, 10) == 40.0


def test_phases_that_a_resumed_run_keeps_say_nothing_of_the_pace(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])

    def measure(number, seconds):
        now[0] += seconds
        return number

    def run(numbers):
        pace = progress.Pace()
        lefts = []
        with console.Screen().progress("tracing") as tick:

            def told(done):
                lefts.append(pace.left(done, 40))
                tick(done, 40)

            phases = {f"fact-{n}": (n, 2.0) for n in numbers}
            assert Journal(tmp_path).take_each("facts", measure, phases, told) == [*numbers]
        return lefts

    run(range(0, 20, 2))  # one of two processes was killed here
    run(range(5))
    capsys.readouterr()
    lefts = run(range(40))
    assert lefts[:5] == [None] * 5 and lefts[5] == 34 * 2.0  # fact 5 is the first that is done now
    assert lefts[8] == 31 * 2.0 and lefts[18] == 21 * 2.0  # and those kept in between are passed over
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "left" in line] and all("about 1 s" not in line for line in said)


def test_a_resumed_run_announces_what_is_still_to_do(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    pace = progress.Pace()
    progress.reused()  # as a resumed training says before its first step
    assert pace.length(900, 1000) is None
    now[0] += 4.0
    assert pace.length(901, 1000) == "100 of 1,000 to do, about 7 min at the pace of the first 1"


def test_a_part_of_the_work_has_its_own_name_where_the_callback_takes_one():
    from kt._util.progress import named

    told = []
    named(lambda done, total, what="": told.append((done, total, what)), "second moments")(3, 9)
    named(lambda done, total: told.append((done, total)), "second moments")(4, 9)
    assert told == [(3, 9, "second moments"), (4, 9)] and named(None, "second moments") is None


def test_what_is_reused_is_told_as_a_line_and_is_no_warning(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setenv("KT_CACHE", str(tmp_path / "cache"))
    cov = ["cov", "-m", "demo", "--layers-mlp", "1", "--layers-attn", "1", "--no-progress"]
    told = "second moments over 500 tokens are kept; the rest of 900 is added"
    said = []
    for run, more in (("a", ["500"]), ("b", ["900"]), ("c", ["1200", "--quiet"])):
        assert main([*cov, "--out", str(tmp_path / run), "--max-tokens", *more]) == 0
        said.append(capsys.readouterr().err)
    assert f"kt: {told}\n" in said[1] and "warning" not in said[0] + said[1]
    assert "kept" not in said[0] and said[2] == ""
    caplog.clear()
    tell_user("outside of a command")
    assert capsys.readouterr().err == "" and not caplog.records  # nor is the logger left as the command had it
