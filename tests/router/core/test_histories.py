"""Random histories: whatever happens in whatever order, each request ends once, whole or told."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.router.core.driving import Drive
from tests.router.core.world import World

WORKERS = st.sampled_from(["p1", "p2", "d1", "d2"])


class Histories(RuleBasedStateMachine):
    """Interleaves arrivals, messages, losses and restarts."""

    world: World

    @initialize(attached=st.sets(WORKERS))
    def begin(self, attached: set[str]) -> None:
        self.world = World()
        for name in sorted(attached):
            self.world.attach(self.world.workers[name])

    @rule(prompt_tokens=st.sampled_from([3, 10]), max_tokens=st.integers(1, 5))
    def arrive(self, prompt_tokens: int, max_tokens: int) -> None:
        self.world.arrive(prompt_tokens, max_tokens)

    @precondition(lambda self: self.world.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.world.abort(data.draw(st.sampled_from(sorted(self.world.asked))))

    @rule(name=WORKERS)
    def attach(self, name: str) -> None:
        self.world.attach(self.world.workers[name])

    @rule(name=WORKERS)
    def break_link(self, name: str) -> None:
        self.world.break_link(self.world.workers[name])

    @rule(name=WORKERS, noticed=st.booleans())
    def kill(self, name: str, noticed: bool) -> None:
        self.world.kill(self.world.workers[name], noticed)

    @rule(name=WORKERS)
    def declare_dead(self, name: str) -> None:
        self.world.declare_dead(self.world.workers[name])

    @rule(name=WORKERS, count=st.integers(1, 3))
    def hear(self, name: str, count: int) -> None:
        self.world.hear(self.world.workers[name], count)

    @rule(name=WORKERS, most=st.integers(1, 2))
    def compute(self, name: str, most: int) -> None:
        self.world.workers[name].compute(most)

    @rule(name=WORKERS, count=st.integers(1, 3))
    def report(self, name: str, count: int) -> None:
        self.world.report(self.world.workers[name], count)

    @rule(name=WORKERS)
    def work(self, name: str) -> None:
        """The usual: all that is sent arrives, and comes back."""
        worker = self.world.workers[name]
        self.world.hear(worker, 100)
        worker.compute(1)
        self.world.report(worker, 100)

    @rule(name=WORKERS, index=st.integers(0, 20), older=st.booleans())
    def repeat_old(self, name: str, index: int, older: bool) -> None:
        self.world.repeat_old(self.world.workers[name], index, older)

    @rule()
    def restart_router(self) -> None:
        self.world.restart_router()

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def walk(seed: int, steps: int = 250, make_drive: Callable[[], Drive] = Drive) -> World:
    """A long history in which most things work, so that requests get far before something fails."""
    rng = random.Random(seed)
    world = World(make_drive)
    for worker in list(world.workers.values()):
        world.attach(worker)
    for _ in range(steps):
        worker = world.workers[rng.choice(["p1", "p2", "d1", "d2"])]
        what = rng.choices(
            ["arrive", "hear", "compute", "report", "abort", "attach", "break", "kill", "dead",
             "repeat", "restart", "time"],
            [12, 35, 30, 30, 1, 12, 2, 1, 0.5, 4, 1.5, 1],
        )[0]  # fmt: skip
        if what == "arrive":
            world.arrive(rng.choice([3, 10, 10]), rng.randint(2, 6))
        elif what == "hear":
            world.hear(worker, rng.randint(1, 5))
        elif what == "compute":
            worker.compute(rng.randint(1, 2))
        elif what == "report":
            world.report(worker, rng.randint(1, 5))
        elif what == "abort" and world.asked:
            world.abort(rng.choice(sorted(world.asked)))
        elif what == "attach":
            for each in list(world.workers.values()):
                world.attach(each)
        elif what == "break":
            world.break_link(worker)
        elif what == "kill":
            world.kill(worker, rng.random() < 0.7)
        elif what == "dead":
            world.declare_dead(worker)
        elif what == "repeat":
            world.repeat_old(worker, rng.randrange(50), rng.random() < 0.5)
        elif what == "restart":
            world.restart_router()
        elif what == "time":
            world.pass_time(rng.choice([0.1, 1.0, 6.0]))
    world.settle()
    return world


@pytest.mark.parametrize("first_seed", range(0, 300, 20))
def test_long_histories(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 20):
        walk(seed)
