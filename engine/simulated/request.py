"""A request inside the simulated engine: its tokens, where it ends, and what to fetch for it.

The next token is a hash of the prompt, of all output so far and of the seed. So it does not
depend on how the tokens were computed, and any slip in a resume changes all that follows. Output
is folded in token by token, the prompt as a whole: output passed off as prompt shows as well.

Where nobody reads the tokens, as in the simulator, a request is its counts and what it shares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from engine.simulated.kv_cache import chained_hash, salted_root
from protos.block_events import BlocksStored
from protos.enginecore import (
    DEFAULT_MAX_TOKENS,
    FINISH_LENGTH,
    FINISH_STOP,
    EngineRequest,
    PrefillStats,
    resumed_output_token_ids,
)

FIRST_TOKEN_ID = 16
VOCABULARY_TOKENS = 2000
"""Ids that a simulated engine produces: special tokens lie below, the tiny model's end above."""

_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """Where a request's KV blocks are and of which tokens they are."""

    engine_id: str
    request_id: str
    block_ids: tuple[int, ...]
    tokens: int
    digest: str

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> Manifest:
        """Read `kv_transfer_params`. Raises KeyError, TypeError or ValueError."""
        return cls(
            engine_id=str(params["remote_engine_id"]),
            request_id=str(params["remote_request_id"]),
            block_ids=tuple(int(block) for group in params["remote_block_ids"] for block in group),
            tokens=int(params["remote_num_tokens"]),
            digest=str(params["prefix_digest"]),
        )

    def to_params(self) -> dict[str, Any]:
        """As the NIXL connector writes it, plus the digest that the reader verifies."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine_id,
            "remote_request_id": self.request_id,
            "remote_block_ids": [list(self.block_ids)],
            "remote_num_tokens": self.tokens,
            "prefix_digest": self.digest,
        }


@dataclass(slots=True, eq=False, kw_only=True)
class QueuedRequest(ABC):
    """One request from its arrival to its end, as scheduling needs it: in counts and blocks."""

    request_id: str
    order: tuple[int, int]
    """Priority (lower first), then arrival."""
    prompt_tokens: int
    known_tokens: int
    """Prompt and output so far."""
    max_tokens: int
    """Of prompt and output together."""
    hand_off: bool
    source: Manifest | None
    block_ids: list[int] = field(default_factory=list)
    computed_tokens: int = 0
    """Tokens whose KV state is in the blocks."""
    published_blocks: int = 0
    prefill_stats: PrefillStats | None = None
    """Set at the first admission, taken by the first output."""
    admitted_before: bool = False
    fetched_s: float = 0.0
    """When the fetch that it waits for is complete."""
    gone: bool = False
    """It was aborted: what a step under way makes of it goes nowhere."""

    @property
    def output_tokens(self) -> int:
        return self.known_tokens - self.prompt_tokens

    @property
    def remaining_tokens(self) -> int:
        """To be computed before the next token is known."""
        return self.known_tokens - self.computed_tokens

    @property
    def decoding(self) -> bool:
        """Whether all but the newest token is computed."""
        return self.computed_tokens > 0 and self.known_tokens - self.computed_tokens == 1

    def end(self) -> tuple[int, int | None] | None:
        """The finish reason and stop reason of its output so far, if it ends there."""
        if self.known_tokens >= self.max_tokens:
            return FINISH_LENGTH, None
        return None

    def fetchable_tokens(self, source: Manifest) -> int:
        """How many of its first tokens a fetch can spare it: the newest has to be computed."""
        return min(source.tokens, self.known_tokens - 1)

    @abstractmethod
    def next_token(self) -> int:
        """The token that follows."""

    @abstractmethod
    def append(self, token: int) -> None:
        """Take a token as output."""

    @abstractmethod
    def block_hashes(self, blocks: int, block_size_tokens: int) -> Sequence[bytes]:
        """Hashes of its first so many blocks, which must be full; of fewer where what is in the
        others is not known."""

    @abstractmethod
    def block_stored(self, index: int, block_size_tokens: int) -> BlocksStored | None:
        """What there is to tell of a block of it that came into the cache, after its hash was asked
        for; None of one whose tokens are not known."""

    @abstractmethod
    def digest(self, tokens: int) -> str:
        """Names its first so many tokens, or all if it has fewer, and its salt."""


@dataclass(slots=True, eq=False, kw_only=True)
class CountedRequest(QueuedRequest):
    """A request whose tokens nobody reads: a trace's, which tells lengths and what is shared."""

    prompt_hashes: Sequence[bytes]
    """Of the prompt's full blocks, in the engine's block size."""

    def next_token(self) -> int:
        """There is none to be told."""
        return 0

    def append(self, token: int) -> None:
        """Count it."""
        self.known_tokens += 1

    def block_hashes(self, blocks: int, block_size_tokens: int) -> Sequence[bytes]:
        """Its output is in nobody's prompt."""
        return self.prompt_hashes[:blocks]

    def block_stored(self, index: int, block_size_tokens: int) -> None:
        """Its hashes say it all."""

    def digest(self, tokens: int) -> str:
        """There is nothing to verify."""
        return ""


@dataclass(slots=True, eq=False, kw_only=True)
class SimulatedRequest(QueuedRequest):
    """A request with its tokens."""

    tokens: list[int]
    """Prompt and output."""
    min_output_tokens: int
    stop_token_ids: frozenset[int]
    eos_token_id: int | None
    cache_salt: str
    chain: list[bytes]
    """The salted root, then the hash of each full block as far as it was asked for."""
    state: int
    """Hash of prompt, output and seed."""

    @classmethod
    def read(
        cls, request: EngineRequest, arrival: int, max_model_len_tokens: int
    ) -> SimulatedRequest:
        """Raises ValueError for what this engine can't serve."""
        prompt, params = request.prompt_token_ids, request.sampling_params
        if not prompt or params is None:
            raise ValueError("only generation from token ids is served")
        if len(prompt) > max_model_len_tokens - 1:
            raise ValueError("the prompt leaves no room for a token")
        max_output = params.get("max_tokens", DEFAULT_MAX_TOKENS)
        if max_output is None:
            max_output = max_model_len_tokens
        extra = params.get("extra_args") or {}
        transfer = extra.get("kv_transfer_params") or {}
        try:
            state = _prompt_state(prompt, params.get("seed"))
            source = Manifest.from_params(transfer) if transfer.get("do_remote_prefill") else None
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError("unreadable token ids or transfer parameters") from error
        read = cls(
            request_id=request.request_id,
            order=(request.priority, arrival),
            prompt_tokens=len(prompt),
            known_tokens=len(prompt),
            tokens=list(prompt),
            max_tokens=min(len(prompt) + max_output, max_model_len_tokens),
            min_output_tokens=params.get("min_tokens", 0),
            stop_token_ids=frozenset(params.get("stop_token_ids") or ()),
            eos_token_id=params.get("_eos_token_id"),
            hand_off=bool(transfer.get("do_remote_decode")),
            source=source,
            cache_salt=request.cache_salt or "",
            chain=[salted_root(request.cache_salt)],
            state=state,
        )
        for token in resumed_output_token_ids(extra):
            read.append(token)
        return read

    def next_token(self) -> int:
        """The token that follows. Never the end of sequence: lengths are the client's choice."""
        token = _mix(self.state) % VOCABULARY_TOKENS
        if self.eos_token_id is None and not self.min_output_tokens:
            return FIRST_TOKEN_ID + token
        banned = self.stop_token_ids if self.output_tokens < self.min_output_tokens else ()
        for _ in range(VOCABULARY_TOKENS):
            candidate = FIRST_TOKEN_ID + token
            if candidate != self.eos_token_id and candidate not in banned:
                break
            token = (token + 1) % VOCABULARY_TOKENS
        return FIRST_TOKEN_ID + token

    def append(self, token: int) -> None:
        """Take a token as output."""
        self.tokens.append(token)
        self.known_tokens += 1
        self.state = _mix(self.state ^ (token & _MASK_64))

    def end(self) -> tuple[int, int | None] | None:
        """The finish reason and stop reason of its output so far, if it ends there."""
        if self.stop_token_ids and self.output_tokens and self.tokens[-1] in self.stop_token_ids:
            return FINISH_STOP, self.tokens[-1]
        return QueuedRequest.end(self)

    def block_hashes(self, blocks: int, block_size_tokens: int) -> list[bytes]:
        """Hashes of its first so many blocks, which must be full."""
        for index in range(len(self.chain) - 1, blocks):
            start = index * block_size_tokens
            block = self.tokens[start : start + block_size_tokens]
            self.chain.append(chained_hash(self.chain[-1], block))
        return self.chain[1 : blocks + 1]

    def block_stored(self, index: int, block_size_tokens: int) -> BlocksStored:
        """Its tokens and what they follow."""
        start = index * block_size_tokens
        return BlocksStored(
            [self.chain[index + 1]],
            self.chain[index] if index else None,
            self.tokens[start : start + block_size_tokens],
            cache_salt=self.cache_salt,
        )

    def digest(self, tokens: int) -> str:
        """Names its first so many tokens, or all if it has fewer, and its salt."""
        return chained_hash(self.chain[0], self.tokens[:tokens]).hex()


def _prompt_state(prompt: list[int], seed: int | None) -> int:
    content = array("I", prompt).tobytes() + repr(seed).encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _mix(state: int) -> int:
    """SplitMix64's step (Steele, Lea, Flood 2014): neighbouring states give unrelated ones."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return state ^ (state >> 31)
