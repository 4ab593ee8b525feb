"""What other routers have on workers: it is counted, it drains, and nothing of it stays."""

from __future__ import annotations

from operator import add

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.base import NOTHING_PLACED, EngineLoad, PlacedWork
from protos.ids import Incarnation, WorkerId
from router.core.events import RequestAborted, Reserve, StepReported, Submit
from router.core.forecast import LARGEST_SHARE
from router.core.joint import JointPlacement
from router.core.workers import Worker
from tests.router.core.driving import Drive, abort_on, key, output
from tests.router.core.joint_bench import Bench, predicted

LONG = PlacedWork(prompts=1, prompt_tokens=50_000, prompt_pairs=50_000 * 25_000)
LONG_S = 50_000 * 20e-6 + 50_000 * 25_000 * 1e-9 + 50_000 / 8192 * 0.006
DONE = PlacedWork(computed_tokens=LONG.prompt_tokens, computed_pairs=LONG.prompt_pairs)
DECODING = PlacedWork(
    decodes=40, context_tokens=200_000, running=40, running_context_tokens=200_000
)


def told(bench: Bench, name: str, others: PlacedWork) -> Worker:
    worker = bench.pool.get(WorkerId(name))
    assert worker is not None
    worker.others = others
    bench.policy.stepped(bench.now_s, worker)
    return worker


def plus(one: PlacedWork, other: PlacedWork) -> PlacedWork:
    return PlacedWork(*map(add, one, other))


def queue_s(bench: Bench, name: str) -> float:
    """That a request would find; nothing of the question stays."""
    found = predicted(bench.place(tokens=128, prefix=99), name)["queue_s"]
    bench.ended(bench._made, None)
    return found


@pytest.mark.parametrize("others", [LONG, DECODING])
def test_who_is_loaded_by_others_is_avoided(others: PlacedWork) -> None:
    bench = Bench("d1", "d2")
    told(bench, "d1", others)
    assert [bench.place(prefix=n).worker for n in range(3)] == ["d2"] * 3
    told(bench, "d2", LONG)
    told(bench, "d1", NOTHING_PLACED)
    assert bench.place(prefix=5).worker == "d1"


def test_it_is_heard_before_the_first_question() -> None:
    bench = Bench("d1", "d2")
    told(bench, "d1", LONG)
    assert bench.place().worker == "d2"


def test_others_prompts_drain_with_time_and_their_end_says_where_the_queue_is() -> None:
    bench = Bench("d1")
    told(bench, "d1", LONG)
    assert queue_s(bench, "d1") == pytest.approx(LONG_S)
    bench.now_s += 1.0
    assert queue_s(bench, "d1") == pytest.approx(LONG_S - 1.0)
    # The same again says nothing new: it is being computed.
    told(bench, "d1", LONG)
    assert queue_s(bench, "d1") == pytest.approx(LONG_S - 1.0)
    told(bench, "d1", plus(LONG, LONG))
    assert queue_s(bench, "d1") == pytest.approx(2 * LONG_S - 1.0)
    # The first ends sooner than predicted: nothing of the second is computed.
    told(bench, "d1", plus(LONG, DONE))
    assert queue_s(bench, "d1") == pytest.approx(LONG_S, rel=0.05)
    bench.now_s += 10 * LONG_S
    assert queue_s(bench, "d1") == 0


def test_what_others_had_computed_before_this_router_came_is_no_news() -> None:
    bench, fresh = Bench("d1"), Bench("d1")
    bench.now_s = fresh.now_s = 100_000.0
    history = PlacedWork(computed_tokens=400_000_000, computed_pairs=400_000_000 * 1000)
    told(bench, "d1", plus(history, DECODING))
    told(fresh, "d1", DECODING)
    assert bench.place(tokens=128).predicted == fresh.place(tokens=128).predicted
    bench.now_s += 1.0
    told(bench, "d1", plus(plus(history, DECODING), LONG))
    bench.now_s += LONG_S
    told(bench, "d1", plus(plus(history, DECODING), DONE))
    assert bench.policy.learned.prefill.value == pytest.approx(1.0, rel=0.2)


def test_prompts_that_came_and_went_between_two_reports_teach_nothing() -> None:
    bench = Bench("d1")
    one = PlacedWork(computed_tokens=1000, computed_pairs=500_000)
    computed = one
    told(bench, "d1", NOTHING_PLACED)
    for _ in range(4):
        bench.now_s += 60.0
        told(bench, "d1", computed)
        computed = plus(computed, one)
    assert bench.policy.learned.prefill.observations == 0
    assert queue_s(bench, "d1") == 0.0


def test_its_own_prompts_queue_behind_others() -> None:
    bench = Bench("d1")
    told(bench, "d1", LONG)
    own = predicted(bench.place(tokens=1280), "d1")
    assert own["queue_s"] == pytest.approx(LONG_S)
    assert queue_s(bench, "d1") == pytest.approx(LONG_S + own["prefill_s"], rel=0.02)


def test_what_others_take_back_is_off_the_queue() -> None:
    bench = Bench("d1")
    told(bench, "d1", LONG)
    told(bench, "d1", NOTHING_PLACED)
    assert queue_s(bench, "d1") == 0


def test_others_prompts_and_decodes_stretch_the_time_between_tokens() -> None:
    alone = Bench("d1")
    alone_s = predicted(alone.place(), "d1")["tpot_s"]
    bench = Bench("d1")
    told(bench, "d1", DECODING)
    numbers = predicted(bench.place(), "d1")
    assert numbers["tpot_s"] == pytest.approx(alone_s + 40 * 13e-6 + 200_000 * 43e-9)
    bench = Bench("d1")
    told(bench, "d1", LONG)
    # All of a window that has just begun went to others' prompts.
    stretched = predicted(bench.place(), "d1")["tpot_s"]
    assert stretched == pytest.approx(alone_s / (1 - LARGEST_SHARE))


def test_what_others_bring_needs_room_in_the_cache() -> None:
    bench = Bench("d1", "d2")
    for name in ("d1", "d2"):
        worker = bench.pool.get(WorkerId(name))
        assert worker is not None
        worker.load = EngineLoad(kv_blocks_used=2000, kv_blocks_total=3000)
    told(bench, "d1", PlacedWork(coming_tokens=1000 * 128))
    told(bench, "d2", PlacedWork(decodes=1, context_tokens=1000))
    assert bench.place().worker == "d2"


def test_steps_of_known_decodes_teach_and_those_of_others_prompts_do_not() -> None:
    bench = Bench("d1")
    bench.place()
    bench.first_token(1)
    worker = told(bench, "d1", LONG)
    worker.load = EngineLoad(running=1, step_time_s=0.4)
    for others in (LONG, DONE):  # As it waits, and as the step tells that it is computed.
        told(bench, "d1", others)
    assert bench.policy.learned.step.observations == 0
    there = plus(DECODING, DONE)
    worker.load = EngineLoad(running=41, step_time_s=0.0)
    told(bench, "d1", there)
    step_s = 0.006 + 41 * 13e-6 + (200_000 + 1280 + 128) * 43e-9
    worker.load = EngineLoad(running=41, step_time_s=2 * step_s)
    for _ in range(100):
        told(bench, "d1", there)
    assert bench.policy.learned.step.value == pytest.approx(2, rel=0.01)


def test_others_prompts_teach_how_long_prompts_take() -> None:
    bench = Bench("d1")
    for done in range(50):
        computed = PlacedWork(*(done * value for value in DONE))
        told(bench, "d1", plus(computed, LONG))
        bench.now_s += 3 * LONG_S
        told(bench, "d1", plus(computed, DONE))
        bench.now_s += 100.0  # Nothing waits meanwhile.
    work_s = 50_000 * 20e-6 + 50_000 * 25_000 * 1e-9
    assert bench.policy.learned.prefill.value == pytest.approx(
        (3 * LONG_S - 7 * 0.006) / work_s, rel=0.05
    )


histories = st.lists(
    st.tuples(
        st.floats(0, 3),
        st.sampled_from(("place", "first", "end", "others")),
        st.integers(0, 4),
        st.integers(0, 20_000),
    ),
    max_size=40,
)


@given(histories)
def test_forecasts_count_others_exactly_and_are_empty_at_the_end(
    history: list[tuple[float, str, int, int]],
) -> None:
    bench = Bench("d1", "d2")
    made: set[int] = set()
    computed = 0
    for passed_s, action, number, tokens in history:
        bench.now_s += passed_s
        if action == "place":
            bench.place(tokens=tokens + 1, prefix=number)
            made.add(bench._made)
        elif action == "others":
            computed += tokens
            told(bench, "d1", PlacedWork(number, number * tokens, number * tokens, computed,
                                         computed, number, number * tokens))  # fmt: skip
        elif made:
            chosen = sorted(made)[number % len(made)]
            bench.first_token(chosen)
            if action == "end":
                bench.ended(chosen)
                made.remove(chosen)
        for forecast in bench.policy.forecasts.values():
            figures = forecast.figures()
            assert figures.decodes == forecast.decodes + forecast.others.placed.decodes
            assert min(figures.waiting, figures.decodes, figures.coming_tokens) >= 0
            assert forecast.queue_s(bench.now_s) >= 0
    for number in made:
        bench.ended(number)
    told(bench, "d1", NOTHING_PLACED)
    for forecast in bench.policy.forecasts.values():
        figures = forecast.figures()
        assert (figures.waiting, figures.decodes, figures.running, figures.coming_tokens) == (
            0, 0, 0, 0,
        )  # fmt: skip
        assert figures.context_tokens == pytest.approx(0, abs=1e-6)
        assert forecast.queue_s(bench.now_s) == 0


# Through the core


def others_on(drive: Drive, worker: str, others: PlacedWork) -> list[object]:
    return drive.feed(StepReported(WorkerId(worker), Incarnation(1), (), EngineLoad(), others))


@pytest.fixture
def drive() -> Drive:
    drive = Drive()
    drive.members(("p", "prefill"), ("d", "decode"))
    drive.recover()
    drive.up("p")
    drive.up("d")
    return drive


def test_a_decode_worker_is_told_what_will_come_once_there_are_others(drive: Drive) -> None:
    assert [type(command) for command in drive.arrive("a")] == [Submit]
    others_on(drive, "d", DECODING)
    announced, submitted = drive.arrive("b")
    assert announced == Reserve(WorkerId("d"), key("b"), 10)
    assert (submitted.worker, submitted.hand_off) == ("p", True)
    # It ends with the submission, on both sides.
    handed = drive.step("p", output(1, 0, [7], request_id="b", manifest=b"m"))
    assert [type(command) for command in handed if not hasattr(command, "front")] == [Submit]
    assert drive.core.moves.requests[key("b")].announced is None


def test_what_will_not_come_is_taken_back(drive: Drive) -> None:
    others_on(drive, "d", DECODING)
    drive.arrive("a")
    told = drive.feed(RequestAborted(key("a")))
    assert Reserve(WorkerId("d"), key("a"), 0) in told
    assert abort_on("p", 1) in told


def test_nothing_is_taken_back_over_a_broken_link(drive: Drive) -> None:
    others_on(drive, "d", DECODING)
    drive.arrive("a")
    drive.broken("d")
    told = drive.feed(RequestAborted(key("a")))
    assert not [command for command in told if isinstance(command, Reserve)]


def test_the_simplest_policy_sees_others_too() -> None:
    drive = Drive()
    drive.members(("d1", "decode"), ("d2", "decode"))
    drive.recover()
    drive.up("d1")
    drive.up("d2")
    others_on(drive, "d1", LONG)
    assert drive.arrive("a")[0].worker == "d2"


def test_what_waits_is_placed_when_others_made_room() -> None:
    bench = Bench("d1", hold=0.15)
    policy: JointPlacement = bench.policy
    drive = Drive(placement=policy)
    drive.members(("d", "decode"))
    drive.recover()
    drive.up("d")
    others_on(drive, "d", LONG)
    assert drive.arrive("a") == []
    assert [type(command) for command in others_on(drive, "d", DONE)] == [Submit]
