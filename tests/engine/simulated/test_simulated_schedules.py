"""Random schedules: no block leaks, and no schedule changes a request's text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.latency_model import StepTimes
from engine.simulated.core import SimulatedCore
from engine.simulated.scheduler import SimulatedLimits
from engine.spec import SimulatedTiming
from protos.enginecore import (
    EngineOutput,
    EngineRequest,
    encode_manifest,
    hand_off_after_first_token,
    resume_from,
)
from tests.contract.engine_contract import make_request

LEASE_S = 40.0
TIMING = SimulatedTiming(
    step_base_s=1.0, prefill_token_s=0.01, decode_request_s=0.1, transfer_block_s=0.7
)


def make_core(kv_blocks: int = 12) -> SimulatedCore:
    limits = SimulatedLimits("worker", 4, kv_blocks, 32, 4, 10, LEASE_S)
    return SimulatedCore(limits, StepTimes(TIMING))


@dataclass(frozen=True)
class Job:
    """A request and what befalls it."""

    prefix: int
    prompt_tokens: int
    max_tokens: int
    priority: int
    delay_steps: int
    hand_off: bool
    spoil_manifest: bool
    abort_after_steps: int | None

    @property
    def prompt(self) -> list[int]:
        return [100 + self.prefix] * 8 + list(range(300, 300 + self.prompt_tokens))

    def request(self, request_id: str) -> EngineRequest:
        sampling: dict[str, Any] = {"max_tokens": self.max_tokens, "min_tokens": 2}
        # A range of the vocabulary, so that some requests stop.
        sampling["stop_token_ids"] = list(range(100, 200))
        request = make_request(request_id, self.prompt, **sampling)
        request.priority = self.priority
        return request


jobs = st.builds(
    Job,
    prefix=st.integers(0, 2),
    prompt_tokens=st.integers(0, 14),
    max_tokens=st.integers(1, 10),
    priority=st.integers(0, 1),
    delay_steps=st.integers(0, 6),
    hand_off=st.booleans(),
    spoil_manifest=st.booleans(),
    abort_after_steps=st.none() | st.integers(0, 8),
)


@dataclass
class Run:
    """Two engines, with requests handed from the first to the second."""

    jobs: list[Job]
    cores: tuple[SimulatedCore, SimulatedCore] = field(
        default_factory=lambda: (make_core(), make_core())
    )
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, list[int]] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)

    def go(self) -> None:
        now_s, steps = 0.0, 0
        while True:
            self._events(steps)
            busy = [self._step(core, now_s) for core in self.cores]
            wakes = [wake for core in self.cores if (wake := core.wake_s()) is not None]
            if not any(busy) and steps > 20:
                if not wakes:
                    return
                now_s = max(now_s, min(wakes))
            now_s += 1.0
            steps += 1
            assert steps < 2000, "requests starve"

    def _events(self, steps: int) -> None:
        for name, job in enumerate(self.jobs):
            request_id = str(name)
            if job.delay_steps == steps:
                request = job.request(request_id)
                if job.hand_off and job.max_tokens > 1:
                    hand_off_after_first_token(request)
                self.cores[0].add(request)
                self.tokens[request_id], self.ends[request_id] = [], []
            if job.abort_after_steps is not None and (
                job.delay_steps + job.abort_after_steps == steps
            ):
                self.aborted.add(request_id)
                for core in self.cores:
                    core.abort([request_id])

    def _step(self, core: SimulatedCore, now_s: float) -> bool:
        plan = core.start_step(now_s)
        core.check_integrity()
        if plan is None:
            return False
        for output in core.finish_step(now_s + plan.duration_s).outputs:
            self._take(output)
        core.check_integrity()
        return True

    def _take(self, output: EngineOutput) -> None:
        request_id = output.request_id
        assert not self.ends[request_id], "output after the end"
        self.tokens[request_id] += output.new_token_ids
        if (params := output.kv_transfer_params) is not None:
            job = self.jobs[int(request_id)]
            if job.spoil_manifest:
                params["prefix_digest"] = "0" * 32
            request = job.request(request_id)
            resume_from(request, output.new_token_ids, encode_manifest(params))
            self.cores[1].add(request)
        elif output.finish_reason is not None:
            self.ends[request_id].append(output.finish_reason)


def alone(job: Job) -> tuple[list[int], int | None]:
    """Its tokens and finish reason on an engine of its own."""
    core = make_core(64)
    core.add(job.request("alone"))
    tokens: list[int] = []
    reason = None
    while core.start_step(0.0) is not None:
        for output in core.finish_step(0.0).outputs:
            tokens += output.new_token_ids
            reason = output.finish_reason
    return tokens, reason


@settings(max_examples=150, deadline=None)
@given(st.lists(jobs, max_size=10))
def test_schedules_neither_leak_nor_change_text(schedule: list[Job]) -> None:
    run = Run(schedule)
    run.go()
    for name, job in enumerate(schedule):
        request_id = str(name)
        expected, reason = alone(job)
        if request_id in run.aborted and not run.ends[request_id]:
            got = run.tokens[request_id]
            assert got == expected[: len(got)]
            continue
        assert run.tokens[request_id] == expected
        assert run.ends[request_id] == [reason]
    for core in run.cores:
        assert core.start_step(1e9) is None
        core.check_integrity()
        core.add(make_request("last", [1], max_tokens=1))
        assert core.start_step(1e9) is not None
        assert core.finish_step(1e9).load.kv_blocks_used == 0
