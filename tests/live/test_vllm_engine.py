"""The engine contract, held by real vLLM, and what only a real engine can show."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from protos.enginecore import (
    FINISH_LENGTH,
    EngineRequest,
    encode_manifest,
    hand_off_after_first_token,
    resume_from,
)
from tests.contract.engine_contract import (
    Driver,
    EngineContract,
    EngineFactory,
    driven,
    make_prompt,
    make_request,
    new_id,
    prompt,
)
from tests.live.vllm_engines import KV_BYTES_PER_TOKEN, make_vllm

__all__ = ["prompt"]

pytestmark = pytest.mark.asyncio(loop_scope="module")

LEASE_S = 6.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Driver, Driver]]:
    """Two at once: most of a start is one core's work. The model lies at two places, as it may on
    two nodes."""
    elsewhere = shutil.copytree(tiny_model, tmp_path_factory.mktemp("elsewhere") / "model")
    async with asyncio.timeout(240):
        stack = [
            driven(lambda model=model, name=name: make_vllm(model, name, lease_s=LEASE_S))  # type: ignore[misc]
            for model, name in ((tiny_model, "engine-a"), (elsewhere, "engine-b"))
        ]
        drivers = await asyncio.gather(*(context.__aenter__() for context in stack))
    yield drivers[0], drivers[1]
    for context in stack:
        await context.__aexit__(None, None, None)


@pytest.fixture
def engine(engines: tuple[Driver, Driver]) -> Driver:
    return engines[0]


@pytest.fixture
def other(engines: tuple[Driver, Driver]) -> Driver:
    return engines[1]


@pytest.fixture
def fresh(tiny_model: Path) -> EngineFactory:
    return lambda: make_vllm(tiny_model, "engine-c")


class TestVllmEngine(EngineContract):
    async def test_refuses_a_prompt_beyond_the_context(self, engine: Driver) -> None:
        """vLLM leaves that check to fronts; the worker makes it (tests/engine/test_attempts.py)."""


KINDS = {
    "penalties": {
        "presence_penalty": 0.8,
        "frequency_penalty": 0.6,
        "repetition_penalty": 1.2,
    },
    "logit bias": {"logit_bias": {7: 3.0, 900: 2.0}},
    "min tokens": {"min_tokens": 10},
    "seed": {"temperature": 1.0, "seed": 11},
    "seed, top-p and top-k": {"temperature": 0.8, "seed": 12, "top_p": 0.9, "top_k": 50},
    "guided": {
        "structured_outputs": {
            "regex": "[a-f]{24}",
            "disable_any_whitespace": True,
            "_backend": "xgrammar",
        }
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done_tokens", [1, 9])
async def test_resumed_state_is_that_of_an_uninterrupted_request(
    engine: Driver, other: Driver, kind: str, done_tokens: int
) -> None:
    sampling = {"max_tokens": 20, **KINDS[kind]}
    prompt = make_prompt(140)
    whole = await engine.generate(prompt, **sampling)
    resumed = make_request(new_id(), prompt, **sampling)
    resume_from(resumed, whole.tokens[:done_tokens], b"")
    rest = await other.run(resumed)
    assert [*whole.tokens[:done_tokens], *rest.tokens] == whole.tokens


async def test_a_seeded_request_whose_prompt_is_chunked(engine: Driver, other: Driver) -> None:
    """vLLM takes back the draw of each chunk by an offset that no CPU generator has."""
    budget = 2048
    prompt = make_prompt(2 * budget + 100)
    sampling = {"temperature": 1.0, "seed": 5, "max_tokens": 8}
    whole = await engine.generate(prompt, **sampling)
    assert len(whole.tokens) == 8
    assert (await other.generate(prompt, **sampling)).tokens == whole.tokens
    # The same seed on a prompt in one piece draws the same noise from the first token on.
    short = prompt[:100]
    assert (await engine.generate(short, **sampling)).tokens == (
        await other.generate(short, **sampling)
    ).tokens


async def test_a_lapsed_lease_is_noticed_and_recomputed(engine: Driver, other: Driver) -> None:
    """Blocks that were freed and refilled before the read: the text is right all the same."""
    prompt = make_prompt(300)
    request = make_request(new_id(), prompt, max_tokens=12, ignore_eos=True)
    hand_off_after_first_token(request)
    handed = await engine.run(request)
    assert handed.kv_transfer_params is not None
    await engine.until(lambda: engine.load.kv_blocks_used == 0)  # the lease has ended
    # Fill the freed blocks with other prompts' state.
    for _ in range(8):
        await engine.generate(make_prompt(1000), max_tokens=1)
    expired = other.counters["vllm:nixl_num_kv_expired_reqs_total"]
    resumed = make_request(new_id(), prompt, max_tokens=12, ignore_eos=True)
    resume_from(resumed, handed.tokens, encode_manifest(handed.kv_transfer_params))
    rest = await other.run(resumed)
    assert other.counters["vllm:nixl_num_kv_expired_reqs_total"] == expired + 1
    whole = await other.generate(prompt, max_tokens=12, ignore_eos=True)
    assert [*handed.tokens, *rest.tokens] == whole.tokens
    assert rest.finish_reason == FINISH_LENGTH


async def handed_off_by(engine: Driver, prompt: list[int]) -> EngineRequest:
    """What another engine is to go on with: 4 tokens, of which this one made the first."""
    request = make_request(new_id(), prompt, max_tokens=4, ignore_eos=True)
    hand_off_after_first_token(request)
    handed = await engine.run(request)
    assert handed.kv_transfer_params is not None
    resumed = make_request(new_id(), prompt, max_tokens=4, ignore_eos=True)
    resume_from(resumed, handed.tokens, encode_manifest(handed.kv_transfer_params))
    return resumed


async def test_bytes_moved_are_those_of_the_prompts_blocks(engine: Driver, other: Driver) -> None:
    block_tokens = engine.info.block_size_tokens
    for prompt_tokens in (1, block_tokens, block_tokens + 1, 700):
        before = other.counters["vllm:nixl_bytes_transferred_sum"]
        await other.run(await handed_off_by(engine, make_prompt(prompt_tokens)))
        moved = other.counters["vllm:nixl_bytes_transferred_sum"] - before
        wanted = KV_BYTES_PER_TOKEN * prompt_tokens
        assert wanted <= moved < wanted + KV_BYTES_PER_TOKEN * block_tokens


@pytest.mark.slow
async def test_state_of_other_weights_is_not_fetched(engine: Driver, tiny_model: Path) -> None:
    """Nor would vLLM's own check have noticed: path, shapes and types are the same."""
    async with driven(
        lambda: make_vllm(tiny_model, "engine-e", hf_overrides={"rms_norm_eps": 0.01})
    ) as stranger:
        assert stranger.info.weights != engine.info.weights
        prompt = make_prompt(300)
        await stranger.run(await handed_off_by(engine, prompt))
        assert stranger.counters["vllm:nixl_bytes_transferred_sum"] == 0
        whole = await stranger.generate(prompt, max_tokens=4, ignore_eos=True)
        assert len(whole.tokens) == 4


async def test_an_address_stands_for_several_small_blocks(tiny_model: Path) -> None:
    """Blocks of 32 tokens, the least of this attention: 4 to an address; two prompts share 3 of
    them, and two requests compute the same at once."""
    small = {"block_size": 32, "num_gpu_blocks_override": 96, "max_model_len": 2048}
    async with driven(lambda: make_vllm(tiny_model, "engine-d", **small)) as driver:
        prompt = make_prompt(2 * 128 + 40)
        forked = [*prompt[:96], *make_prompt(200)]
        for each in (prompt, forked):
            requests = [make_request(new_id(), each, max_tokens=1) for _ in range(2)]
            for request_id in [driver.add(request) for request in requests]:
                await driver.end_of(request_id)
        wanted = {*driver.addresses(prompt), *driver.addresses(forked)}
        assert len(wanted) == 4
        assert {*driver.blocks.held} == wanted
        while {*driver.blocks.held} & wanted:
            await driver.generate(make_prompt(1000), max_tokens=1)
            assert len(driver.blocks.held) <= 96 // 4
