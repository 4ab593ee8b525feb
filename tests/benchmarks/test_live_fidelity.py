"""What the comparison of a live run with a simulated one says, and that both serve the same."""

from __future__ import annotations

import pytest

from benchmarks.fidelity import Bounds, Pair, Seen, compare, compared_table
from benchmarks.live_fidelity import GROUPS, MEDIUM
from benchmarks.open_loop import prompt_of

BOUNDS = Bounds(share=0.10, points=3)


def seen(ttft_s: float, tpot_s: float = 0.02, hit_rate: float = 0.7) -> Seen:
    """Ten requests around these."""
    spread = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 1.7]
    return Seen([ttft_s * each for each in spread], [tpot_s * each for each in spread], hit_rate)


def differences(pairs: list[Pair]) -> dict[str, float]:
    return {each.name: each.difference for each in compare(pairs, BOUNDS)}


def test_differences_are_the_simulations_against_the_live_ones() -> None:
    found = differences([Pair(seen(0.2, hit_rate=0.70), seen(0.18, 0.021, hit_rate=0.72))])
    assert found == pytest.approx(
        {"TTFT, mean": -10, "TTFT, p90": -10, "TPOT, mean": 5, "TPOT, p90": 5, "hit rate": 2}
    )


def test_the_median_of_the_pairs_decides_not_their_mean() -> None:
    pairs = [Pair(seen(0.2), seen(0.2 * factor)) for factor in (1.02, 1.09, 9.0)]
    assert differences(pairs)["TTFT, mean"] == pytest.approx(9)


@pytest.mark.parametrize(("factor", "within"), [(0.91, True), (1.09, True), (0.89, False)])
def test_too_quick_is_as_wrong_as_too_slow(factor: float, within: bool) -> None:
    by_name = {each.name: each for each in compare([Pair(seen(0.2), seen(0.2 * factor))], BOUNDS)}
    assert by_name["TTFT, mean"].within == by_name["TTFT, p90"].within == within
    assert by_name["TPOT, mean"].within


def test_points_bound_the_hit_rate() -> None:
    *_, hit_rate = compare([Pair(seen(0.2, hit_rate=0.70), seen(0.2, hit_rate=0.66))], BOUNDS)
    assert hit_rate.difference == pytest.approx(-4)
    assert not hit_rate.within


def test_the_table_names_misses() -> None:
    table = compared_table(compare([Pair(seen(0.2), seen(0.3))], BOUNDS))
    assert table.count("**missed**") == 2
    assert "+50.0 (+50.0 to +50.0) %" in table


def test_prompts_begin_alike_where_the_trace_says_so() -> None:
    requests = MEDIUM.requests(seed=1)[:40]
    prompts = [prompt_of(request, number, salt=0) for number, request in enumerate(requests)]
    assert [len(prompt) for prompt in prompts] == [each.input_tokens for each in requests]
    beginnings = {tuple(prompt[: MEDIUM.shared_tokens]) for prompt in prompts}
    assert len(beginnings) == GROUPS
    assert len({tuple(prompt[: MEDIUM.shared_tokens + 8]) for prompt in prompts}) == len(prompts)
    assert prompt_of(requests[0], 0, salt=1)[:8] != prompts[0][:8]
