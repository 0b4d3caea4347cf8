"""Batches: like lengths together, within the budget, in an order that the items alone decide."""

import pytest

from kt.model.batches import AUTO_LOGITS, AUTO_TOKENS, batches_by_length, fits_forward, map_batches

ITEMS = ["ccc", "a", "dddd", "bb", "x", "ee"]


def test_items_of_like_length_share_a_batch_and_equal_ones_stay_in_order():
    assert list(batches_by_length(ITEMS, len, 2)) == [["a", "x"], ["bb", "ee"], ["ccc", "dddd"]]
    assert list(batches_by_length([], len, 2)) == []


def test_a_budget_cuts_batches_and_an_item_beyond_it_stands_alone():
    padded = lambda batch: len(batch) * len(batch[-1]) <= 3  # noqa: E731
    assert list(batches_by_length(ITEMS, len, padded)) == [["a", "x"], ["bb"], ["ee"], ["ccc"], ["dddd"]]


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((1, AUTO_TOKENS, 1, 10), True), ((2, AUTO_TOKENS, 1, 10), False), ((2, 8, AUTO_LOGITS // 20, 10), True),
     ((2, 8, AUTO_LOGITS // 20 + 1, 10), False)],
)  # fmt: skip
def test_the_automatic_budget_counts_tokens_and_logits(shape, fits):
    assert fits_forward("auto", *shape) == fits
    assert fits_forward(2, *shape) and not fits_forward(1, 2, *shape[1:])


def test_results_come_in_the_order_of_the_batches_and_progress_counts_items():
    told = []
    found = map_batches("lengths", batches_by_length(ITEMS, len, 4), lambda batch: sum(map(len, batch)), told.append)
    assert found == [6, 7] and told == [4, 2]
