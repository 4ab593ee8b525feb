"""Joint placement: what it prefers, what it counts, and that it counts everything back."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base import EngineLoad
from engine.latency_model import StepTimes
from engine.learned_times import FIRST_SPREAD, PROFILE_WEIGHT
from engine.spec import SimulatedTiming
from kvstore.index import KvIndex
from protos.enginecore import ENGINE_TAG
from protos.ids import Incarnation, RequestKey, WorkerId
from router.core.backlog import Before
from router.core.columns import Columns
from router.core.costs import Slo, Weights
from router.core.events import Role, Shape, WorkerUp
from router.core.forecast import LARGEST_SHARE, Forecast, Part
from router.core.joint import JointPlacement
from router.core.placement import Decision, Expected, Reason, View
from router.core.workers import Worker, WorkerPool

BLOCK_TOKENS = 128
TIMING = SimulatedTiming(
    step_base_s=0.006,
    prefill_token_s=20e-6,
    prefill_pair_s=1e-9,
    decode_request_s=13e-6,
    decode_context_token_s=43e-9,
    transfer_block_s=0.4e-3,
)
SLO = Slo(ttft_s=2.0, tpot_s=0.05)
NOTHING = Before()
NO_TIME = SimulatedTiming(
    step_base_s=0.0,
    prefill_token_s=0.0,
    prefill_pair_s=0.0,
    decode_request_s=0.0,
    decode_context_token_s=0.0,
    transfer_block_s=0.0,
)


class Bench:
    """A policy, the workers that it sees and their caches."""

    def __init__(self, *names: str, slo: Slo = SLO, tie: int = 0, hold: float = math.inf) -> None:
        self.pool = WorkerPool()
        for name in names:
            role = Role.PREFILL if name[0] == "p" else Role.DECODE
            self.pool.attach(
                WorkerUp(
                    WorkerId(name), Incarnation(1), role, ENGINE_TAG, BLOCK_TOKENS, 3000, 131_072
                )
            )
        self.index = KvIndex(100_000)
        self.view = View(self.pool, self.index, BLOCK_TOKENS, True, 0)
        weights = Weights(hold=hold)
        self.policy = JointPlacement(lambda n: tie % n, StepTimes(TIMING), 8192, slo, weights)
        self.now_s = 100.0
        self._made = 0

    def place(self, tokens: int = 1280, prefix: int = 0, **more: object) -> Decision:
        self._made += 1
        values = {"max_tokens": None, "addresses": addresses(prefix, tokens)} | more
        shape = Shape(tokens, **values)  # type: ignore[arg-type]
        decision = self.policy.place(self.now_s, self.view, self.key(self._made), shape)
        assert decision is not None
        return decision

    def key(self, number: int) -> RequestKey:
        return RequestKey(f"0:{number}")

    def first_token(self, number: int) -> None:
        self.policy.first_token(self.now_s, self.key(number))

    def ended(self, number: int, output_tokens: int | None = 100) -> None:
        self.policy.ended(self.now_s, self.key(number), output_tokens)


def addresses(prefix: int, tokens: int) -> list[bytes]:
    return [f"{prefix}/{n}".encode() for n in range(tokens // BLOCK_TOKENS)]


def predicted(decision: Decision, worker: str, role: Role = Role.DECODE) -> dict[str, float]:
    (found,) = [each for each in decision.candidates if (each.worker, each.role) == (worker, role)]
    return dict(zip(decision.compared, found.numbers, strict=True))


def predicted_part(decision: Decision, name: str) -> float:
    """A number that only one of the parts compared has."""
    at = decision.compared.index(name)
    (found,) = [each.numbers[at] for each in decision.candidates if each.numbers[at]]
    return found


def test_an_idle_worker_is_predicted_by_the_profile() -> None:
    decision = Bench("d1").place(tokens=1280)
    numbers = predicted(decision, "d1")
    prefill_s = 1280 * 20e-6 + 1280 * 640 * 1e-9 + 0.006
    assert numbers["ttft_s"] == pytest.approx(prefill_s)
    assert numbers["queue_s"] == 0
    # One decode of the prompt and half of the 256 tokens that are expected.
    assert numbers["tpot_s"] == pytest.approx(0.006 + 13e-6 + (1280 + 128) * 43e-9)


def test_what_waits_is_waited_for_and_shrinks_with_time() -> None:
    bench = Bench("d1")
    first_s = predicted(bench.place(tokens=8192), "d1")["ttft_s"]
    bench.now_s += first_s / 4
    queue_s = predicted(bench.place(), "d1")["queue_s"]
    assert queue_s == pytest.approx(first_s * 3 / 4)


def test_prompts_share_a_steps_base() -> None:
    bench = Bench("d1")
    alone_s = predicted(bench.place(tokens=1024, prefix=0), "d1")["ttft_s"]
    for prefix in range(1, 7):
        bench.place(tokens=1024, prefix=prefix)
    together_s = predicted(bench.place(tokens=1024, prefix=7), "d1")["ttft_s"]
    assert together_s == pytest.approx(8 * (alone_s - 0.006) + 0.006 + 0.006 * 7 / 8)


def test_an_overdue_prompt_is_taken_to_end_now() -> None:
    bench = Bench("d1")
    bench.place(tokens=12_800)
    bench.now_s += 60
    assert predicted(bench.place(), "d1")["queue_s"] == 0


def test_first_tokens_move_what_waits_behind() -> None:
    bench = Bench("d1")
    first_s = predicted(bench.place(tokens=12_800, prefix=0), "d1")["ttft_s"]
    second = predicted(bench.place(tokens=12_800, prefix=1), "d1")
    bench.now_s += first_s / 2  # Twice as fast as predicted.
    bench.first_token(1)
    queue_s = predicted(bench.place(prefix=2), "d1")["queue_s"]
    assert queue_s == pytest.approx(second["prefill_s"], rel=0.02)


def test_load_spreads() -> None:
    bench = Bench("d1", "d2", "d3")
    chosen = {bench.place(prefix=number).worker for number in range(3)}
    assert chosen == {"d1", "d2", "d3"}


def test_a_prompt_goes_where_its_beginning_is() -> None:
    bench = Bench("d1", "d2", "d3")
    bench.index.store("d2", addresses(7, 12_800))
    decision = bench.place(tokens=12_800, prefix=7)
    assert decision.worker == "d2"
    # The last token has to be computed whatever is cached.
    assert predicted(decision, "d2")["cached_tokens"] == 12_672


def test_a_prompt_follows_one_that_is_still_being_computed() -> None:
    bench = Bench("d1", "d2", "d3", tie=1)
    before = bench.place(tokens=12_800, prefix=7).worker
    assert bench.place(tokens=12_800, prefix=7).worker == before
    bench.ended(1, None)
    assert predicted(bench.place(tokens=12_800, prefix=7), before or "")["cached_tokens"] > 0
    bench.ended(2, None)
    bench.ended(3, None)
    assert predicted(bench.place(tokens=12_800, prefix=7), before or "")["cached_tokens"] == 0


def test_a_hot_prefix_is_replicated_before_it_melts_its_worker() -> None:
    bench = Bench("d1", "d2", "d3")
    bench.index.store("d1", addresses(7, 6400))
    chosen = []
    for _ in range(400):
        chosen.append(bench.place(tokens=6400, prefix=7).worker)
        bench.now_s += 0.002
    assert chosen[:5] == ["d1"] * 5
    assert set(chosen) == {"d1", "d2", "d3"}


def test_a_long_prompt_is_kept_from_those_who_decode() -> None:
    bench = Bench("p1", "d1", slo=Slo(ttft_s=8.0, tpot_s=0.03))
    for number in range(40):
        bench.place(tokens=2560, prefix=number)
        bench.now_s += 0.2
        bench.first_token(number + 1)
    decision = bench.place(tokens=25_600, prefix=99)
    assert (decision.reason, decision.prefill, decision.worker) == (
        Reason.SPLIT_COSTS_LESS,
        "p1",
        "d1",
    )


def test_a_prompt_that_is_cached_where_it_decodes_stays_there() -> None:
    bench = Bench("p1", "d1")
    bench.index.store("d1", addresses(7, 2560))
    decision = bench.place(tokens=2560, prefix=7)
    assert (decision.reason, decision.prefill, decision.worker) == (
        Reason.WHOLE_COSTS_LESS,
        None,
        "d1",
    )


def test_what_requests_share_fills_a_cache_once() -> None:
    """50 requests of one prompt are far more than the cache holds, if each counted."""
    bench = Bench("d1", "d2")
    first = bench.pool.get(WorkerId("d1"))
    assert first is not None
    first.load = EngineLoad(running=50, kv_blocks_used=200, kv_blocks_total=3000)
    bench.index.store("d1", addresses(7, 12_800))
    chosen = []
    for number in range(1, 51):
        chosen.append(bench.place(tokens=12_800, prefix=7).worker)
        bench.now_s += 0.1
        bench.first_token(number)
    assert chosen[:20] == ["d1"] * 20


def test_a_full_cache_is_avoided() -> None:
    bench = Bench("d1", "d2", tie=0)
    full = bench.pool.get(WorkerId("d1"))
    assert full is not None
    full.load = EngineLoad(running=1, kv_blocks_used=2990, kv_blocks_total=3000)
    assert {bench.place(prefix=number).worker for number in range(10)} == {"d2"}


@pytest.mark.parametrize(
    ("names", "shape", "reason"),
    [
        (("d1",), {}, Reason.PREFILL_DOWN),
        (("p1",), {}, Reason.DECODE_DOWN),
        (("p1", "d1"), {"prompt_logprobs": True}, Reason.PROMPT_LOGPROBS),
        (("p1", "d1"), {"output_tokens": 3}, Reason.RESUME),
    ],
)
def test_what_is_never_split(
    names: tuple[str, ...], shape: dict[str, object], reason: Reason
) -> None:
    decision = Bench(*names).place(**shape)  # type: ignore[arg-type]
    assert (decision.reason, decision.prefill) == (reason, None)


def test_what_can_be_fetched_is_not_computed_again() -> None:
    bench = Bench("p1", "d1", "d2")
    decision = bench.place(tokens=12_800, output_tokens=1, fetchable=True)
    assert (decision.reason, decision.prefill) == (Reason.RESUME, None)
    assert predicted(decision, "d1")["prefill_s"] == 0
    assert not bench.policy.forecasts[WorkerId(decision.worker or "")].prefills
    bench.first_token(1)
    assert bench.policy.forecasts[WorkerId(decision.worker or "")].running == 1
    bench.ended(1)
    assert bench.policy.forecasts[WorkerId(decision.worker or "")].idle


def test_nobody_is_nobody() -> None:
    bench = Bench()
    shape = Shape(10, None)
    assert bench.policy.place(1.0, bench.view, RequestKey("0:a"), shape) is None


def test_equals_are_told_apart_by_the_generator() -> None:
    assert [Bench("d1", "d2", tie=tie).place().worker for tie in (0, 1)] == ["d1", "d2"]


def test_lengths_are_learned_from_whole_outputs() -> None:
    bench = Bench("d1")
    for number in range(1, 200):
        bench.place(tokens=128, kind="tools")
        bench.first_token(number)
        bench.ended(number, 10 if number % 2 else None)
    share = predicted(bench.place(tokens=12_800, kind="tools"), "d1")["tpot_s"]
    other = predicted(bench.place(tokens=12_800, kind="chat"), "d1")["tpot_s"]
    assert share < other


events = st.lists(
    st.tuples(
        st.sampled_from(["place", "first", "end", "lose"]),
        st.integers(1, 30),
        st.integers(1, 20_000),
    ),
    max_size=120,
)


@settings(deadline=None, max_examples=200)
@given(events, st.sampled_from([("d1", "d2"), ("p1", "p2", "d1")]))
def test_all_that_is_counted_goes_when_all_have_ended(
    story: list[tuple[str, int, int]], names: tuple[str, ...]
) -> None:
    bench = Bench(*names)
    rng = Random(len(story))
    for what, number, tokens in story:
        bench.now_s += rng.random()
        if what == "place":
            decision = bench.place(tokens, prefix=number % 3)
            assert {decision.worker, decision.prefill} - {None} <= set(names)
        elif what == "first":
            bench.first_token(number)
        else:
            bench.ended(number, 5 if what == "end" else None)
    for number in range(1, 130):
        bench.ended(number, None)
    for forecast in bench.policy.forecasts.values():
        assert forecast.idle
        assert (forecast.running, forecast.coming_tokens) == (0, 0)
        assert forecast.context_tokens == pytest.approx(0, abs=1e-6)
        assert forecast.running_context_tokens == pytest.approx(0, abs=1e-6)
        assert forecast.queue_s(bench.now_s) == 0


def test_a_share_decays_over_its_window() -> None:
    bench, forecast = Bench("d1"), Forecast()
    workers = bench.pool.usable(Role.DECODE)
    columns = Columns((), workers, lambda _: forecast)
    assert columns.prefill_share(0.0, 10.0) == [0.0]
    forecast.add_prefill(0.0, RequestKey("0:a"), part(0.4), 10.0)
    columns.write(WorkerId("d1"), forecast)
    # Of the window there has been one second.
    seen = 0.4 * math.exp(-0.1) / (10 * (1 - math.exp(-0.1)))
    assert columns.prefill_share(1.0, 10.0) == pytest.approx([seen])
    forecast.add_prefill(1000.0, RequestKey("0:b"), part(5.0), 10.0)
    columns.write(WorkerId("d1"), forecast)
    assert columns.prefill_share(1000.0, 10.0) == pytest.approx([0.5])
    assert columns.prefill_share(1010.0, 10.0) == pytest.approx([0.5 / math.e])
    forecast.add_prefill(1010.0, RequestKey("0:c"), part(99.0), 10.0)
    columns.write(WorkerId("d1"), forecast)
    assert columns.prefill_share(1010.0, 10.0) == pytest.approx([LARGEST_SHARE])
    assert columns.queue_s(1010.0) == pytest.approx([forecast.queue_s(1010.0)])


def test_the_best_few_and_the_chosen_are_kept_of_many() -> None:
    names = [f"d{number:03}" for number in range(300)]
    bench = Bench(*names, tie=299)
    for name in names[:10]:
        worker = bench.pool.get(WorkerId(name))
        assert worker is not None
        worker.load = EngineLoad(kv_blocks_used=3000, kv_blocks_total=3000)
    decision = bench.place(prefix=1)  # 290 equals, of which the generator takes the tenth.
    assert decision.worker == "d019"
    kept = list(decision.candidates)
    assert (len(kept), len(decision.candidates), decision.left_out) == (16, 16, 284)
    assert {each.worker for each in kept} == {*names[10:26]}
    assert len({each.cost for each in kept}) == 1
    other = Bench(*names, tie=290).place(prefix=1)
    assert other.candidates[-1].worker == other.worker == "d290"


def part(occupies_s: float) -> Part:
    return Part(WorkerId("d"), occupies_s=occupies_s)


def queued(*seconds: float) -> Forecast:
    """Prompts a, b, c... that were placed at 100 s."""
    forecast = Forecast()
    for name, occupies_s in zip("abcd", seconds, strict=False):
        forecast.add_prefill(100.0, RequestKey(name), part(occupies_s), 10.0)
    return forecast


def test_lateness_counts_once() -> None:
    forecast = queued(1.0)
    forecast.add_prefill(103.0, RequestKey("b"), part(1.0), 10.0)
    forecast.end_prefill(103.5, RequestKey("a"))
    assert forecast.queue_s(103.5) == pytest.approx(1.0)


def test_one_that_leaves_the_middle_moves_those_behind_it() -> None:
    forecast = queued(1.0, 2.0, 1.0)
    forecast.end_prefill(100.1, RequestKey("b"))
    assert forecast.queue_s(100.1) == pytest.approx(1.9)
    assert forecast.prefills[RequestKey("a")].due_s == 101.0
    assert forecast.prefills[RequestKey("c")].due_s == 102.0


def test_one_that_leaves_half_done_saves_the_other_half() -> None:
    forecast = queued(10.0, 1.0)
    forecast.end_prefill(109.0, RequestKey("a"))
    assert forecast.queue_s(109.0) == pytest.approx(1.0)


@pytest.mark.parametrize("true", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("at_once", [1, 30, 200])
def test_the_learned_factor_is_that_of_the_engine(true: float, at_once: int) -> None:
    """However many prompts were placed before the first of them told anything."""
    bench = Bench("d1")
    for prefix in range(at_once):
        bench.place(tokens=12_800, prefix=prefix)
    work_s = 12_800 * (20e-6 + 6400 * 1e-9)
    for number in range(1, at_once + 1):
        bench.now_s += true * work_s + 2 * 0.006
        bench.first_token(number)
    bench.place(tokens=12_800, prefix=999)
    bench.now_s += 1.0
    bench.first_token(at_once + 1)
    # Bases are predicted as they were when each was placed, with what was to decode there.
    assert bench.policy.learned.prefill.value == pytest.approx(true, rel=0.2)


def decoding(bench: Bench, tokens: int = 1280) -> Worker:
    """A worker that decodes one request, and nothing waits there."""
    bench.place(tokens=tokens)
    bench.now_s += 0.1
    bench.first_token(1)
    (worker,) = bench.pool
    return worker


def test_steps_that_only_decode_tell_how_long_those_take() -> None:
    bench = Bench("d1")
    worker = decoding(bench)
    bench.now_s += 50  # Prompts' share of the time is past.
    before_s = predicted(bench.place(tokens=128, prefix=1), "d1")["tpot_s"]
    bench.ended(2, None)
    step_s = 0.006 + 13e-6 + (1280 + 128) * 43e-9
    worker.load = EngineLoad(running=1, step_time_s=3 * step_s)
    for _ in range(100):
        bench.policy.stepped(bench.now_s, worker)
    assert bench.policy.learned.step.value == pytest.approx(3, rel=0.01)
    bench.now_s += 50
    after_s = predicted(bench.place(tokens=128, prefix=1), "d1")["tpot_s"]
    assert after_s == pytest.approx(3 * before_s, rel=0.02)


def test_steps_beside_prompts_tell_nothing() -> None:
    bench = Bench("d1")
    worker = decoding(bench)
    bench.place(tokens=12_800, prefix=1)
    worker.load = EngineLoad(running=2, step_time_s=0.4)
    bench.policy.stepped(bench.now_s, worker)
    assert bench.policy.learned.step.observations == 0


def test_what_runs_before_it_is_told_of_is_taken_to_be_like_the_rest() -> None:
    bench = Bench("d1")
    worker = decoding(bench)
    ten_s = 0.006 + 10 * (13e-6 + (1280 + 128) * 43e-9)
    worker.load = EngineLoad(running=10, step_time_s=ten_s)
    bench.policy.stepped(bench.now_s, worker)
    assert bench.policy.learned.step.value == pytest.approx(1)


def test_hand_offs_tell_how_long_transfers_take() -> None:
    bench = Bench("p1", "d1", slo=Slo(ttft_s=2.0, tpot_s=0.008))
    for number in range(8):
        bench.place(tokens=128, prefix=number, output_tokens=1)  # It goes on as a whole.
        bench.now_s += 0.1
        bench.first_token(number + 1)
    decoding = bench.policy.forecasts[WorkerId("d1")]
    before_s = 0.006 + 8 * 13e-6 + decoding.context_tokens * 43e-9
    decision = bench.place(tokens=12_800, prefix=9)
    assert (decision.prefill, decision.worker) == ("p1", "d1")
    assert predicted_part(decision, "transfer_s") == pytest.approx(
        (100 * 0.4e-3 + before_s / 2) * math.exp(FIRST_SPREAD**2 / 2)
    )
    bench.now_s += 1.0
    bench.first_token(9)
    step_s = before_s + 13e-6 + (12_800 + 128) * 43e-9
    moved_s = 100 * 0.4e-3 + step_s / 2
    bench.now_s += 2 * moved_s + step_s
    bench.first_token(9)
    weight = moved_s / (moved_s + step_s)
    learned = 2 ** (weight / (weight + PROFILE_WEIGHT))
    assert bench.policy.learned.transfer.value == pytest.approx(learned)


def test_first_tokens_that_are_hard_to_tell_cost_more() -> None:
    def cost(spread: float) -> float:
        bench = Bench("d1")
        bench.policy.learned.first_token.log_variance = spread**2
        return bench.place(tokens=12_800).candidates[0].cost

    assert cost(0.5) > cost(0.1)


def test_what_must_be_over_is_taken_off() -> None:
    """Three requests of which nothing is heard: one computed, one not, one split."""
    bench = Bench("p1", "d1", slo=Slo(ttft_s=2.0, tpot_s=0.02))
    bench.place(tokens=128, prefix=1, max_tokens=2000)
    bench.first_token(1)
    bench.place(tokens=128, prefix=2, max_tokens=2000, prompt_logprobs=True)
    assert bench.place(tokens=25_600, prefix=3, max_tokens=2000).prefill == "p1"
    assert sum(len(each.prefills) for each in bench.policy.forecasts.values()) == 2
    bench.now_s += 70
    for number in range(4, 7):  # Each question looks at two.
        bench.place(tokens=128, prefix=9, max_tokens=1)
        bench.ended(number, None)
    assert not any(each.prefills for each in bench.policy.forecasts.values())
    assert bench.policy.forecasts[WorkerId("d1")].decodes == 3
    bench.now_s += 60
    for number in range(7, 10):
        bench.place(tokens=128, prefix=9, max_tokens=1)
        bench.ended(number, None)
    assert all(each.idle for each in bench.policy.forecasts.values())
    assert bench.policy.forecasts[WorkerId("p1")].coming_tokens == 0


def test_what_is_late_yet_comes_goes_on() -> None:
    bench = Bench("p1", "d1", slo=Slo(ttft_s=2.0, tpot_s=0.02))
    bench.place(tokens=25_600, max_tokens=10_000)
    bench.now_s += 100
    for number in range(2, 4):
        bench.place(tokens=128, prefix=9, max_tokens=1)
        bench.ended(number, None)
    assert not bench.policy.forecasts[WorkerId("p1")].prefills
    bench.first_token(1)
    bench.first_token(1)
    decode = bench.policy.forecasts[WorkerId("d1")]
    assert (decode.running, decode.decodes, decode.coming_tokens) == (1, 1, 0)
    assert bench.policy.forecasts[WorkerId("p1")].coming_tokens == 0
    bench.ended(1)
    assert all(each.idle for each in bench.policy.forecasts.values())


def test_workers_that_are_gone_are_forgotten() -> None:
    bench = Bench("d1")
    for number in range(1, 60):
        name = WorkerId(f"gone{number}")
        up = WorkerUp(name, Incarnation(1), Role.DECODE, ENGINE_TAG, BLOCK_TOKENS, 3000, 131_072)
        gone = bench.pool.attach(up)
        bench.place(prefix=number)
        bench.ended(number, None)
        bench.pool.remove(gone)
    assert len(bench.policy.forecasts) < 25


def expected(bench: Bench, tokens: int, before: Before = NOTHING) -> Expected:
    shape = Shape(tokens, None)
    found = bench.policy.expect(bench.now_s, bench.view, shape, before)
    assert found is not None
    return found


def test_an_idle_worker_is_expected_to_serve_at_once() -> None:
    bench = Bench("d1")
    for tokens in (128, 100_000):  # However long the prompt: its tokens come after it.
        found = expected(bench, tokens)
        assert found.ttft_s == pytest.approx(found.alone_ttft_s)
        assert found.tpot_s == pytest.approx(found.alone_tpot_s, rel=0.02)


def test_what_waits_is_expected_to_go_first() -> None:
    bench = Bench("d1", "d2")
    alone = expected(bench, 1280)
    behind = expected(bench, 1280, Before(work_s=3.0, requests=4))
    assert behind.ttft_s == pytest.approx(alone.ttft_s + 1.5)
    each_s = 13e-6 + (1280 + 128) * 43e-9
    assert behind.tpot_s - alone.tpot_s == pytest.approx(2 * each_s, rel=0.05)


def test_of_those_that_decode_some_will_have_ended() -> None:
    bench = Bench("d1")
    for number in range(40):
        bench.place(tokens=1280, prefix=number)
        bench.now_s += 1.0
        bench.first_token(number + 1)
    bench.now_s += 60.0
    soon = expected(bench, 1280)
    later = expected(bench, 1280, Before(work_s=60.0))
    assert soon.alone_tpot_s < later.tpot_s < soon.tpot_s


def test_nothing_is_expected_of_nobody() -> None:
    bench = Bench()
    shape = Shape(128, None)
    assert bench.policy.expect(bench.now_s, bench.view, shape, NOTHING) is None


def test_prompts_wait_at_the_router_while_every_worker_has_enough() -> None:
    bench = Bench("d1", "d2", hold=0.15)
    shape = Shape(12_800, None)  # 0.3 s is 15 % of the promised 2 s.
    placed = [
        bench.policy.place(bench.now_s, bench.view, bench.key(100 + number), shape)
        for number in range(4)
    ]
    assert [each is not None for each in placed] == [True, True, False, False]
    resumed = Shape(12_800, None, output_tokens=3)
    assert bench.policy.place(bench.now_s, bench.view, bench.key(200), resumed) is not None


def test_what_can_not_be_split_does_not_stand_before_others() -> None:
    bench = Bench("p1", "d1", hold=0.15)
    one_token = Shape(12_800, 1)
    for number in range(3):
        assert bench.policy.place(bench.now_s, bench.view, bench.key(number), one_token)
    assert bench.policy.forecasts[WorkerId("d1")].queue_s(bench.now_s) > 0.3
    assert bench.policy.forecasts[WorkerId("p1")].queue_s(bench.now_s) == 0


def test_steps_that_take_no_time_leave_something_to_compare() -> None:
    pool = Bench("d1")
    policy = JointPlacement(lambda n: 0, StepTimes(NO_TIME), 8192, SLO)
    assert policy.expect(0.0, pool.view, Shape(128, None), NOTHING) is not None
    assert policy.place(0.0, pool.view, pool.key(1), Shape(128, None)) is not None
