"""Order and sums of those that wait, against a plain list."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.ids import RequestKey
from router.core.due_queue import BLOCK_ENTRIES, Due, DueQueue


def entry(number: int, due_s: float, prefill_s: float = 1.0) -> Due:
    return Due(due_s, number, RequestKey(f"0:{number}"), prefill_s)


def test_of_those_that_are_due_at_one_time_who_came_first_goes_first() -> None:
    queue = DueQueue()
    for number, due_s in enumerate((2.0, 1.0, 1.0)):
        queue.add(entry(number, due_s))
    assert [queue.first().number, len(queue)] == [1, 3]
    queue.remove(queue.first())
    assert queue.first().number == 2
    assert queue.before(1.0) == (1.0, 1)
    assert queue.before(0.9) == (0.0, 0)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1 << 30),
    most=st.sampled_from([3, BLOCK_ENTRIES, 6 * BLOCK_ENTRIES]),
    times=st.sampled_from([1, 10, 100_000]),
)
def test_it_says_what_a_plain_list_says(seed: int, most: int, times: int) -> None:
    """Through growing and shrinking, with many that are due at one time and with few."""
    rng = Random(seed)
    queue, plain = DueQueue(), list[Due]()
    for number in range(4 * most):
        grows = len(plain) < most and rng.random() < (0.8 if number < 2 * most else 0.3)
        if grows or not plain:
            added = entry(number, float(rng.randrange(times)), rng.random())
            plain.append(added)
            queue.add(added)
        else:
            queue.remove(plain.pop(rng.randrange(len(plain))))
        assert len(queue) == len(plain)
        if number % 97 == 0:
            assert not plain or queue.first() == min(plain)
            assert queue.work_s == pytest.approx(sum(each.prefill_s for each in plain), abs=1e-9)
            due_s = float(rng.randrange(times))
            earlier = [each.prefill_s for each in plain if each.due_s <= due_s]
            assert queue.before(due_s) == pytest.approx((sum(earlier), len(earlier)), abs=1e-9)
