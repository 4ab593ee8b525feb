"""The simulated cluster: whole, repeatable, and not changed by taking steps many at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.base import PlacedWork
from engine.latency_model import StepTimes, StepWork
from engine.profiles import PROFILES
from engine.simulated.scheduler import Scheduler
from protos.ids import WorkerId
from router.core.costs import Slo
from router.core.events import End, Ended
from router.core.gate import DUE_UNPROMISED_S, Promises
from router.core.placement import Placement
from simulator import workloads
from simulator.baselines import BASELINES, Setup
from simulator.cluster import Cluster, Layout
from simulator.experiment import POLICIES, engines_of, run, setup_of
from simulator.traces import TracedRequest

PROFILE = PROFILES["llama-3.1-8b-h100"]
SLO = Slo(2.0, 0.05)
LAYOUTS = [Layout(PROFILE, 0, 2), Layout(PROFILE, 1, 1), Layout(PROFILE, 2, 2, block_tokens=128)]


def unaware() -> Placement:
    """Sees nothing of the load, which is reported less often where steps are taken at once."""
    setup = Setup(Random(1), engines_of(LAYOUTS[0]), 1024)
    return BASELINES["round_robin"](setup)


def serve(layout: Layout, requests: list[TracedRequest]) -> list[Ended]:
    ends: list[Ended] = []
    cluster = Cluster(layout, [unaware()], ends.append)
    cluster.run(requests)
    cluster.routers[0].check_integrity()
    for worker in cluster.workers.values():
        worker.check_idle()
    return ends


def some(count: int = 150, rate_rps: float = 8.0) -> list[TracedRequest]:
    return list(islice(workloads.agents(workloads.Wish(rate_rps, 600.0, 1)), count))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_are_served_and_nothing_is_left(layout: Layout) -> None:
    requests = some()
    ends = serve(layout, requests)
    assert [each.end for each in ends] == [End.COMPLETE] * len(requests)
    wanted = sorted(each.output_tokens for each in requests)
    assert sorted(each.output_tokens for each in ends) == wanted


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_run(policy: str) -> None:
    first, second = (run(LAYOUTS[2], policy, SLO, some(60), seed=5) for _ in range(2))
    assert first == second
    assert first.measured.requests == 60


def one_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "steady_steps", lambda self, work: 1)


requests_strategy = st.lists(
    st.tuples(st.floats(0, 2), st.integers(1, 20_000), st.integers(1, 300), st.integers(0, 3)),
    min_size=1,
    max_size=25,
)


@settings(deadline=None, max_examples=100)
@given(requests_strategy, st.sampled_from(LAYOUTS))
@example([(0.0, 1, 4, 0)] * 2 + [(0.0, 23, 1, 0)] * 2 + [(1 / 256, 1, 1, 0)], LAYOUTS[2])
def test_steps_taken_at_once_are_the_same_steps(
    asked: list[tuple[float, int, int, int]], layout: Layout
) -> None:
    requests = list(traced(asked))
    at_once = serve(layout, requests)
    with pytest.MonkeyPatch.context() as patch:
        one_step_at_a_time(patch)
        one_by_one = serve(layout, requests)
    # What ends at one time may do so in another order.
    ended = {each.key: each for each in one_by_one}
    assert len(at_once) == len(one_by_one) == len(ended) == len(requests)
    for ours in at_once:
        theirs = ended[ours.key]
        assert ours.output_tokens == theirs.output_tokens
        for name in ("time_to_first_token_s", "duration_s", "time_per_output_token_s"):
            here, there = getattr(ours, name), getattr(theirs, name)
            assert here == there or here == pytest.approx(there, rel=1e-6, abs=1e-7)


def test_the_first_token_after_a_hand_off_is_told_when_it_is_made() -> None:
    layout, tokens = LAYOUTS[1], 4 * 512
    cluster = Cluster(layout, [unaware()], lambda end: None)
    cluster.run([TracedRequest(0.0, tokens, 200)])
    ticket = cluster.routers[0].book.find("0:0")
    assert ticket is not None
    (record,) = ticket.requests
    assert record.handed_off_s is not None
    assert record.resumed_s is not None
    times, work = StepTimes(PROFILE.timing(layout.block_tokens)), StepWork()
    work.add_decode(tokens)
    waited_s = 2 * layout.link_s + times.transfer_s(4) + times.step_s(work)
    assert record.resumed_s - record.handed_off_s == pytest.approx(waited_s)


def test_times_are_those_that_clients_see() -> None:
    asked = [TracedRequest(0.0, 2048, 20)]
    (beside,) = serve(LAYOUTS[1], asked)
    (seen,) = serve(replace(LAYOUTS[1], front_in_s=0.25, front_out_s=0.125), asked)
    assert seen.time_to_first_token_s is not None
    assert beside.time_to_first_token_s is not None
    assert seen.time_to_first_token_s - beside.time_to_first_token_s == pytest.approx(0.375)
    assert seen.time_per_output_token_s == pytest.approx(beside.time_per_output_token_s)


def traced(asked: list[tuple[float, int, int, int]]) -> Iterator[TracedRequest]:
    """Those of one group begin alike."""
    for at_s, prompt, output, group in sorted(asked):
        blocks = tuple(1000 * group + n for n in range(-(-prompt // 512)))
        yield TracedRequest(at_s, prompt, output, blocks)


@pytest.mark.parametrize(("requests", "slower"), [(1, 1.0), (2, 3.0)])
def test_engines_that_share_cores_slow_each_other_down(requests: int, slower: float) -> None:
    asked = [TracedRequest(0.0, 512, 200, ())] * requests
    alone = serve(LAYOUTS[0], asked)
    sharing = serve(replace(LAYOUTS[0], contention=3.0), asked)
    for before, after in zip(alone, sharing, strict=True):
        assert before.time_per_output_token_s is not None
        assert after.time_per_output_token_s is not None
        took = after.time_per_output_token_s / before.time_per_output_token_s
        # A step that begins while the other is between two of its own is not slowed down.
        assert 0.8 * slower <= took <= slower + 1e-9


def test_one_that_no_cache_holds_is_refused_and_the_rest_served() -> None:
    ends = serve(LAYOUTS[0], [TracedRequest(0.0, 500_000, 1), TracedRequest(0.1, 10, 3)])
    assert [each.end for each in ends] == [End.FAILED, End.COMPLETE]


def test_an_output_that_does_not_fit_is_cut_as_vllm_does() -> None:
    (end,) = serve(LAYOUTS[0], [TracedRequest(0.0, 1000, 500_000)])
    assert end.end is End.COMPLETE
    assert end.output_tokens == PROFILE.max_model_len_tokens - 1000


def test_a_shared_prefix_is_computed_once_where_it_is_kept() -> None:
    blocks = tuple(range(20))
    requests = [TracedRequest(float(n), 20 * 512, 5, blocks) for n in range(10)]
    outcome = run(LAYOUTS[0], "baton", SLO, requests)
    # All but the last token of the prompt, whose state makes the first of the output.
    assert outcome.cached_tokens == 9 * 19 * 512
    assert outcome.hit_rate == pytest.approx(0.9 * 0.95)


def test_what_was_refused_is_no_part_of_the_hit_rate() -> None:
    blocks = tuple(range(20))
    requests = [TracedRequest(n / 400, 20 * 512, 5, blocks) for n in range(2000)]
    outcome = run(LAYOUTS[0], "baton", Slo(0.5, 0.02), requests)
    assert outcome.measured.refused > 500
    assert outcome.prompt_tokens == (2000 - outcome.measured.refused) * 20 * 512
    assert outcome.hit_rate > 0.9


def test_a_prefix_is_fetched_from_the_worker_that_has_it() -> None:
    layout, tokens = Layout(PROFILE, 2, 1), 20 * 512
    asked = TracedRequest(0.0, tokens, 2, tuple(range(20)))
    # The first of equals has the prefix, and then much else to do.
    busy = TracedRequest(60.0, 40_000, 2)
    setup = Setup(Random(1), engines_of(LAYOUTS[0]), 1024)
    ends: dict[str, Ended] = {}
    cluster = Cluster(
        layout, [BASELINES["mooncake"](setup)], lambda end: ends.update({end.key: end})
    )
    cluster.run([asked, busy, asked._replace(arrival_s=60.01)])
    for worker in cluster.workers.values():
        worker.check_idle()
    lender, fetcher = (cluster.workers[WorkerId(f"prefill-{n}")] for n in range(2))
    # All but the last token, whose state makes the first of the output.
    assert (lender.cached_tokens, fetcher.cached_tokens) == (0, tokens - 1)
    work = StepWork()
    work.add_decode(tokens - 1)  # One token after all others costs what a decode does.
    waited_s = setup.prefill_times.transfer_s(20) + setup.prefill_times.step_s(work)
    ttft_s = ends["0:2"].time_to_first_token_s
    assert ttft_s == pytest.approx(2 * layout.link_s + waited_s)


@pytest.mark.parametrize("policy", BASELINES)
def test_every_peer_serves_on_both_layouts(policy: str) -> None:
    for layout in LAYOUTS[:2]:
        outcome = run(layout, policy, SLO, some(60))
        assert outcome.measured.failed == 0
        assert outcome.measured.requests == 60


def test_a_run_can_be_left_once_too_many_were_missed() -> None:
    requests = some(200, rate_rps=100.0)
    outcome = run(LAYOUTS[0], "random", Slo(0.05, 0.001), requests, misses_allowed=10)
    assert outcome.measured.requests - outcome.measured.good == 11


# Several routers


def by_router(policy: str, routers: int, requests: list[TracedRequest]) -> Cluster:
    """Served with so many routers."""
    make, layout = POLICIES[policy], LAYOUTS[2]
    placements = [make(setup_of(layout, 0, router), SLO) for router in range(routers)]
    ends: list[Ended] = []
    cluster = Cluster(layout, placements, ends.append)
    cluster.run(requests)
    assert [each.end for each in ends] == [End.COMPLETE] * len(requests)
    return cluster


@pytest.mark.parametrize("policy", ["baton", "round_robin"])
def test_several_routers_serve_all_and_leave_nothing(policy: str) -> None:
    cluster = by_router(policy, 3, some())
    for router in cluster.routers:
        router.check_integrity()
        assert router.moves.counts.tickets > 20, "each has its share of the requests"
        for seen in router.pool:
            others = seen.others._replace(computed_tokens=0, computed_pairs=0)
            assert others == PlacedWork(routers=2)
    for worker in cluster.workers.values():
        worker.check_idle()


def test_several_routers_give_the_same_run_twice() -> None:
    first, second = (run(LAYOUTS[2], "baton", SLO, some(60), seed=5, routers=3) for _ in range(2))
    assert first == second
    assert first != run(LAYOUTS[2], "baton", SLO, some(60), seed=5)


def test_routers_do_not_herd() -> None:
    """Long prompts, a little apart: with each on a worker of its own none waits for another."""
    layout = Layout(PROFILE, 0, 8)
    requests = [TracedRequest(10.0 * (n // 8) + 0.02 * (n % 8), 20_000, 2) for n in range(160)]
    one, four = (run(layout, "baton", SLO, requests, routers=n).measured.ttft for n in (1, 4))
    assert four.mean_s == pytest.approx(one.mean_s, rel=0.02)
    assert four.quantile_s(1.0) == pytest.approx(one.quantile_s(1.0), rel=0.02)


def test_a_tenant_that_floods_one_router_keeps_nobody_waiting_at_another() -> None:
    """Nothing is promised, and the flood is more than the engine can do: its queue grows for as
    long as it lasts."""
    layout = Layout(PROFILE, 0, 1)
    flood = [TracedRequest(n / 25, 4000, 50, client="flood") for n in range(1500)]
    light = [TracedRequest(n + 0.5, 500, 20, client="light") for n in range(60)]
    requests = sorted(flood + light, key=lambda each: each.arrival_s)
    ends: dict[str, Ended] = {}
    placements = [POLICIES["baton"](setup_of(layout, router=n), SLO) for n in range(2)]
    cluster = Cluster(layout, placements, lambda ended: ends.__setitem__(ended.key, ended))
    cluster.router_of = lambda request: int(request.client == "flood")
    cluster.run(requests)
    waits: dict[str, list[float]] = {"flood": [], "light": []}
    for number, request in enumerate(requests):
        took_s = ends[f"0:{number}"].time_to_first_token_s
        assert took_s is not None
        waits[request.client].append(took_s)
    assert max(waits["flood"]) > 20.0, "it is no flood"
    # Who gives way does so until it is due itself.
    assert max(waits["light"]) < DUE_UNPROMISED_S + 2.0


def test_room_goes_to_who_came_first_whichever_router_it_waits_at() -> None:
    """Ten fit into the decode worker's cache, and they come a little faster than they end."""
    layout = Layout(replace(PROFILE, kv_tokens_reported=40_960), 1, 1)
    slo, requests = Slo(10.0, 0.1), [TracedRequest(0.4 * n, 4000, 500) for n in range(150)]
    one, four = (run(layout, "baton", slo, requests, routers=n).measured for n in (1, 4))
    assert one.attainment == four.attainment == 1.0
    assert one.ttft.quantile_s(0.5) > 2.0, "they wait"
    for share in (0.5, 0.9, 1.0):
        assert four.ttft.quantile_s(share) == pytest.approx(one.ttft.quantile_s(share), rel=0.05)


def test_a_router_that_begins_in_an_overload_lets_in_as_much_as_others_do() -> None:
    """What others have learned by then holds there too: they foresee more of a load than comes."""
    layout, begins_s = Layout(PROFILE, 0, 1), 40.0
    dice = Random(1)
    requests = [TracedRequest(n / 25, 4000, 50) for n in range(2000)]
    routers = [dice.randrange(2) if each.arrival_s >= begins_s else 1 for each in requests]
    let_in = [0, 0]

    def end(ended: Ended) -> None:
        number = int(ended.key.partition(":")[2])
        if requests[number].arrival_s >= begins_s:
            let_in[routers[number]] += 1

    placements = [POLICIES["baton"](setup_of(layout, router=n), SLO) for n in range(2)]
    cluster = Cluster(layout, placements, end, promises=Promises(SLO.ttft_s, SLO.tpot_s))
    remaining = iter(routers)
    cluster.router_of = lambda _: next(remaining)
    cluster.run(requests)
    late = routers[sum(each.arrival_s < begins_s for each in requests) :]
    shares = [let_in[router] / late.count(router) for router in range(2)]
    assert 0.25 < shares[1] < 0.75, "it is an overload"
    assert shares[0] > 0.75 * shares[1]
