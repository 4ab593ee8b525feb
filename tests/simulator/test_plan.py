"""The search for the cheapest layout: against engines whose needs are known, so that all layouts
can be compared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.profiles import PROFILES
from protos.ids import RequestKey, WorkerId
from router.core.costs import Slo
from router.core.events import End, Ended
from simulator.cluster import Layout
from simulator.experiment import Outcome
from simulator.measure import Measurement
from simulator.plan import Goal, Kind, Plan, Trial, kinds, plan

SLO = Slo(1.0, 0.1)
GOAL = Goal(0.9, 100)
PROFILE = PROFILES["llama-3.1-70b-h100x4"]
WIDE = PROFILES["llama-3.1-70b-h100x8"]
PROFILES_TRIED = [WIDE, PROFILE]


@dataclass
class Known:
    """A cluster whose latencies are its load: what its prompts and its tokens need, in GPUs."""

    prompts: float
    tokens: float
    apart: float = 1.0
    """By which each needs more, or less, in a pool of its own."""
    alone: float = 0.0
    """Of the TPOT allowed, what a token takes that is alone on an engine of 1 GPU."""
    runs: list[tuple[Layout, bool, int]] = field(default_factory=list)
    """As they were asked for."""

    def shares(self, layout: Layout) -> tuple[float, float]:
        """Of the TTFT and of the TPOT allowed."""
        gpus = layout.decode * layout.profile.gpus
        alone = self.alone / layout.profile.gpus
        if not layout.prefill:
            load = (self.prompts + self.tokens) / gpus
            return load, max(load, alone)
        prompts = self.apart * self.prompts / (layout.gpus - gpus)
        return prompts, max(self.apart * self.tokens / gpus, alone)

    def meets(self, layout: Layout) -> bool:
        return max(self.shares(layout)) <= 1

    def serve(self, layout: Layout, to_its_end: bool, runs_after: int) -> Trial:
        self.runs.append((layout, to_its_end, runs_after))
        ttft, tpot = self.shares(layout)
        measured = Measurement(SLO)
        cut = not self.meets(layout) and not to_its_end
        for number in range(11 if cut else GOAL.requests):
            measured.observe(ended(number, ttft * SLO.ttft_s, tpot * SLO.tpot_s))
        return Trial(layout, GOAL, Outcome(measured, 1.0, 1, 0, {WorkerId("w"): 0.5}))


def ended(number: int, ttft_s: float, tpot_s: float) -> Ended:
    """A request that was served so."""
    return Ended(
        RequestKey(f"0:{number}"), End.COMPLETE, output_tokens=2, time_to_first_token_s=ttft_s,
        time_per_output_token_s=tpot_s,
    )  # fmt: skip


def all_layouts(gpus: int) -> list[Layout]:
    return [
        Layout(profile, prefill, engines - prefill)
        for profile in PROFILES_TRIED
        for engines in range(1, gpus // profile.gpus + 1)
        for prefill in range(engines)
    ] + [
        Layout(decode, prefills, decodes, prefill_profile=prefill)
        for prefill, decode in permutations(PROFILES_TRIED, 2)
        for prefills in range(1, gpus // prefill.gpus + 1)
        for decodes in range(1, (gpus - prefills * prefill.gpus) // decode.gpus + 1)
    ]


def tried(known: Known, gpus: int) -> Plan:
    return plan(kinds(PROFILES_TRIED, PROFILES_TRIED), gpus, known.serve)


@settings(max_examples=300)
@given(
    st.floats(0.1, 60), st.floats(0.1, 60), st.floats(0.5, 2), st.floats(0, 10),
    st.integers(PROFILE.gpus, 64),
)  # fmt: skip
def test_it_finds_what_trying_everything_finds(
    prompts: float, tokens: float, apart: float, alone: float, gpus: int
) -> None:
    known = Known(prompts, tokens, apart, alone)
    found = tried(known, gpus)
    meeting = [layout for layout in all_layouts(gpus) if known.meets(layout)]
    assert found.chosen.meets == bool(meeting)
    if meeting:
        fewest = min(layout.gpus for layout in meeting)
        assert found.chosen.gpus == fewest
        best = min(max(known.shares(each)) for each in meeting if each.gpus == fewest)
        # Latencies are counted in bins 2 % wide.
        assert max(known.shares(found.chosen.layout)) <= best * 1.03
    else:
        assert found.chosen.whole
    check_runs(known, found, gpus)


def check_runs(known: Known, found: Plan, gpus: int) -> None:
    """Each layout once, and no more of them than were announced."""
    layouts = [layout for layout, to_its_end, _ in known.runs if not to_its_end]
    assert len(set(layouts)) == len(layouts) == len(found.tried)
    assert all(layout.gpus <= gpus for layout in layouts)
    for number, (_, _, after) in enumerate(known.runs):
        assert len(layouts) <= number + 1 + after
    most = sum(
        each.most_runs(gpus // each.unit_gpus) for each in kinds(PROFILES_TRIED, PROFILES_TRIED)
    )
    assert len(layouts) <= most


def test_a_wider_engine_is_taken_where_it_alone_meets_a_latency() -> None:
    assert tried(Known(1.0, 1.0, alone=6.0), 8).chosen.layout == Layout(WIDE, 0, 1)
    assert tried(Known(1.0, 1.0, alone=3.0), 8).chosen.layout == Layout(PROFILE, 0, 1)


def test_only_the_pool_that_needs_them_gets_wider_engines() -> None:
    """Tokens in time take a wide engine; what prompts need fits into one that is not."""
    known = Known(prompts=3.9, tokens=7.9, alone=6.0)
    assert tried(known, 64).chosen.layout == Layout(WIDE, 1, 1, prefill_profile=PROFILE)


def test_engines_that_serve_one_pool_only() -> None:
    found = kinds([PROFILE, WIDE], [WIDE])
    assert found == [Kind(WIDE, WIDE), Kind(PROFILE, WIDE)]
    assert [each.is_alike for each in found] == [True, False]


def test_what_can_not_be_handed_over_is_not_combined() -> None:
    three = replace(PROFILE, gpus=3)
    assert kinds([PROFILE], [three]) == []


def test_the_most_runs_of_common_sizes() -> None:
    alike, mixed = Kind(PROFILE, PROFILE), Kind(PROFILE, WIDE)
    assert [alike.most_runs(engines) for engines in (0, 1, 2, 8, 64)] == [0, 1, 4, 16, 49]
    assert [mixed.most_runs(units) for units in (0, 2, 3, 8, 16)] == [0, 0, 3, 8, 15]
