"""`kt.ranks` between real processes: who does what, who gets what, and what an error of one means for all."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from ranks_help import together

from kt import ranks

BEGIN = """
import json, os, sys, time
from kt import ranks
from kt.errors import BadFact, WorkFailed
ranks.join()
import torch, numpy as np
me = ranks.started_as()
"""

PROGRAM = (
    BEGIN
    + """
def said(do, *arguments):
    try:
        return do(*arguments)
    except Exception as error:
        return [type(error).__name__, str(error)]

done = []
def square(i):
    done.append(i)
    return {"who": me, "alone": ranks.count(), "square": i * i}

def refuse(i):
    if i == 3:
        time.sleep(0.5)  # the other process is at part 4 long since
    if i >= 3:
        raise BadFact(f"fact {i} is bad")

given = []
def give(x):
    given.append(x)
    return [x, me, ranks.count()]

def stumble(i):
    if i == 1:
        raise ZeroDivisionError("one")

after = []
def slow(i):
    after.append(i)
    if i == 1:
        raise BadFact("early")
    time.sleep(0.3)

def kept(value):
    return [value.dtype == torch.bfloat16, value.float().tolist(), list(value.shape), value.requires_grad]

tensors = ranks.each("tensors", [1.5, 2.5], lambda x: (torch.full((2, 1), x, dtype=torch.bfloat16), np.arange(2) * x))
steps = []
out = {
    "count": ranks.count(), "main": ranks.is_main(), "local": ranks.local(),
    "each": ranks.each("squares", list(range(7)), square, steps.append), "done": done, "steps": steps,
    "none": ranks.each("nothing", [], square),
    "tensors": [[*kept(t), a.tolist()] for t, a in tensors],
    "scalar": ranks.by_main("a scalar", lambda: torch.tensor(2.0)).item(),
    "by_main": ranks.by_main("rank 0's", give, "given"), "given": given,
    "summed": ranks.summed("sums", [torch.tensor([1.0, me], dtype=torch.float64)])[0].tolist(),
    "gathered": ranks.gathered("ranks", me),
    "refused": said(ranks.each, "bad facts", list(range(6)), refuse),
    "refused by main": said(ranks.by_main, "bad fact", refuse, 3),
    "stumbled": said(ranks.each, "a bug", list(range(6)), stumble),
    "slow": said(ranks.each, "early", list(range(20)), slow), "after": after,
    "again": [part["square"] for part in ranks.each("squares", list(range(5)), square)],
    "agree": said(ranks.agree, {"same": 1}),
    "disagree": said(ranks.agree, {"same": 1, "--seed": me}),
    "torn": said(ranks.gathered, f"step {me}", me),
}
print(json.dumps(out))
ranks.leave()
"""
)


@pytest.fixture(scope="module")
def two():
    found = together(PROGRAM)
    assert [code for code, _, _ in found] == [0, 0], [err[-2000:] for _, _, err in found]
    return [json.loads(out.splitlines()[-1]) for _, out, _ in found]


def test_two_processes_know_of_each_other(two):
    assert [(each["count"], each["main"], each["local"]) for each in two] == [(2, True, 0), (2, False, 1)]


def test_parts_are_dealt_in_turn_and_all_get_all_results_in_their_order(two):
    assert [each["done"] for each in two] == [[0, 2, 4, 6, 0, 2, 4], [1, 3, 5, 1, 3]]
    for each in two:
        assert [part["square"] for part in each["each"]] == [i * i for i in range(7)]
        assert [part["who"] for part in each["each"]] == [0, 1, 0, 1, 0, 1, 0]
    assert two[0]["none"] == two[1]["none"] == []


def test_a_process_is_alone_at_its_part(two):
    assert {part["alone"] for part in two[0]["each"]} == {1}


def test_what_is_rank_0s_the_others_do_not_do(two):
    assert [each["by_main"] for each in two] == [["given", 0, 1]] * 2
    assert [each["given"] for each in two] == [["given"], []]


def test_progress_takes_the_others_to_be_as_far(two):
    assert two[0]["steps"] == [2, 4, 6, 7]
    assert two[1]["steps"] == [2, 4, 6]


def test_tensors_and_arrays_pass_with_type_shape_and_every_bit(two):
    for each in two:
        assert each["tensors"] == [[True, [[x], [x]], [2, 1], False, [0.0, x]] for x in (1.5, 2.5)]
        assert each["scalar"] == 2.0


def test_sums_and_values_of_all_reach_all(two):
    assert [each["summed"] for each in two] == [[2.0, 1.0]] * 2
    assert [each["gathered"] for each in two] == [[0, 1]] * 2


def test_an_error_of_one_is_that_of_all_and_the_first_part_decides(two):
    assert [each["refused"] for each in two] == [["BadFact", "fact 3 is bad"]] * 2
    assert [each["refused by main"] for each in two] == [["BadFact", "fact 3 is bad"]] * 2


def test_a_bug_in_one_process_is_a_failure_of_the_run_in_the_others(two):
    assert two[1]["stumbled"] == ["ZeroDivisionError", "one"]
    assert two[0]["stumbled"] == ["WorkFailed", "process 1 of this run failed: ZeroDivisionError: one"]


def test_others_do_not_finish_their_parts_after_a_failure(two):
    assert [each["slow"] for each in two] == [["BadFact", "early"]] * 2
    assert len(two[0]["after"]) < 4


def test_work_goes_on_after_a_failure_that_the_program_catches(two):
    assert [each["again"] for each in two] == [[0, 1, 4, 9, 16]] * 2


def test_processes_that_differ_are_refused_and_the_difference_is_named(two):
    line = "process 1 has another --seed than process 0 (1, not 0); start all with the same options, files and versions"
    assert [each["agree"] for each in two] == [None, None]
    assert [each["disagree"] for each in two] == [["KtError", line]] * 2


def test_processes_that_went_different_ways_end_instead_of_mixing_their_results(two):
    assert [each["torn"][0] for each in two] == ["WorkFailed"] * 2
    assert "went different ways ('step 0', 'step 1')" in two[0]["torn"][1]


def test_when_one_dies_the_other_hears_of_it_at_once_and_a_signal_reaches_one_that_waits():
    program = (
        BEGIN
        + """
import signal, threading
def stop(*_):
    raise SystemExit(7)
signal.signal(signal.SIGTERM, stop)
if os.environ["HOW"] == "dies":
    try:
        ranks.each("parts", [0, 1], lambda i: os._exit(9) if i else time.sleep(0.1))
    except WorkFailed as error:
        print(error)
        sys.stdout.flush()
        os._exit(1)
if me == 1:
    time.sleep(2)  # alive, but it does not come
    os._exit(0)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
before = time.monotonic()
try:
    ranks.gathered("waiting", 0)
except SystemExit as error:
    print(error.code, time.monotonic() - before < 1.5)
sys.stdout.flush()
os._exit(0)
"""
    )
    before = time.monotonic()
    (code, out, _), (gone, _, _) = together(program, HOW="dies")
    assert (code, gone) == (1, 9)
    assert out.strip() == "another process of this run has ended or does not answer"
    assert time.monotonic() - before < 50
    (code, out, _), _ = together(program, HOW="waits")
    assert (code, out.strip()) == (0, "7 True")


def test_one_that_does_not_come_is_waited_for_as_long_as_patience_says():
    program = (
        BEGIN + "time.sleep(6 * me)\ntry:\n    ranks.gathered('x', 0)\nexcept WorkFailed as error:\n    print(error)"
    )
    program += "\nsys.stdout.flush()\nos._exit(0)"
    (_, out, _), _ = together(program, KT_PATIENCE="2")
    assert out.strip() == "another process of this run has ended or does not answer"


def test_without_a_launcher_all_is_a_plain_call():
    steps = []
    assert (ranks.count(), ranks.is_main(), ranks.joined(), ranks.local()) == (1, True, False, 0)
    ranks.join()
    assert not ranks.joined()
    assert ranks.each("x", [1, 2], lambda i: i + 1, steps.append) == [2, 3]
    assert steps == [1, 2]
    assert ranks.by_main("x", lambda a: a, 5) == 5
    assert ranks.gathered("x", 5) == [5]
    ranks.agree({"x": 1})
    with pytest.raises(ZeroDivisionError):
        ranks.each("x", [1], lambda i: i / 0)


def test_ranks_loads_nothing_heavy():
    check = "import sys\nfrom kt import ranks, journal, run_folder\nranks.join()\nprint('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "False"
