"""Joint placement: what it prefers, and whom it has wait."""

from __future__ import annotations

import pytest

from engine.base import EngineLoad, PlacedWork
from protos.ids import RequestKey, WorkerId
from router.core.costs import Slo
from router.core.events import Shape
from router.core.placement import Reason
from tests.router.core.joint_bench import SLO, Bench, addresses, predicted


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


def test_where_few_come_a_prompt_does_not_wait_for_another_ones_beginning() -> None:
    bench = Bench("d1", "d2")
    bench.place(tokens=1280, prefix=1)
    bench.ended(1)
    bench.now_s += 60.0  # By now it is known that few come.
    first = bench.place(tokens=12_800, prefix=7).worker
    assert bench.place(tokens=12_800, prefix=7).worker != first


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


@pytest.mark.parametrize("asked", [{}, {"ttft_slo_s": 60.0}, {"tpot_slo_s": 5.0}])
def test_who_asks_for_less_has_no_right_to_others_time(asked: dict[str, float]) -> None:
    bench = Bench("p1", "p2", "d1", kv_blocks=20_000)
    for number in range(60):
        bench.place(tokens=1000, prefix=number, max_tokens=400)
        bench.first_token(number + 1)
        bench.now_s += 0.2
        bench.first_token(number + 1)
    bench.now_s += 1.0
    waits = {bench.place(tokens=8000, prefix=900 + number).prefill for number in range(2)}
    assert waits == {"p1", "p2"}
    decision = bench.place(tokens=16_000, prefix=999, max_tokens=400, **asked)
    assert decision.reason is Reason.SPLIT_COSTS_LESS


def test_an_output_that_is_said_to_be_short_is_not_handed_over() -> None:
    """Its client would wait for its second token while the prompt's state moves."""

    def decided(hint: int) -> Reason:
        bench = Bench("p1", "d1")
        for number in range(12):
            bench.place(tokens=1000, prefix=number, output_tokens=1, fetchable=True)
            bench.first_token(number + 1)
        return bench.place(tokens=6000, prefix=99, hinted_output_tokens=hint).reason

    assert (decided(2), decided(2000)) == (Reason.WHOLE_COSTS_LESS, Reason.SPLIT_COSTS_LESS)


def test_prompts_are_kept_longer_from_outputs_of_which_some_are_short() -> None:
    def kept(*output_tokens: int) -> int:
        """How many prompts go to the prefill worker before the first is computed beside others."""
        bench = Bench("p1", "d1")
        for number in range(1, 209):
            bench.place(tokens=256, prefix=number)
            bench.first_token(number)
            bench.now_s += 1.0
            if number <= 200:
                bench.ended(number, output_tokens[number % len(output_tokens)])
        prompts = range(1000, 1010)
        reasons = [bench.place(tokens=2560, prefix=prefix).reason for prefix in prompts]
        return [*reasons, Reason.WHOLE_COSTS_LESS].index(Reason.WHOLE_COSTS_LESS)

    assert kept(256) == 1
    assert kept(4, 508) > 3


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


def test_what_another_computed_goes_where_there_is_room() -> None:
    bench = Bench("p1", "d1", "d2", slo=Slo(ttft_s=8.0, tpot_s=0.03))
    full = bench.pool.get(WorkerId("d1"))
    assert full is not None
    full.load = EngineLoad(running=1, kv_blocks_used=2900, kv_blocks_total=3000)
    decisions = []
    for number in range(1, 9):
        decisions.append(bench.place(tokens=25_600, prefix=number))
        bench.now_s += 1.0
        bench.first_token(number)
        bench.ended(number, 256)
    assert Reason.SPLIT_COSTS_LESS in {each.reason for each in decisions}
    assert {each.worker for each in decisions} == {"d2"}


def crowded(bench: Bench, *names: str) -> None:
    """One request decodes there, and all of the cache is used."""
    for name in names:
        worker = bench.pool.get(WorkerId(name))
        assert worker is not None
        worker.others = PlacedWork(decodes=1, context_tokens=380_000)
        bench.policy.stepped(bench.now_s, worker)
        worker.load = EngineLoad(running=1, kv_blocks_used=3000, kv_blocks_total=3000)


def test_nothing_is_handed_to_a_worker_without_room_while_another_has_some() -> None:
    """Not even what is cached there."""
    bench = Bench("p1", "d1", "d2", slo=Slo(ttft_s=8.0, tpot_s=0.03))
    crowded(bench, "d1")
    bench.index.store("d1", addresses(1, 12_800))
    decision = bench.place(tokens=25_600, prefix=1)
    assert (decision.reason, decision.worker) == (Reason.SPLIT_COSTS_LESS, "d2")


def test_where_no_cache_has_room_requests_wait_until_one_does() -> None:
    bench = Bench("p1", "d1", "d2", hold=0.15)
    crowded(bench, "d1", "d2")
    shape = Shape(1280, None)
    assert bench.policy.place(bench.now_s, bench.view, bench.key(1), shape) is None
    assert bench.policy.held_share == 0.0, "who waits comes to idle workers then"
    resumed = Shape(1280, None, output_tokens=3)
    assert bench.policy.place(bench.now_s, bench.view, bench.key(2), resumed) is not None
    worker = bench.pool.get(WorkerId("d2"))
    assert worker is not None
    worker.load = EngineLoad(running=1, kv_blocks_used=2900, kv_blocks_total=3000)
    decision = bench.policy.place(bench.now_s, bench.view, bench.key(1), shape)
    assert decision is not None
    assert decision.worker == "d2"


def test_who_needs_much_more_than_others_does_not_wait_for_all_of_it() -> None:
    """All others would wait with it until a worker is as good as empty."""
    bench = Bench("p1", "d1")
    (_, worker) = bench.pool
    worker.others = PlacedWork(
        decodes=200, context_tokens=256_000, running=200, running_context_tokens=256_000
    )
    bench.policy.stepped(bench.now_s, worker)
    worker.load = EngineLoad(running=200, kv_blocks_used=2000, kv_blocks_total=3000)
    assert bench.place(tokens=131_000 // 128 * 128).worker == "d1"
    # It has taken the room: now others wait.
    shape = Shape(1280, None)
    assert bench.policy.place(bench.now_s, bench.view, bench.key(2), shape) is None


def test_who_needs_more_than_a_cache_holds_waits_only_for_what_is_there() -> None:
    """Outputs are expected to be long; the prompt fits."""
    bench = Bench("d1", kv_blocks=12)
    assert bench.place(tokens=1500).worker == "d1"


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


def test_nobody_is_nobody() -> None:
    bench = Bench()
    shape = Shape(10, None)
    assert bench.policy.place(1.0, bench.view, RequestKey("0:a"), shape) is None


def test_equals_are_told_apart_by_the_generator() -> None:
    assert [Bench("d1", "d2", tie=tie).place().worker for tie in (0, 1)] == ["d1", "d2"]


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


def test_first_tokens_that_are_hard_to_tell_cost_more() -> None:
    def cost(spread: float) -> float:
        bench = Bench("d1")
        bench.policy.learned.first_token.log_variance = spread**2
        return bench.place(tokens=12_800).candidates[0].cost

    assert cost(0.5) > cost(0.1)


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


def test_who_is_placed_waits_on_its_worker_for_no_longer_than_is_said() -> None:
    bench = Bench("d1", "d2", hold=0.15)
    waits_s = []
    for number in range(100):
        there = [bench.policy.forecasts.get(WorkerId(name)) for name in ("d1", "d2")]
        least_s = min(0.0 if each is None else each.queue_s(bench.now_s) for each in there)
        shape = Shape(1280, None)
        if not bench.policy.place(bench.now_s, bench.view, bench.key(number), shape):
            break
        waits_s.append(least_s)
    assert waits_s[-1] <= bench.policy.held_share * SLO.ttft_s < least_s


def test_what_can_not_be_split_does_not_stand_before_others() -> None:
    bench = Bench("p1", "d1", hold=0.15)
    one_token = Shape(12_800, 1)
    for number in range(3):
        assert bench.policy.place(bench.now_s, bench.view, bench.key(number), one_token)
    assert bench.policy.forecasts[WorkerId("d1")].queue_s(bench.now_s) > 0.3
    assert bench.policy.forecasts[WorkerId("p1")].queue_s(bench.now_s) == 0
