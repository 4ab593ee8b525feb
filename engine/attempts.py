"""What a worker remembers of the work that routers gave it: pure, no I/O, no engine.

An attempt's outputs are kept until its router says that it has them, so neither a broken link nor
a new router loses a token or gets one twice: whoever attaches asks for what it misses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from protos import enginecore, sampling, worker_pb2
from protos.enginecore import EngineOutput, EngineRequest

_DEFAULT_MAX_TOKENS = 16
"""vLLM's default, which an encoded request leaves out."""

_FINISH = {
    enginecore.FINISH_STOP: worker_pb2.STOP,
    enginecore.FINISH_LENGTH: worker_pb2.LENGTH,
    enginecore.FINISH_ABORT: worker_pb2.ABORTED,
    enginecore.FINISH_ERROR: worker_pb2.ERROR,
    enginecore.FINISH_REPETITION: worker_pb2.REPETITION,
}


@dataclass(slots=True)
class Attempt:
    """One submission of one request to this worker."""

    router_id: str
    request_key: str
    number: int
    front_request_id: str
    hand_off: bool
    first_position: int
    outputs: list[worker_pb2.Output] = field(default_factory=list)
    next_position: int = 0
    ended: bool = False
    aborted: bool = False
    """Its router gave it up: what there is of it is not whole, and its blocks may be gone."""
    live: bool = True
    """Outputs go out as they come; false from a router's return until it says from where on."""

    @property
    def engine_id(self) -> str:
        """The id that the engine knows it by."""
        return f"{self.router_id}/{self.request_key}/{self.number}"


class Attempts:
    """All attempts of a worker, by router."""

    def __init__(self, max_model_len_tokens: int, vocabulary_tokens: int | None = None) -> None:
        self._max_model_len_tokens = max_model_len_tokens
        self._vocabulary_tokens = vocabulary_tokens
        self._by_engine_id: dict[str, Attempt] = {}
        self._latest: dict[tuple[str, str], Attempt] = {}

    def __len__(self) -> int:
        return len(self._by_engine_id)

    def submit(
        self, router_id: str, submit: worker_pb2.Submit
    ) -> tuple[EngineRequest | None, list[str]]:
        """What to add to the engine and what to abort there.

        A repeated submission, or one that a later attempt has fenced, adds nothing. Raises
        msgspec.DecodeError or ValueError for a request that can't be run.
        """
        latest = self._latest.get((router_id, submit.request_key))
        if latest is not None and latest.number >= submit.attempt:
            return None, []
        request = enginecore.decode_request(submit.engine_request)
        sampling.check(request.sampling_params or {})
        self._check_length(request, len(submit.output_token_ids))
        self._check_vocabulary(request)
        attempt = Attempt(
            router_id=router_id,
            request_key=submit.request_key,
            number=submit.attempt,
            front_request_id=request.request_id,
            hand_off=submit.hand_off and self._goes_on_after_first_token(request),
            first_position=len(submit.output_token_ids),
            next_position=len(submit.output_token_ids),
        )
        request.request_id = attempt.engine_id
        request.client_index = 0
        request.arrival_time = 0.0
        if attempt.hand_off:
            enginecore.hand_off_after_first_token(request)
        enginecore.resume_from(request, list(submit.output_token_ids), submit.manifest)
        self._by_engine_id[attempt.engine_id] = attempt
        self._latest[router_id, submit.request_key] = attempt
        if latest is None:
            return request, []
        # Blocks of one that was handed off are left to their lease: they may be being read.
        fenced = [] if latest.ended else [latest.engine_id]
        latest.ended = latest.aborted = True
        return request, fenced

    def _check_length(self, request: EngineRequest, output_tokens: int) -> None:
        # Fronts check it too, but a prompt that doesn't fit would end the engine.
        tokens = len(request.prompt_token_ids or ()) + output_tokens
        if not 0 < tokens < self._max_model_len_tokens:
            raise ValueError(
                f"a request of {tokens} tokens can't be continued within the context of "
                f"{self._max_model_len_tokens} tokens"
            )

    def _check_vocabulary(self, request: EngineRequest) -> None:
        # Fronts check it against the tokenizer, which may know more tokens than the model has; such
        # an id would end the engine.
        if self._vocabulary_tokens is None:
            return
        allowed = (request.sampling_params or {}).get("allowed_token_ids")
        largest = max(chain(request.prompt_token_ids or (), allowed or ()), default=0)
        if largest >= self._vocabulary_tokens:
            raise ValueError(
                f"token id {largest} is not among the model's {self._vocabulary_tokens} tokens"
            )

    def _goes_on_after_first_token(self, request: EngineRequest) -> bool:
        max_tokens = (request.sampling_params or {}).get("max_tokens", _DEFAULT_MAX_TOKENS)
        prompt_tokens = len(request.prompt_token_ids or ())
        return max_tokens != 1 and prompt_tokens + 1 < self._max_model_len_tokens

    def record(self, output: EngineOutput) -> tuple[Attempt, worker_pb2.Output] | None:
        """Keep what the engine made, in the form in which routers get it; None: nobody's."""
        attempt = self._by_engine_id.get(output.request_id)
        if attempt is None or attempt.ended:
            return None
        attempt.ended = output.finish_reason is not None
        message = _message(attempt, output)
        attempt.outputs.append(message)
        attempt.next_position += len(output.new_token_ids)
        return attempt, message

    def fail(self, router_id: str, submit: worker_pb2.Submit, reason: str) -> worker_pb2.Output:
        """The answer to a submission that can't be run; nothing is kept of it."""
        return worker_pb2.Output(
            request_key=submit.request_key,
            attempt=submit.attempt,
            first_position=len(submit.output_token_ids),
            finish=worker_pb2.REFUSED,
            error=reason,
        )

    def abort(self, router_id: str, request_key: str, number: int) -> str | None:
        """A router gives an attempt up; returns the engine's id to abort, unless it is unknown.

        Also for one that has ended: its blocks may wait to be fetched.
        """
        attempt = self.find(router_id, request_key, number)
        if attempt is None:
            return None
        attempt.ended = attempt.aborted = True
        return attempt.engine_id

    def forget(self, router_id: str, request_key: str, number: int) -> str | None:
        """Drop an attempt. Returns the engine's id of one that had not ended, to be aborted."""
        attempt = self.find(router_id, request_key, number)
        if attempt is None:
            return None
        del self._by_engine_id[attempt.engine_id]
        if self._latest.get((router_id, request_key)) is attempt:
            del self._latest[router_id, request_key]
        return None if attempt.ended else attempt.engine_id

    def find(self, router_id: str, request_key: str, number: int) -> Attempt | None:
        """The attempt, if it is still kept."""
        return self._by_engine_id.get(f"{router_id}/{request_key}/{number}")

    def of_router(self, router_id: str) -> list[Attempt]:
        """All that is kept for a router."""
        return [a for a in self._by_engine_id.values() if a.router_id == router_id]

    def hold_back(self, router_id: str) -> list[worker_pb2.Held]:
        """A router (re)attaches: what is kept for it. Nothing of it goes out until it asks."""
        kept = self.of_router(router_id)
        for attempt in kept:
            attempt.live = False
        return [
            worker_pb2.Held(
                request_key=attempt.request_key,
                attempt=attempt.number,
                first_position=attempt.first_position,
                next_position=attempt.next_position,
                ended=attempt.ended,
                aborted=attempt.aborted,
            )
            for attempt in kept
        ]

    def resend(self, attempt: Attempt, from_position: int) -> Iterator[worker_pb2.Output]:
        """All kept outputs that hold `from_position` or what follows; from now on it is live."""
        attempt.live = True
        for output in attempt.outputs:
            end = output.first_position + len(output.token_ids)
            if end > from_position or output.finish or output.manifest:
                yield output


def _message(attempt: Attempt, output: EngineOutput) -> worker_pb2.Output:
    handed_off = (
        attempt.hand_off
        and output.finish_reason == enginecore.FINISH_LENGTH
        and bool(output.kv_transfer_params)
    )
    message = worker_pb2.Output(
        request_key=attempt.request_key,
        attempt=attempt.number,
        first_position=attempt.next_position,
        token_ids=output.new_token_ids,
    )
    if handed_off:
        assert output.kv_transfer_params is not None
        message.manifest = enginecore.encode_manifest(output.kv_transfer_params)
    elif attempt.hand_off and output.finish_reason == enginecore.FINISH_LENGTH:
        # It was to go on; ending here would look like a whole answer of one token.
        message.finish = worker_pb2.ERROR
        message.error = "the engine kept no blocks to hand off"
    elif output.finish_reason is not None:
        message.finish = _FINISH[output.finish_reason]
        if output.finish_reason == enginecore.FINISH_ERROR:
            message.error = "the engine reported an error for this request; see its log"
    stats = output.prefill_stats
    if stats is not None:
        message.prompt_use.prompt_tokens = stats.num_prompt_tokens
        message.prompt_use.computed_tokens = stats.num_computed_tokens
        message.prompt_use.cached_tokens = stats.num_local_cached_tokens
        message.prompt_use.transferred_tokens = stats.num_external_cached_tokens
    message.payload = _front_payload(attempt, output, handed_off)
    return message


def _front_payload(attempt: Attempt, output: EngineOutput, handed_off: bool) -> bytes:
    # The front sees one request under its own id, however many engines worked on it.
    output.request_id = attempt.front_request_id
    output.kv_transfer_params = None
    if handed_off:
        output.finish_reason = None
    if attempt.first_position:
        output.prefill_stats = None
    return enginecore.encode(output)
