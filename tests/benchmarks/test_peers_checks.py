"""The quickest of the peers' published checks, on a part of what they serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.peers_checks import CHECKS
from benchmarks.peers_workloads import Groups, grouped, toolagent
from simulator.baselines import BASELINES
from simulator.prefix_cache import distinct_tokens, token_hit_rate

ELSEWHERE = {"llmd_builtin", "mooncake", "mooncake_rejecting"}
"""They have benchmarks of their own, or are placed by one that has."""


def test_every_policy_has_its_check() -> None:
    checked = {policy for names in CHECKS for policy in names.split(", ")}
    assert checked | ELSEWHERE == set(BASELINES)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("ray_prefix", 0.25),
        ("sglang_cache_aware", 0.5),
        ("llmd_guide", 0.3),
    ],
)
def test_order_and_size_hold(name: str, scale: float) -> None:
    found = CHECKS[name](Path("nowhere"), scale)
    assert found.order, found
    assert found.size, found


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        # Of the random ones the size is that of queues that had time to grow.
        ("random, round_robin, power_of_two, least_loaded", 0.03),
        ("llumnix", 0.5),
    ],
)
def test_the_order_holds(name: str, scale: float) -> None:
    found = CHECKS[name](Path("nowhere"), scale)
    assert found.order, found


def test_dynamos_order_holds(shared: Path) -> None:
    found = CHECKS["dynamo_kv"](shared, 0.03)
    assert found.order, found


def test_the_stand_in_is_like_the_trace_that_it_stands_for(shared: Path) -> None:
    requests = list(toolagent(shared, 0))
    assert len(requests) == 23_608
    mean_in = sum(each.input_tokens for each in requests) / len(requests)
    mean_out = sum(each.output_tokens for each in requests) / len(requests)
    assert mean_in == pytest.approx(8596, rel=0.02)
    assert mean_out == pytest.approx(182, rel=0.15)
    assert token_hit_rate(requests, distinct_tokens(requests)) == pytest.approx(0.59, abs=0.05)


def test_prompts_of_a_group_share_its_beginning_alone() -> None:
    groups = Groups(groups=3, prompts=2, shared_tokens=1024, own_tokens=600, output_tokens=9)
    made = list(grouped(groups, 12, 1.0, 0))
    assert {(each.input_tokens, each.output_tokens) for each in made} == {(1624, 9)}
    # Each prompt is asked for twice: 6 prompts, of 3 beginnings.
    assert len({each.block_ids for each in made}) == 6
    assert len({each.block_ids[:2] for each in made}) == 3
    assert len({each.block_ids[2] for each in made}) == 6
    assert all(len(each.block_ids) == 4 for each in made)
