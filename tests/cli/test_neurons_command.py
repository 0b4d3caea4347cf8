"""`kt neurons` as a user runs it."""

import kt as kt_package


def test_neurons_keeps_each_facts_layers_and_neurons(kt):
    ran = kt("neurons", "-f", "demo", "--limit", 2, "--steps", 4, "--out", "run", "--json", "-")
    assert ran.code == 0, ran.err
    for fact in ran.json["facts"]:
        assert len(fact["by_layer"]) == len(fact["without"]) and fact["neurons"] and fact["gap"] < 1e-3
    largest = [fact["neurons"][0]["attribution"] for fact in ran.json["facts"]]
    assert all(0 < each <= fact["prob"] for each, fact in zip(largest, ran.json["facts"], strict=True))


def test_a_wrong_token_is_one_line(kt):
    ran = kt("neurons", "-f", "demo", "--limit", 1, "--at", "first")
    assert ran.code == 2 and ran.err.count("\n") == 1 and "--at" in ran.err


def test_the_seed_of_neurons_draws_their_intervals(kt):
    model, facts = kt_package.load("demo"), kt_package.load_facts("demo", limit=8)
    zero, again, other = (kt_package.knowledge_neurons(model, facts, steps=2, seed=seed) for seed in (0, 0, 1))
    layers = [found.tables()[0].rows for found in (zero, again, other)]
    assert layers[0] == layers[1] != layers[2] and (zero.by_layer == other.by_layer).all()
    ran = kt("neurons", "--limit", 1, "--steps", 2, "--seed", 1, "--json", "-")
    assert ran.json["seed"] == 1
