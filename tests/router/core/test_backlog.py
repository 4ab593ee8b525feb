"""Who goes next: deadlines within a tenant, served tokens between tenants, and nobody never."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.ids import RequestKey
from router.core.backlog import BEHIND_S, TENANTS_KEPT, Backlog, Before, Waiting


def key(name: str) -> RequestKey:
    return RequestKey(f"0:{name}")


def drain(backlog: Backlog, now_s: float = 0.0) -> list[str]:
    """All that wait, in the order in which they go; nobody is charged."""
    names = []
    while (first := backlog.next(now_s)) is not None:
        backlog.remove(first)
        names.append(first.removeprefix("0:"))
    return names


def test_who_is_due_first_goes_first() -> None:
    backlog = Backlog()
    for name, due_s in (("b", 2.0), ("c", 3.0), ("a", 1.0), ("a2", 1.0)):
        backlog.add(key(name), Waiting("", due_s))
    assert len(backlog) == 4
    assert [each.removeprefix("0:") for each in backlog] == ["b", "c", "a", "a2"]
    assert drain(backlog) == ["a", "a2", "b", "c"]
    assert backlog.next(0.0) is None


def test_who_is_due_first_of_all_tenants_is_known_at_any_time() -> None:
    backlog = Backlog()
    assert (backlog.first_due_s, backlog.work_s) == (math.inf, 0.0)
    backlog.add(key("a"), Waiting("x", 1.0, late_s=1.0, prefill_s=0.25))
    backlog.add(key("b"), Waiting("y", 2.0, prefill_s=0.5))
    assert (backlog.first_due_s, backlog.work_s) == (1.0, 0.75)
    backlog.next(0.9)
    assert backlog.first_due_s == 2.0, "the other is put behind"
    backlog.remove(key("b"))
    assert (backlog.first_due_s, backlog.work_s) == (1.0 + BEHIND_S, 0.25)
    backlog.remove(key("a"))
    assert (backlog.first_due_s, backlog.work_s) == (math.inf, 0.0)


def test_who_left_is_not_asked_again() -> None:
    backlog = Backlog()
    backlog.add(key("a"), Waiting("", 1.0))
    backlog.add(key("b"), Waiting("", 2.0))
    backlog.remove(key("a"))
    backlog.remove(key("a"))
    assert key("a") not in backlog
    backlog.add(key("a"), Waiting("", 3.0))  # It was lost, and waits anew.
    assert drain(backlog) == ["b", "a"]


def test_who_is_too_late_lets_others_be_in_time_but_not_forever() -> None:
    backlog = Backlog()
    backlog.add(key("late"), Waiting("", 1.0, late_s=1.0, promised_s=1.0, prefill_s=0.5))
    backlog.add(key("soon"), Waiting("", 5.0, late_s=5.0, promised_s=5.0, prefill_s=0.5))
    assert backlog.next(0.4) == backlog.next(0.3, held_share=0.15) == key("late")
    assert backlog.next(0.6) == key("soon")
    assert backlog.next(0.4) == key("soon"), "it was put behind"
    assert (backlog.take_put_behind(), backlog.take_put_behind()) == ([key("late")], [])
    backlog.add(key("far"), Waiting("", 1.0 + BEHIND_S + 1, late_s=math.inf))
    assert drain(backlog, 0.6) == ["soon", "late", "far"]


def test_what_its_worker_has_before_it_counts() -> None:
    backlog = Backlog()
    backlog.add(key("late"), Waiting("", 1.0, late_s=1.0, promised_s=1.0, prefill_s=0.5))
    backlog.add(key("soon"), Waiting("", 5.0, late_s=5.0, promised_s=5.0, prefill_s=0.5))
    assert backlog.next(0.4, held_share=0.15) == key("soon")


def test_what_nobody_promised_is_never_late() -> None:
    backlog = Backlog()
    backlog.add(key("a"), Waiting("", 1.0, prefill_s=5.0))
    backlog.add(key("b"), Waiting("", 2.0))
    assert drain(backlog, 100.0) == ["a", "b"]


def test_the_tenant_that_got_least_goes_next() -> None:
    backlog = Backlog()
    for number in range(3):
        backlog.add(key(f"greedy{number}"), Waiting("greedy", number))
        backlog.add(key(f"modest{number}"), Waiting("modest", 10.0 + number))
    backlog.charge("greedy", 100)
    order = []
    while (first := backlog.next(0.0)) is not None:
        backlog.remove(first)
        name = first.removeprefix("0:")[:-1]
        order.append(name)
        backlog.charge(name, 60)
    # 100:0, then 100:60, 100:120, 160:120, ...
    assert order == ["modest", "modest", "greedy", "modest", "greedy", "greedy"]


def test_a_pause_is_not_saved_up() -> None:
    backlog = Backlog()
    backlog.add(key("a"), Waiting("busy", 0.0))
    backlog.charge("busy", 1000)
    backlog.add(key("b"), Waiting("back", 1.0))  # Lifted to 1000.
    backlog.charge("back", 1)
    assert backlog.next(0.0) == key("a")


def test_a_pause_of_all_is_not_saved_up_either() -> None:
    backlog = Backlog()
    backlog.add(key("a"), Waiting("first", 0.0))
    backlog.charge("first", 1000)
    backlog.remove(key("a"))
    backlog.add(key("b"), Waiting("second", 0.0))
    backlog.add(key("c"), Waiting("first", 0.0))
    backlog.charge("second", 1)
    assert backlog.next(0.0) == key("c")


def test_what_waits_before_a_request() -> None:
    backlog = Backlog()
    assert backlog.before("a", 5.0) == Before(0.0, 0)
    backlog.add(key("1"), Waiting("a", 1.0, prefill_s=0.1))
    backlog.add(key("2"), Waiting("a", 9.0, prefill_s=0.2))
    assert backlog.before("a", 5.0) == Before(0.1, 1)
    assert backlog.before("a", 9.0) == pytest.approx((0.3, 2))
    for number in range(10):
        backlog.add(key(f"b{number}"), Waiting("b", 0.0, prefill_s=1.0))
    # For each of its own before it, and for itself, one of the other's.
    assert backlog.before("a", 5.0) == pytest.approx((2.1, 3))
    assert backlog.before("c", 0.0) == pytest.approx((1.15, 2))


def test_tenants_are_forgotten() -> None:
    backlog = Backlog()
    for number in range(TENANTS_KEPT + 10):
        backlog.charge(f"t{number}", 1)
    assert len(backlog._served) == TENANTS_KEPT


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 30), tenants=st.integers(2, 5), largest=st.integers(1, 400))
def test_service_of_those_that_wait_never_differs_by_much(
    seed: int, tenants: int, largest: int
) -> None:
    """While two tenants both wait, what they get differs by no more than two of the largest
    requests: VTC's bound (its theorem 4.4) with one request served at a time."""
    chance = Random(seed)
    backlog, served = Backlog(), Counter[str]()
    for number in range(300 * tenants):
        backlog.add(key(str(number)), Waiting(f"t{number % tenants}", chance.random()))
    for _ in range(250):
        first = backlog.next(0.0)
        assert first is not None
        backlog.remove(first)
        tenant = f"t{int(first.removeprefix('0:')) % tenants}"
        tokens = chance.randint(1, largest)
        served[tenant] += tokens
        backlog.charge(tenant, tokens)
        assert max(served.values()) - min(served[f"t{n}"] for n in range(tenants)) <= 2 * largest


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 30))
def test_nobody_starves(seed: int) -> None:
    """However many newer requests of whatever class and tenant keep coming, twice as fast as they
    are served: each goes within a time that does not grow with them."""
    chance = Random(seed)
    backlog, tenants = Backlog(), dict[RequestKey, str]()
    now_s, number = 0.0, 0
    promised_s, slowest = 2.0, 4.0

    def come(name: str, tenant: str, after: float) -> None:
        tenants[key(name)] = tenant
        due_s = now_s + after * promised_s
        backlog.add(key(name), Waiting(tenant, due_s, now_s + promised_s, 0.05))

    come("low", "t0", slowest)
    while key("low") in backlog:
        for _ in range(2):
            number += 1
            come(str(number), f"t{chance.randrange(3)}", chance.choice((0.5, 1.0, slowest)))
        first = backlog.next(now_s)
        assert first is not None
        backlog.remove(first)
        backlog.charge(tenants[first], chance.randint(1, 500))
        now_s += 0.05
        # Of its own tenant nothing that comes later than this is due before it.
        last_s = slowest * promised_s + BEHIND_S
        assert now_s < 10 * last_s, "it starves"
