"""Synthetic workloads: seeded, in order, and as their names say."""

from __future__ import annotations

import itertools
import statistics

import pytest

from simulator import workloads
from simulator.traces import BLOCK_TOKENS, TracedRequest
from simulator.workloads import SYNTHETIC, Wish

WISH = Wish(rate_rps=20.0, duration_s=600.0, seed=3)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_each_is_seeded_ordered_and_whole(name: str) -> None:
    made = list(SYNTHETIC[name](WISH))
    assert made == list(SYNTHETIC[name](WISH))
    assert made != list(SYNTHETIC[name](Wish(20.0, 600.0, seed=4)))
    arrivals = [each.arrival_s for each in made]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] > 0
    assert arrivals[-1] < WISH.duration_s
    for each in made:
        assert each.input_tokens >= 1
        assert each.output_tokens >= 1
        blocks = -(-each.input_tokens // BLOCK_TOKENS)
        assert len(each.block_ids) in (0, blocks)


@pytest.mark.parametrize("name", ["poisson", "bursty", "sine", "prefix-groups"])
def test_rates_are_as_wished(name: str) -> None:
    assert len(list(SYNTHETIC[name](WISH))) == pytest.approx(12_000, rel=0.1)


@pytest.mark.parametrize(("name", "least"), [("sessions", 0.6), ("agents", 0.6)])
def test_conversations_reach_most_of_their_rate_once_begun(name: str, least: float) -> None:
    late = [each for each in SYNTHETIC[name](WISH) if each.arrival_s > 300]
    assert least * 6000 < len(late) < 1.3 * 6000


def variation(name: str) -> float:
    arrivals = [each.arrival_s for each in SYNTHETIC[name](WISH)]
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    return statistics.stdev(gaps) / statistics.mean(gaps)


def test_bursts_are_bursts() -> None:
    assert variation("poisson") == pytest.approx(1.0, abs=0.05)
    assert variation("bursty") == pytest.approx(3.0, abs=0.4)


def test_a_sine_swings() -> None:
    made = [each.arrival_s % 300 for each in SYNTHETIC["sine"](WISH)]
    high = sum(at_s < 150 for at_s in made)
    assert high / (len(made) - high) > 2


@pytest.mark.parametrize(("name", "shared"), [("prefix-groups", 0.75), ("sessions", 0.5)])
def test_prompts_share_what_they_say(name: str, shared: float) -> None:
    seen: set[int] = set()
    known = total = 0
    for each in SYNTHETIC[name](WISH):
        known += sum(block in seen for block in each.block_ids)
        total += len(each.block_ids)
        seen.update(each.block_ids)
    assert known / total > shared


def test_a_turn_begins_as_the_one_before_ended() -> None:
    turns: dict[int, tuple[int, ...]] = {}
    went_on = 0
    for each in SYNTHETIC["sessions"](WISH):
        whole = each.block_ids[: each.input_tokens // BLOCK_TOKENS]
        if len(whole) < 2:
            continue
        before = turns.get(whole[1])
        if before is not None:
            assert whole[: len(before)] == before
            went_on += 1
        turns[whole[1]] = whole
    assert went_on > 1000


def test_a_grid_is_spread_and_stays_in_order() -> None:
    grid = [TracedRequest(at_s, 10, 1) for at_s in (0.0, 0.0, 0.0, 3.0, 3.0, 9.0)]
    made = [each.arrival_s for each in workloads.jittered(grid, 3.0, seed=1)]
    assert made == sorted(made)
    assert len(set(made)) == 6
    assert all(0 <= at - begin < 3 for at, begin in zip(made, (0, 0, 0, 3, 3, 9), strict=True))


def test_speed_and_end() -> None:
    made = [TracedRequest(float(second), 10, 1) for second in range(10)]
    kept = list(workloads.until(workloads.sped_up(made, 2.0), 2.0))
    assert [each.arrival_s for each in kept] == [0.0, 0.5, 1.0, 1.5]
