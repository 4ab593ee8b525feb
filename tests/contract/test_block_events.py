"""vLLM's own block pool against what is read from its events."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.distributed.kv_events import BlockStored, KVEventBatch
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from engine.vllm_host.block_events import StepBlockEvents
from kvstore.content import block_addresses, root_address
from kvstore.engine_blocks import AddressChange, EngineBlocks

MODEL = "the model"
SIZE = 32
WHOLE = 128


class Engine:
    """A pool of 16 blocks, and what is told of it."""

    def __init__(self, kinds: tuple[str, ...] = ("full_attention",)) -> None:
        init_none_hash(sha256)
        self.pool = BlockPool(17, True, SIZE, enable_kv_cache_events=True)
        metadata = [(kind, None) for kind in kinds]
        manager = SimpleNamespace(kv_cache_event_metadata=metadata, block_pool=self.pool)
        self.told = StepBlockEvents(manager, SIZE)
        self.blocks = EngineBlocks(MODEL, SIZE)

    def compute(
        self, tokens: list[int], adapter: str = "", salt: str | None = None, group: int = 0
    ) -> None:
        """In two steps; its blocks are free afterwards."""
        lora = LoRARequest(adapter, 1, "/adapters/tuned") if adapter else None
        request = Request(
            "r", tokens, SamplingParams(max_tokens=1), None, lora_request=lora, cache_salt=salt,
            block_hasher=get_request_block_hasher(SIZE, sha256),
        )  # fmt: skip
        count = len(tokens) // SIZE
        blocks = self.pool.get_new_blocks(count)
        for first, end in ((0, 1), (1, count)):
            self.pool.cache_full_blocks(request, blocks, first, end, SIZE, group)
        self.pool.free_blocks(reversed(blocks))

    def change(self) -> AddressChange:
        """Of all since the last call."""
        self.told.publish(KVEventBatch(ts=0.0, events=self.pool.take_events()))
        return self.blocks.take(self.told.take())


@pytest.fixture(autouse=True)
def _whole_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the engine's process has it."""
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", "0")


def addresses(tokens: list[int], adapter: str = "", salt: str = "") -> list[bytes]:
    return block_addresses(root_address(MODEL, adapter, salt, WHOLE), tokens, WHOLE)


@pytest.mark.parametrize(
    ("adapter", "salt"), [("", None), ("tuned", None), ("", "salt"), ("tuned", "tuned")]
)
def test_adapter_and_salt_are_those_of_the_request(adapter: str, salt: str | None) -> None:
    engine, tokens = Engine(), list(range(256))
    engine.compute(tokens, adapter, salt)
    assert engine.change() == AddressChange([], addresses(tokens, adapter, salt or ""))


def test_what_is_evicted_and_emptied_goes() -> None:
    engine, tokens = Engine(), list(range(256))
    engine.compute(tokens)
    engine.change()
    engine.compute([7] * 384)  # 8 blocks are free, and 4 are taken from the end.
    assert engine.change() == AddressChange(addresses(tokens)[1:], addresses([7] * 384))
    assert engine.pool.reset_prefix_cache()
    removed, stored = engine.change()
    assert {*removed} == {*addresses(tokens)[:1], *addresses([7] * 384)}
    assert stored == []


def test_the_first_group_that_needs_whole_prefixes_is_told_of() -> None:
    engine, tokens = Engine(("sliding_window", "full_attention")), list(range(128))
    engine.compute(tokens, group=0)
    assert engine.change() == AddressChange([], [])
    engine.compute(tokens, group=1)
    assert engine.change() == AddressChange([], addresses(tokens))


@pytest.mark.parametrize(
    "event",
    [
        BlockStored([b"1"], None, [1] * SIZE, SIZE, None, "GPU", None, [(("image", 0),)], 0),
        BlockStored([b"1"], b"0", [1] * SIZE, SIZE, None, "GPU", None, [("more",)], 0),
        BlockStored([b"1"], None, [1] * SIZE, SIZE, None, "GPU", None, [("salt", "more")], 0),
        BlockStored([b"1"], None, [1] * 2 * SIZE, SIZE, None, "GPU", None, None, 0),
        BlockStored([b"1"], None, [1] * 16, 16, None, "GPU", None, None, 0),
        BlockStored([b"1"], None, [1] * SIZE, SIZE, None, "CPU", None, None, 0),
    ],
    ids=["an image", "keys within", "two keys", "blocks left out", "part of one", "elsewhere"],
)
def test_what_an_address_does_not_say_is_left_out(event: BlockStored) -> None:
    engine = Engine()
    engine.told.publish(KVEventBatch(ts=0.0, events=[event]))
    assert engine.told.take() == []
