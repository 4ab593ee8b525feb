"""Which workers are started, on a virtual clock: event, then commands."""

from __future__ import annotations

from cluster.pools import BecameReady, Begun, Died, Pools, Start, Tick, TickAt, role_of
from protos.ids import WorkerId

P0, D0, D1, D2 = (WorkerId(name) for name in ("prefill-0", "decode-0", "decode-1", "decode-2"))


def started() -> Pools:
    pools = Pools({"prefill": 1, "decode": 2})
    assert pools.handle(0, Begun({})) == [
        Start(P0, "prefill"),
        Start(D0, "decode"),
        Start(D1, "decode"),
    ]
    for worker in (P0, D0, D1):
        assert pools.handle(30, BecameReady(worker)) == []
    return pools


def test_what_is_wanted_is_started() -> None:
    pools = started()
    assert [slot.state for slot in pools.slots()] == ["ready"] * 3
    assert (pools.ready("prefill"), pools.ready("decode")) == (1, 2)


def test_an_empty_pool_stays_empty() -> None:
    assert Pools({"prefill": 0, "decode": 1}).handle(0, Begun({})) == [Start(D0, "decode")]


def test_a_dead_worker_is_replaced_at_once_under_a_new_number() -> None:
    pools = started()
    assert pools.handle(100, Died(D0, "killed")) == [Start(D2, "decode")]
    slot = pools.slots()[1]
    assert (slot.worker_id, slot.state, slot.restarts, slot.reason) == (D2, "starting", 1, "killed")
    assert pools.handle(100, Died(D0, "told twice")) == []


def test_failures_at_start_are_repeated_ever_more_slowly() -> None:
    pools = Pools({"prefill": 0, "decode": 1})
    (command,) = pools.handle(0, Begun({}))
    now_s, pauses_s = 0.0, []
    for _ in range(7):
        assert isinstance(command, Start)
        (later,) = pools.handle(now_s, Died(command.worker_id, "no such model"))
        assert isinstance(later, TickAt)
        pauses_s.append(later.at_s - now_s)
        assert pools.handle(later.at_s - 0.01, Tick()) == [later]
        now_s = later.at_s
        (command,) = pools.handle(now_s, Tick())
    assert pauses_s == [1, 2, 4, 8, 16, 30, 30]
    assert pools.slots()[0].reason == "no such model"


def test_a_death_soon_after_the_start_counts_as_one() -> None:
    pools = started()
    assert pools.handle(35, Died(D0, "crashed")) == [TickAt(36)]
    assert pools.slots()[1].state == "dead"
    assert pools.handle(36, Tick()) == [Start(D2, "decode")]


def test_a_settled_life_ends_the_back_off() -> None:
    pools = started()
    pools.handle(35, Died(D0, "crashed"))
    pools.handle(36, Tick())
    pools.handle(40, BecameReady(D2))
    assert pools.handle(60, Died(D2, "killed")) == [Start(WorkerId("decode-3"), "decode")]


def test_workers_that_were_found_are_kept_and_their_numbers_not_reused() -> None:
    pools = Pools({"prefill": 1, "decode": 2})
    found = {WorkerId("decode-10"): "decode", P0: "prefill"}
    assert pools.handle(5, Begun(found)) == [  # type: ignore[arg-type]
        Start(WorkerId("decode-11"), "decode")
    ]
    assert (pools.ready("prefill"), pools.ready("decode")) == (1, 1)


def test_events_of_unknown_workers_are_ignored() -> None:
    pools = started()
    assert pools.handle(50, BecameReady(WorkerId("decode-99"))) == []
    assert pools.handle(50, Died(WorkerId("prefill-99"), "")) == []


def test_names_of_workers() -> None:
    assert role_of("prefill-3") == "prefill"
    assert role_of("decode-0") == "decode"
    assert role_of("supervisor") is None
    assert role_of("store-1") is None
