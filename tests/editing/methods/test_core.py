"""CORE: its term against its formula, on streams read by plain hooks, and contexts that matter less."""

import torch
from editing_help import CONTEXTS, REQUESTS
from one_layer import LAYER, Position, close, solved
from several_layers import QUIET

from kt.editing import closed_form as cf
from kt.editing.closed_form import targets
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.keys import prompt_rows, read_rows
from kt.editing.closed_form.objective import ContextVariance, Objective, Term
from kt.editing.resolve import read_requests
from kt.model.sites import Kind, Site

pytestmark = QUIET


def read(model, layer):
    """The stream behind a layer at the subject's last token: fact, context, d."""
    facts = read_requests(model, REQUESTS)
    rows = [
        (template, fact.subject) for fact in facts for template in Contexts.of(CONTEXTS).templates(fact, model.reader)
    ]
    found = read_rows(model, prompt_rows(model, rows, Position.SUBJECT_LAST), Site(Kind.RESID, layer), "value")
    return found.unflatten(0, (len(facts), -1))


def test_the_term_is_the_codes_formula_on_the_layers_above(setting):
    model, seen = setting[0], []

    class Look(Term):
        layers_above = 5

        def loss(self, step):
            seen.append(step.above.detach().clone())

    terms = (cf.NLL(), cf.KL(), Look())
    aim = cf.TargetSite(Site(Kind.RESID, 0))
    for fact in read_requests(model, REQUESTS):
        targets.find_targets(model, [fact], [aim], Contexts.of(CONTEXTS), Objective(terms, steps=1))
    want = torch.stack([read(model, layer) for layer in (1, 2)])  # of three layers, those above the first
    close(torch.cat(seen, 1), want, atol=1e-4, rtol=1e-4)
    step = targets.SearchStep(*(torch.zeros(2, 3),) * 6, {}, {}, want.double())
    got = ContextVariance(0.5, 5).loss(step)
    relative = ContextVariance("auto", 5).loss(step)
    for fact in range(2):
        sums, shares = [], []
        for streams in want[:, fact].double():
            apart = [(streams[i] - streams[j]).square().sum() for i in range(3) for j in range(i)]
            sums.append(sum(apart) / streams.shape[-1])
            shares.append(sum(apart) / 3 / streams.square().sum(-1).mean())
        close(got[fact], 0.5 * sum(sums) / 2)
        close(relative[fact], sum(shares) / 2)


def test_the_search_makes_contexts_differ_less(setting):
    model = setting[0]

    def apart(factor):
        edit = solved(setting, "core", reg_lambda=factor, v_num_grad_steps=25, v_lr=0.1)
        with edit.applied(model):
            above = read(model, 2)
        return float(above.var(1).sum() / above.square().sum())

    assert LAYER < 2 and apart(100.0) < 0.9 * apart(0.0)
