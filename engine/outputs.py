"""What an attempt made and how it goes out: pure, shared by memory and wire.

The engine's own structs are kept; they are encoded only when they are sent. What waited together
goes out as one output: a router that is busy gets fewer and larger ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Struct

from protos import enginecore, worker_pb2
from protos.enginecore import NIL, EngineOutput

_FINISH: Final = {
    enginecore.FINISH_STOP: worker_pb2.STOP,
    enginecore.FINISH_LENGTH: worker_pb2.LENGTH,
    enginecore.FINISH_ABORT: worker_pb2.ABORTED,
    enginecore.FINISH_ERROR: worker_pb2.ERROR,
    enginecore.FINISH_REPETITION: worker_pb2.REPETITION,
}


class Output(Struct, gc=False):
    """What one or several steps added to one attempt."""

    request_key: str
    attempt: int
    first_position: int
    made: EngineOutput | None
    """As its front is given it, under the front's request id; None of a refused submission."""
    finish: worker_pb2.Finish = worker_pb2.NOT_FINISHED
    manifest: bytes = b""
    error: str = ""
    prompt_use: worker_pb2.PromptUse | None = None

    @property
    def token_ids(self) -> Sequence[int]:
        """From `first_position` on."""
        return self.made.new_token_ids if self.made is not None else ()

    @property
    def payload(self) -> bytes:
        """The encoded engine output."""
        return enginecore.encode(self.made) if self.made is not None else b""

    @property
    def is_plain(self) -> bool:
        """Nothing but tokens, so that what comes next may be added to it."""
        return not self.finish and not self.manifest and _says_only_tokens(self.made)


def merged(outputs: Sequence[Output]) -> Output:
    """One output for several that follow each other, all but the last plain.

    The last must have no logprobs.
    """
    first, last = outputs[0], outputs[-1]
    if first is last:
        return first
    assert first.made is not None
    assert last.made is not None
    made = msgspec.structs.replace(
        last.made,
        new_token_ids=[token for output in outputs for token in output.token_ids],
        prefill_stats=first.made.prefill_stats,
    )
    return msgspec.structs.replace(
        last, first_position=first.first_position, made=made, prompt_use=first.prompt_use
    )


def may_end_a_merge(output: Output) -> bool:
    """Whether it can be added to plain ones before it."""
    return output.prompt_use is None and _says_only_tokens(output.made)


def _says_only_tokens(made: EngineOutput | None) -> bool:
    """Nothing beside them, such as logprobs; else it stays as the engine made it."""
    # One after the other, since all tokens pass here.
    return (
        made is not None
        and made.new_logprobs is NIL
        and made.new_prompt_logprobs_tensors is NIL
        and made.pooling_output is NIL
        and made.events is NIL
        and made.ec_transfer_params is None
        and made.trace_headers is None
        and made.routed_experts is NIL
        and made.num_nans_in_logits == 0
        and made.mm_cache_miss_hashes is None
        and made.new_sampling_mask is NIL
        and made.spec_decode_metrics is NIL
        and made.prompt_token_id_logprobs is NIL
    )


def read(
    request_key: str,
    attempt: int,
    front_request_id: str,
    first_position: int,
    made: EngineOutput,
    *,
    hand_off: bool,
    resumed: bool,
    guided: bool = False,
) -> Output:
    """What the engine made, for routers and fronts. Takes `made` over."""
    # The front sees one request under its own id, however many engines worked on it.
    made.request_id = front_request_id
    # It is kept until its request ends; the message that it came in had those of all streams.
    enginecore.detach(made)
    output = Output(request_key, attempt, first_position, made)
    if made.finish_reason is not None:
        _read_end(output, made, hand_off, guided)
    if made.prefill_stats is not None:
        stats = made.prefill_stats
        output.prompt_use = worker_pb2.PromptUse(
            prompt_tokens=stats.num_prompt_tokens,
            computed_tokens=stats.num_computed_tokens,
            cached_tokens=stats.num_local_cached_tokens,
            transferred_tokens=stats.num_external_cached_tokens,
        )
        if resumed:
            made.prefill_stats = None
    made.kv_transfer_params = None
    return output


def _read_end(output: Output, made: EngineOutput, hand_off: bool, guided: bool) -> None:
    assert made.finish_reason is not None
    if hand_off and made.finish_reason == enginecore.FINISH_LENGTH:
        if made.kv_transfer_params:
            output.manifest = enginecore.encode_manifest(made.kv_transfer_params)
            made.finish_reason = None
        else:
            # It was to go on; ending here would look like a whole answer of one token.
            output.finish = worker_pb2.ERROR
            output.error = "the engine kept no blocks to hand off"
        return
    output.finish = _FINISH[made.finish_reason]
    if made.finish_reason != enginecore.FINISH_ERROR:
        return
    if guided and not output.first_position and not output.token_ids:
        # An engine says no more; fronts check only some of what a grammar can't be.
        output.finish = worker_pb2.REFUSED
        output.error = "its grammar or schema can't be used: it does not compile, or takes too long"
    else:
        output.error = "the engine reported an error for this request; see its log"


class StepColumns:
    """The columns of one `Step` message."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._attempts: list[int] = []
        self._positions: list[int] = []
        self._counts: list[int] = []
        self._token_ids: list[int] = []
        self._payloads: list[bytes] = []
        self._details: list[worker_pb2.Detail] = []
        self.size_bytes = 0
        """Of the payloads."""

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, output: Output) -> None:
        """As the next output."""
        if output.finish or output.manifest or output.prompt_use is not None:
            self._details.append(
                worker_pb2.Detail(
                    output=len(self._keys),
                    finish=output.finish,
                    manifest=output.manifest,
                    error=output.error,
                    prompt_use=output.prompt_use,
                )
            )
        payload, token_ids = output.payload, output.token_ids
        self._keys.append(output.request_key)
        self._attempts.append(output.attempt)
        self._positions.append(output.first_position)
        self._counts.append(len(token_ids))
        self._token_ids += token_ids
        self._payloads.append(payload)
        self.size_bytes += len(payload)

    def message(
        self, load: worker_pb2.Load, cache_change: worker_pb2.CacheChange | None = None
    ) -> worker_pb2.Step:
        """To be sent."""
        return worker_pb2.Step(
            request_keys=self._keys,
            attempts=self._attempts,
            first_positions=self._positions,
            token_counts=self._counts,
            token_ids=self._token_ids,
            payloads=self._payloads,
            details=self._details,
            load=load,
            cache_change=cache_change,
        )
