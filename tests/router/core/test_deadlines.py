"""Which requests have run out of time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protos.ids import RequestKey
from router.core.deadlines import Deadlines


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20), st.integers(1, 100)), max_size=200))
def test_each_that_has_not_ended_comes_up_once_it_is_due(
    story: list[tuple[bool, int, int]],
) -> None:
    deadlines, expected = Deadlines(), dict[RequestKey, float]()
    for comes, name, deadline_s in story:
        key = RequestKey(str(name))
        if comes and key not in expected:
            expected[key] = deadline_s
            deadlines.add(deadline_s, key)
        elif not comes:
            expected.pop(key, None)
            deadlines.forget(key)
    for now_s in range(0, 101, 7):
        due = deadlines.due(now_s)
        assert sorted(due) == sorted(key for key, at_s in expected.items() if at_s <= now_s)
        for key in due:
            del expected[key]


def test_those_that_ended_long_before_are_not_kept() -> None:
    deadlines = Deadlines()
    for number in range(10_000):
        key = RequestKey(str(number))
        deadlines.add(86_400.0, key)
        deadlines.forget(key)
    assert len(deadlines) < 100
