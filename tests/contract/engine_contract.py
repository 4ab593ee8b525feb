"""What every engine behind `engine.base.Engine` must do; each engine's suite inherits it.

A suite derives from `EngineContract` and provides the fixtures `engine` and `other`: two engines
of one model, each under a `Driver` (see `driven`). They may outlive a test: requests get new ids,
and prompts are new unless a check repeats one.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.base import Engine, EngineInfo, EngineLoad
from kvstore.content import block_addresses, root_address
from kvstore.engine_blocks import AddressChange, EngineBlocks
from protos.enginecore import (
    ENGINE_TAG,
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_STOP,
    EngineOutput,
    EngineRequest,
    PrefillStats,
    decode_ready,
    encode_manifest,
    hand_off_after_first_token,
    resume_from,
)
from protos.errors import EngineError

EngineFactory = Callable[[], Engine]

TIMEOUT_S = 120
"""For what an engine answers at once, but for a kernel that it compiles on first use."""

MODEL = "the model"
"""As the addresses name it."""

_serial = itertools.count()


def make_prompt(tokens: int) -> list[int]:
    """A prompt that no other call has made."""
    return random.Random(next(_serial)).choices(range(100, 2000), k=tokens)


def make_request(request_id: str, prompt: list[int], **sampling: Any) -> EngineRequest:
    """A greedy request as a front sends it."""
    params: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, **sampling}
    if stops := params.get("stop_token_ids"):
        params["_all_stop_token_ids"] = stops
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


@dataclass(slots=True)
class Generation:
    """What an engine told of one request."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: int | None = None
    stop_reason: int | str | None = None
    prefill_stats: PrefillStats | None = None
    kv_transfer_params: dict[str, Any] | None = None
    ends: int = 0

    def take(self, output: EngineOutput) -> None:
        self.tokens += output.new_token_ids
        self.prefill_stats = self.prefill_stats or output.prefill_stats
        if output.finish_reason is not None:
            self.ends += 1
            self.finish_reason = output.finish_reason
            self.stop_reason = output.stop_reason
            self.kv_transfer_params = output.kv_transfer_params


class Driver:
    """Steps an engine and keeps what it tells."""

    def __init__(self, engine: Engine, info: EngineInfo) -> None:
        self.engine = engine
        self.info = info
        self.generations: defaultdict[str, Generation] = defaultdict(Generation)
        self.load = EngineLoad()
        self.counters: defaultdict[str, float] = defaultdict(float)
        self.blocks = EngineBlocks(MODEL, info.block_size_tokens)
        self.cache_changes: list[AddressChange] = []
        """Of the steps that changed anything."""
        self._stepped = asyncio.Condition()

    async def pump(self) -> None:
        """Step until the engine ends."""
        while True:
            try:
                step = await self.engine.step()
            except EngineError:
                return
            async with self._stepped:
                self.load = step.load
                for name, increment in step.counters.items():
                    self.counters[name] += increment
                for output in step.outputs:
                    self.generations[output.request_id].take(output)
                change = self.blocks.take(step.block_events)
                if change.removed or change.stored:
                    self.cache_changes.append(change)
                self._stepped.notify_all()

    def add(self, request: EngineRequest) -> str:
        self.engine.add(request)
        return request.request_id

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a step has made `condition` true."""
        async with asyncio.timeout(TIMEOUT_S), self._stepped:
            await self._stepped.wait_for(condition)

    async def end_of(self, request_id: str) -> Generation:
        generation = self.generations[request_id]
        await self.until(lambda: generation.ends > 0)
        return generation

    async def generate(self, prompt: list[int], **sampling: Any) -> Generation:
        return await self.run(make_request(new_id(), prompt, **sampling))

    async def run(self, request: EngineRequest) -> Generation:
        return await self.end_of(self.add(request))

    def addresses(self, tokens: list[int], cache_salt: str = "") -> list[bytes]:
        """Of whole blocks, as a router makes them."""
        whole = self.blocks.block_tokens
        return block_addresses(root_address(MODEL, "", cache_salt, whole), tokens, whole)

    async def load_after_probe(self) -> EngineLoad:
        """The load once a small request of its own has come and gone."""
        await self.generate(make_prompt(4), max_tokens=1)
        return self.load


def new_id() -> str:
    """A request id that no other call has made."""
    return f"contract-{next(_serial)}"


@asynccontextmanager
async def driven(factory: EngineFactory) -> AsyncIterator[Driver]:
    """Start an engine, step it throughout, and stop it."""
    engine = factory()
    driver = Driver(engine, await engine.start())
    pump = asyncio.create_task(driver.pump())
    try:
        yield driver
    finally:
        await engine.stop()
        await pump


@pytest.fixture
def prompt(engine: Driver) -> list[int]:
    """Three full blocks and a bit, so that caching and transfers have something to do."""
    return make_prompt(3 * engine.info.block_size_tokens + 5)


def _is_idle(load: EngineLoad) -> bool:
    return load.running == load.waiting == load.kv_blocks_used == 0


async def _hand_off(source: Driver, prompt: list[int], **sampling: Any) -> tuple[str, Generation]:
    request = make_request(new_id(), prompt, **sampling)
    hand_off_after_first_token(request)
    return request.request_id, await source.run(request)


class EngineContract:
    """The checks."""

    async def test_tells_what_it_is(self, engine: Driver) -> None:
        info = engine.info
        ready = decode_ready(info.ready_payload)
        assert info.engine_tag == ENGINE_TAG
        assert info.engine_tag.removeprefix("vllm-") in ready.vllm_version
        assert (ready.max_model_len, ready.num_gpu_blocks) == (
            info.max_model_len_tokens,
            info.kv_blocks_total,
        )
        assert info.block_size_tokens > 0

    async def test_generates_up_to_the_length(self, engine: Driver, prompt: list[int]) -> None:
        generation = await engine.generate(prompt, max_tokens=12, ignore_eos=True)
        assert len(generation.tokens) == 12
        assert generation.finish_reason == FINISH_LENGTH
        assert generation.kv_transfer_params is None
        assert generation.ends == 1
        assert _is_idle(engine.load)

    async def test_generates_a_single_token(self, engine: Driver, prompt: list[int]) -> None:
        generation = await engine.generate(prompt, max_tokens=1)
        assert len(generation.tokens) == 1
        assert generation.finish_reason == FINISH_LENGTH

    async def test_repeats_itself(self, engine: Driver, other: Driver, prompt: list[int]) -> None:
        first = await engine.generate(prompt, max_tokens=12)
        assert (await engine.generate(prompt, max_tokens=12)).tokens == first.tokens
        assert (await other.generate(prompt, max_tokens=12)).tokens == first.tokens

    async def test_stops_at_a_token(self, engine: Driver, prompt: list[int]) -> None:
        free = await engine.generate(prompt, max_tokens=8, ignore_eos=True)
        stop = free.tokens[3]
        generation = await engine.generate(prompt, max_tokens=8, stop_token_ids=[stop])
        assert generation.tokens == free.tokens[: free.tokens.index(stop) + 1]
        assert generation.finish_reason == FINISH_STOP
        assert generation.stop_reason == stop

    async def test_does_not_stop_before_min_tokens(self, engine: Driver, prompt: list[int]) -> None:
        free = await engine.generate(prompt, max_tokens=8, ignore_eos=True)
        generation = await engine.generate(
            prompt, max_tokens=8, min_tokens=6, stop_token_ids=free.tokens[:1]
        )
        assert len(generation.tokens) >= 6
        assert free.tokens[0] not in generation.tokens[:6]

    async def test_cached_prefix_shows(self, engine: Driver, prompt: list[int]) -> None:
        cold = (await engine.generate(prompt)).prefill_stats
        warm = (await engine.generate(prompt)).prefill_stats
        assert cold is not None
        assert cold.num_computed_tokens == cold.num_prompt_tokens == len(prompt)
        assert warm is not None
        assert warm.num_local_cached_tokens == 3 * engine.info.block_size_tokens
        assert warm.num_computed_tokens == 5

    async def test_counts(self, engine: Driver, prompt: list[int]) -> None:
        before = dict(engine.counters)
        await engine.generate(prompt, max_tokens=4, ignore_eos=True)
        added = {name: n - before.get(name, 0) for name, n in engine.counters.items()}
        assert added["vllm:prompt_tokens_total"] == len(prompt)
        assert added["vllm:generation_tokens_total"] == 4
        assert added['vllm:prompt_tokens_by_source_total{source="local_compute"}'] == len(prompt)

    async def test_serves_many_at_once(self, engine: Driver) -> None:
        prompts = [make_prompt(20 + 3 * index) for index in range(32)]
        ids = [
            engine.add(make_request(new_id(), prompt, max_tokens=6, ignore_eos=True))
            for prompt in prompts
        ]
        for request_id in ids:
            generation = await engine.end_of(request_id)
            assert (len(generation.tokens), generation.ends) == (6, 1)
        assert _is_idle(engine.load)

    async def test_abort_frees(self, engine: Driver, prompt: list[int]) -> None:
        request_id = engine.add(make_request(new_id(), prompt, max_tokens=200, ignore_eos=True))
        await engine.until(lambda: len(engine.generations[request_id].tokens) >= 2)
        engine.engine.abort([request_id])
        assert _is_idle(await engine.load_after_probe())
        assert engine.generations[request_id].ends == 0

    async def test_abort_before_the_first_step(self, engine: Driver, prompt: list[int]) -> None:
        request_id = engine.add(make_request(new_id(), prompt))
        engine.engine.abort([request_id])
        assert _is_idle(await engine.load_after_probe())
        assert engine.generations[request_id].tokens == []

    async def test_abort_of_an_unknown_request(self, engine: Driver) -> None:
        engine.engine.abort(["never-heard-of"])
        assert _is_idle(await engine.load_after_probe())

    @pytest.mark.parametrize("extra_tokens", [0, 5])
    async def test_hand_off(self, engine: Driver, other: Driver, extra_tokens: int) -> None:
        prompt = make_prompt(2 * engine.info.block_size_tokens + extra_tokens)
        request_id, handed = await _hand_off(engine, prompt, max_tokens=12, min_tokens=3)
        assert len(handed.tokens) == 1
        assert handed.finish_reason == FINISH_LENGTH
        assert handed.kv_transfer_params is not None
        resumed = make_request(new_id(), prompt, max_tokens=12, min_tokens=3, ignore_eos=True)
        resume_from(resumed, handed.tokens, encode_manifest(handed.kv_transfer_params))
        rest = await other.run(resumed)
        engine.engine.abort([request_id])
        assert rest.prefill_stats is None or rest.prefill_stats.num_computed_tokens == 0
        whole = await other.generate(prompt, max_tokens=12, min_tokens=3, ignore_eos=True)
        assert [*handed.tokens, *rest.tokens] == whole.tokens
        assert rest.finish_reason == FINISH_LENGTH

    async def test_hand_off_keeps_the_blocks_until_abort(
        self, engine: Driver, prompt: list[int]
    ) -> None:
        request_id, _ = await _hand_off(engine, prompt)
        assert (await engine.load_after_probe()).kv_blocks_used >= 3
        engine.engine.abort([request_id])
        assert _is_idle(await engine.load_after_probe())

    async def test_stopped_request_is_not_handed_off(
        self, engine: Driver, prompt: list[int]
    ) -> None:
        first = (await engine.generate(prompt, max_tokens=1, ignore_eos=True)).tokens[0]
        _, handed = await _hand_off(engine, prompt, stop_token_ids=[first])
        assert handed.finish_reason == FINISH_STOP
        assert not handed.kv_transfer_params
        assert _is_idle(await engine.load_after_probe())

    @pytest.mark.parametrize("done_tokens", [1, 5, 11])
    async def test_resume_by_injection(
        self, engine: Driver, other: Driver, prompt: list[int], done_tokens: int
    ) -> None:
        whole = await engine.generate(prompt, max_tokens=12, min_tokens=8, ignore_eos=True)
        resumed = make_request(new_id(), prompt, max_tokens=12, min_tokens=8, ignore_eos=True)
        resume_from(resumed, whole.tokens[:done_tokens], b"")
        rest = await other.run(resumed)
        assert [*whole.tokens[:done_tokens], *rest.tokens] == whole.tokens
        assert rest.finish_reason == FINISH_LENGTH

    async def test_tells_the_addresses_of_what_it_caches(self, engine: Driver) -> None:
        whole = engine.blocks.block_tokens
        prompt = make_prompt(3 * whole + 5)
        told = len(engine.cache_changes)
        generation = await engine.generate(prompt, max_tokens=whole, ignore_eos=True)
        stored = [a for change in engine.cache_changes[told:] for a in change.stored]
        # The last token's state is never computed.
        assert stored == engine.addresses([*prompt, *generation.tokens[:-1]])
        assert len(stored) == 4
        assert {*stored} <= {*engine.blocks.held}

    async def test_tells_nothing_of_what_it_caches_already(self, engine: Driver) -> None:
        prompt = make_prompt(2 * engine.blocks.block_tokens)
        await engine.generate(prompt, max_tokens=1)
        told = len(engine.cache_changes)
        await engine.generate(prompt, max_tokens=1)
        assert engine.cache_changes[told:] == []

    async def test_tells_salted_prompts_apart(self, engine: Driver) -> None:
        prompt = make_prompt(2 * engine.blocks.block_tokens)
        for salt in ("", "tenant", "other tenant"):
            request = make_request(new_id(), prompt, max_tokens=1)
            request.cache_salt = salt or None
            await engine.run(request)
            assert {*engine.addresses(prompt, salt)} <= {*engine.blocks.held}
        assert len({*engine.addresses(prompt), *engine.addresses(prompt, "tenant")}) == 4

    async def test_tells_what_it_fetched(self, engine: Driver, other: Driver) -> None:
        prompt = make_prompt(2 * engine.blocks.block_tokens)
        request_id, handed = await _hand_off(engine, prompt)
        assert handed.kv_transfer_params is not None
        resumed = make_request(new_id(), prompt, ignore_eos=True)
        resume_from(resumed, handed.tokens, encode_manifest(handed.kv_transfer_params))
        await other.run(resumed)
        engine.engine.abort([request_id])
        assert {*other.addresses(prompt)} <= {*other.blocks.held}

    async def test_tells_what_it_evicts(self, engine: Driver) -> None:
        prompt = make_prompt(2 * engine.blocks.block_tokens)
        request = make_request(new_id(), prompt, max_tokens=1)
        await engine.run(request)
        for _ in range(engine.info.kv_blocks_total):
            if not {*engine.addresses(prompt)} & {*engine.blocks.held}:
                break
            filler = make_prompt(engine.info.max_model_len_tokens // 2)
            await engine.generate(filler, max_tokens=1)
        assert not {*engine.addresses(prompt)} & {*engine.blocks.held}
        removed = [a for change in engine.cache_changes for a in change.removed]
        assert {*engine.addresses(prompt)} <= {*removed}
        whole = engine.blocks.block_tokens
        assert len(engine.blocks.held) * whole <= (
            engine.info.kv_blocks_total * engine.info.block_size_tokens
        )
        # And it computes it again.
        again = (await engine.generate(prompt, max_tokens=1)).prefill_stats
        assert again is not None
        assert again.num_local_cached_tokens < len(prompt) - engine.info.block_size_tokens
        assert {*engine.addresses(prompt)} <= {*engine.blocks.held}

    async def test_tells_prompts_computed_side_by_side(self, engine: Driver) -> None:
        prompt = make_prompt(2 * engine.blocks.block_tokens)
        ids = [engine.add(make_request(new_id(), prompt, max_tokens=1)) for _ in range(2)]
        for request_id in ids:
            await engine.end_of(request_id)
        assert {*engine.addresses(prompt)} <= {*engine.blocks.held}
        warm = (await engine.generate(prompt, max_tokens=1)).prefill_stats
        assert warm is not None
        assert warm.num_local_cached_tokens == len(prompt) - engine.info.block_size_tokens

    async def test_refuses_a_prompt_beyond_the_context(self, engine: Driver) -> None:
        generation = await engine.generate(make_prompt(engine.info.max_model_len_tokens))
        assert generation.finish_reason == FINISH_ERROR
        assert generation.tokens == []

    async def test_stop_ends_it(self, fresh: EngineFactory) -> None:
        async with driven(fresh) as driver:
            await driver.engine.stop()
            with pytest.raises(EngineError):
                await driver.engine.step()
