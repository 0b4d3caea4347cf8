"""CPU time of the search for targets beside the plain loop over requests (plain_targets.py).

    python benchmarks/speed/target_speed.py  # 32 requests x 25 steps, a random GPT-2 of 12 layers, d_model 768
    python benchmarks/speed/target_speed.py --small  # 4 requests x 4 steps, 4 layers, d_model 128: seconds

The block output of one layer is searched for in six contexts, with the KL on the essence prompt, as MEMIT does; no
request stops early. Of the large run the loop does only the first requests, and its time is scaled up to all.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

import torch
from measure import Cost, Row, command, counted, measured, product_rate
from plain_targets import Numbers, plain_target
from trace_speed import random_gpt2

import kt
from kt.editing.closed_form.aims import TargetSite
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.targets import find_targets
from kt.model.sites import Kind, Site

BOUND = 1e-5
"""Of ‖δ‖: by how much δ may differ from the loop's."""

STARTS = ("The sum is", "So then we", "Because it", "I am on my", "You see it")  # ten tokens each, as MEMIT's
CONTEXTS = Contexts((("{}",), tuple(f"{start}. {{}}" for start in STARTS)))


def requests(count: int) -> list[kt.Fact]:
    """Prompts of 11 or 12 tokens (a token a byte), the subject in their middle, targets of one or two tokens."""
    draw = random.Random(0)
    word = lambda size: "".join(draw.choices(string.ascii_lowercase, k=size))  # noqa: E731
    shapes = [(draw.choice((3, 4)), 4, draw.choice((3, 4)), draw.choice((1, 2))) for _ in range(count)]
    return [
        kt.Fact(f"{word(before)}{{}}{word(after)}-", word(size), target=word(target))
        for before, size, after, target in shapes
    ]


def rows(small: bool) -> Iterator[Row]:
    """One row: all requests by `find_targets`, and by the plain loop."""
    layers, width, layer, number, steps, done = (4, 128, 1, 4, 4, 4) if small else (12, 768, 5, 32, 25, 4)
    torch.set_num_threads(1)
    model, facts = random_gpt2(layers, width), requests(number)
    aim, objective = TargetSite(Site(Kind.RESID, layer)), Numbers(v_num_grad_steps=steps, stop_loss=0.0)
    plain_target(model, facts[0], [aim], CONTEXTS.flat, Numbers(v_num_grad_steps=1))  # what only a first call costs
    find_targets(model, facts[:1], [aim], CONTEXTS, Numbers(v_num_grad_steps=1).objective)
    found, ours = measured(lambda: find_targets(model, facts, [aim], CONTEXTS, objective.objective))
    loop, theirs = measured(
        lambda: [plain_target(model, fact, [aim], CONTEXTS.flat, objective)[aim] for fact in facts[:done]]
    )
    if not (found.steps == steps - 1).all():
        raise SystemExit("a request stopped early")
    apart = [
        float(((found.wanted[aim][i] - found.before[aim][i]) - delta).norm() / delta.norm())
        for i, (delta, _) in enumerate(loop)
    ]
    scale = number / done
    yield Row(
        part="targets",
        work=f"{number} requests x {steps} steps, {len(CONTEXTS.flat)} contexts, {layers} layers d={width}, "
        f"hidden.{layer}",
        reference="one request at a time, every row whole through all layers, logits at all positions",
        ours=ours,
        theirs=Cost(theirs.cpu_s * scale, theirs.wall_s * scale, theirs.peak_mib),
        counted=work(model, facts, aim, steps),
        rate=product_rate(),
        difference=max(apart),
        bound=BOUND,
        goal=None if small else 8.0,
        note="difference relative to the norm of δ"
        + ("" if done == number else f"; the reference ran {done} of the requests, its time is scaled"),
    )


def work(model: kt.TracedModel, facts: list[kt.Fact], aim: TargetSite, steps: int) -> int:
    """Operations of the search: every step after the first costs the same, so three say what all cost."""
    two, three = (
        counted(
            lambda n=n: find_targets(
                model, facts, [aim], CONTEXTS, Numbers(v_num_grad_steps=n, stop_loss=0.0).objective
            )
        )
        for n in (2, 3)
    )
    return three + (steps - 3) * (three - two)


if __name__ == "__main__":
    raise SystemExit(command(rows, __doc__))
