"""A step's time, and the work that it follows from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.latency_model import StepTimes, StepWork
from engine.spec import SimulatedTiming

TIMES = StepTimes(
    SimulatedTiming(
        step_base_s=1.0,
        prefill_token_s=0.1,
        prefill_pair_s=0.01,
        decode_request_s=0.001,
        decode_context_token_s=0.0001,
        transfer_block_s=2.0,
        transfer_base_s=0.5,
    )
)


def test_each_kind_of_work_has_its_price() -> None:
    work = StepWork()
    assert TIMES.step_s(work) == 1.0
    work.add_prefill(10, context_tokens=20)
    assert TIMES.step_s(work) == pytest.approx(1.0 + 1.0 + 0.01 * (200 + 50))
    work.add_decode(500)
    work.add_decode(300)
    assert TIMES.step_s(work) == pytest.approx(4.5 + 0.002 + 0.08)
    assert TIMES.transfer_s(3) == 6.5


@given(st.lists(st.integers(1, 500), min_size=1, max_size=10), st.integers(0, 1000))
def test_a_prompt_in_chunks_attends_to_as_much_as_whole(chunks: list[int], cached: int) -> None:
    whole, parts = StepWork(), StepWork()
    whole.add_prefill(sum(chunks), cached)
    context = cached
    for tokens in chunks:
        parts.add_prefill(tokens, context)
        context += tokens
    assert parts == whole
