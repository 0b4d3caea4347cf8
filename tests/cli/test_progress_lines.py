"""Where stderr is no terminal, a long run says now and then how far it is."""

from __future__ import annotations

from kt.cli import console


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
    assert len(said) in (2, 3) and said[0].startswith("kt: tracing: 33") and said[0].endswith(" of 1,000")
    for silent in (console.Screen(quiet=True), console.Screen(progress=False)):
        with silent.progress("tracing") as tick:
            now[0] += 100
            tick(1, 2)
    assert capsys.readouterr().err == ""
