"""What routers have on a worker, in running totals."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.base import NOTHING_PLACED, NOTHING_QUEUED, QUEUE_VALID_S, PlacedWork, Queued
from engine.work_by_router import Share, WorkByRouter

ROUTERS = ("a", "b", "c")


def test_a_prompt_then_decodes_then_is_gone() -> None:
    work = WorkByRouter()
    share = work.add("a", 1000, 400, decodes=True)
    # 400 tokens attend to the 600 before them, and on average to half of themselves.
    pairs = 400 * 600 + 400 * 400 // 2
    assert work.others("b") == PlacedWork(
        prompts=1, prompt_tokens=400, prompt_pairs=pairs, decodes=1, context_tokens=1000,
        coming_tokens=400, routers=1,
    )  # fmt: skip
    work.begin(share)
    computed = PlacedWork(computed_tokens=400, computed_pairs=pairs, routers=1)
    assert work.others("b") == computed._replace(
        decodes=1, context_tokens=1000, running=1, running_context_tokens=1000, routers=1
    )
    work.end(share)
    work.end(share)  # It ended, and then its router gives it up.
    assert work.others("b") == computed


def test_what_is_handed_off_does_not_decode_and_what_was_fetched_is_not_computed() -> None:
    work = WorkByRouter()
    work.add("a", 1000, 1000, decodes=False)
    assert work.others("b") == PlacedWork(1, 1000, 500_000, coming_tokens=1000, routers=1)
    work = WorkByRouter()
    fetched = work.add("a", 1000, 0, decodes=True)
    assert work.others("b") == PlacedWork(
        decodes=1, context_tokens=1000, coming_tokens=1000, routers=1
    )
    work.begin(fetched)
    assert work.others("b") == PlacedWork(
        decodes=1, context_tokens=1000, running=1, running_context_tokens=1000, routers=1
    )


def test_a_router_alone_is_told_of_nobody() -> None:
    work = WorkByRouter()
    assert work.others("a") is None
    share = work.add("a", 10, 10, decodes=True)
    assert work.others("a") is None
    assert work.changed_beside(["a"]) == []
    work.begin(share)
    work.forget("a")
    assert work.others("b") is None


def test_routers_are_counted_until_they_are_forgotten() -> None:
    work = WorkByRouter()
    for router in ("a", "b", "b", "c"):
        work.end(work.add(router, 10, 10, decodes=True))
    assert work.others("c") == PlacedWork(routers=2)
    work.forget("a")
    assert work.others("c") == PlacedWork(routers=1)


def test_others_are_to_be_told_of_a_change_once() -> None:
    work = WorkByRouter()
    work.add("a", 10, 10, decodes=True)
    assert work.changed_beside(["a", "b"]) == ["b"]
    work.add("b", 10, 10, decodes=True)
    assert work.changed_beside(["a", "b"]) == ["a", "b"]
    work.told()
    assert work.changed_beside(["a", "b"]) == []


def test_what_is_announced_counts_until_it_comes_or_will_not() -> None:
    work = WorkByRouter()
    announced = PlacedWork(decodes=1, context_tokens=500, coming_tokens=500, routers=1)
    work.reserve("a", "0:x", 400)
    work.reserve("a", "0:x", 500)
    assert work.others("b") == announced
    work.release("a", "0:x")
    work.release("a", "0:x")
    assert work.others("b") == PlacedWork(routers=1)
    work.reserve("a", "0:x", 500)
    work.release_all("a")
    assert work.others("b") == PlacedWork(routers=1)


actions = st.lists(
    st.tuples(
        st.sampled_from(("add", "begin", "end", "reserve", "release", "forget")),
        st.sampled_from(ROUTERS),
        st.integers(0, 5),
        st.integers(1, 100_000),
        st.booleans(),
    ),
    max_size=60,
)


@given(actions)
def test_totals_are_never_negative_and_all_comes_off(
    history: list[tuple[str, str, int, int, bool]],
) -> None:
    work = WorkByRouter()
    shares: dict[str, list[Share]] = {router: [] for router in ROUTERS}
    for action, router, number, tokens, decodes in history:
        own = shares[router]
        chosen = own[number % len(own)] if own else None
        if action == "add":
            own.append(work.add(router, tokens, tokens * number // 5, decodes=decodes))
        elif action == "begin" and chosen is not None and not (chosen.begun or chosen.over):
            work.begin(chosen)
        elif action == "end" and chosen is not None:
            work.end(chosen)
        elif action == "reserve":
            work.reserve(router, str(number), tokens)
        elif action == "release":
            work.release(router, str(number))
        elif action == "forget":
            for share in own:
                work.end(share)
            own.clear()
            work.forget(router)
        told = [work.others(each) or NOTHING_PLACED for each in ROUTERS]
        assert all(value >= 0 for others in told for value in others)
        everything = work.others("nobody") or NOTHING_PLACED
        # Each router's work is in what every router but itself is told.
        assert [sum(values) for values in zip(*told, strict=True)] == [
            (len(ROUTERS) - 1) * value for value in everything
        ]
    for router, own in shares.items():
        work.release_all(router)
        for share in own:
            work.end(share)
    left = work.others("nobody") or NOTHING_PLACED
    assert left._replace(computed_tokens=0, computed_pairs=0, routers=0) == NOTHING_PLACED


def test_what_waits_at_others_is_their_sum_and_due_when_the_first_of_it_is() -> None:
    work = WorkByRouter()
    assert work.queued_beside(0.0, "a") == NOTHING_QUEUED
    work.queue(10.0, "a", Queued(1, 0.5, 4.0))
    work.queue(10.25, "b", Queued(2, 1.0, 3.0))
    work.queue(10.5, "c", Queued(3, 2.0, 9.0))
    assert work.queued_beside(10.5, "c") == Queued(3, 1.5, 2.75)
    assert work.queued_beside(10.5, "b") == Queued(4, 2.5, 3.5)
    assert work.changed_beside("ab") == ["a", "b"]
    work.told()
    work.queue(10.5, "b", NOTHING_QUEUED)
    assert work.queued_beside(10.5, "a") == Queued(3, 2.0, 9.0)
    assert work.changed_beside("ab") == ["a"]


def test_a_queue_that_is_not_repeated_is_not_believed_for_long() -> None:
    work = WorkByRouter()
    work.queue(10.0, "a", Queued(1, 0.5, 4.0))
    assert work.queued_beside(10.0 + QUEUE_VALID_S, "b") == Queued(1, 0.5, 4.0 - QUEUE_VALID_S)
    assert work.queued_beside(10.01 + QUEUE_VALID_S, "b") == NOTHING_QUEUED


def test_the_queue_of_a_router_that_begins_anew_or_is_gone_is_no_more() -> None:
    work = WorkByRouter()
    for gone in (work.release_all, work.forget):
        work.queue(10.0, "a", Queued(1, 0.5, 4.0))
        work.told()
        gone("a")
        assert work.queued_beside(10.0, "b") == NOTHING_QUEUED
        assert work.changed_beside("ab") == ["b"]
