"""What a worker remembers of the work that routers gave it: pure, no I/O, no engine.

An attempt's outputs are kept until its router says that it has them, so neither a broken link nor
a new router loses a token or gets one twice: whoever attaches asks for what it misses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from engine import outputs
from engine.outputs import Output, may_end_a_merge, merged
from engine.work_by_router import Share, WorkByRouter
from protos import enginecore, sampling, worker_pb2
from protos.enginecore import EngineOutput, EngineRequest


@dataclass(slots=True)
class Attempt:
    """One submission of one request to this worker."""

    router_id: str
    request_key: str
    number: int
    front_request_id: str
    hand_off: bool
    first_position: int
    share: Share
    guided: bool = False
    """Its output follows a grammar or schema."""
    outputs: list[Output] = field(default_factory=list)
    next_position: int = 0
    ended: bool = False
    aborted: bool = False
    """Its router gave it up: what there is of it is not whole, and its blocks may be gone."""
    sent_outputs: int | None = 0
    """How many of `outputs` went out; None from a router's return until it says from where on."""
    engine_id: str = field(init=False)
    """The id that the engine knows it by."""

    def __post_init__(self) -> None:
        self.engine_id = f"{self.router_id}/{self.request_key}/{self.number}"

    @property
    def has_unsent(self) -> bool:
        """Whether there are outputs that may and have to go out."""
        return self.sent_outputs is not None and self.sent_outputs < len(self.outputs)

    def take_unsent(self) -> Iterator[Output]:
        """Outputs to send, each counted as sent once it is taken; what waits together is one."""
        while self.sent_outputs is not None and self.sent_outputs < len(self.outputs):
            first = until = self.sent_outputs
            while self.outputs[until].is_plain and until + 1 < len(self.outputs):
                if not may_end_a_merge(self.outputs[until + 1]):
                    break
                until += 1
            self.sent_outputs = until + 1
            yield merged(self.outputs[first : until + 1])


class Attempts:
    """All attempts of a worker, by router."""

    def __init__(self, max_model_len_tokens: int, vocabulary_tokens: int | None = None) -> None:
        self._max_model_len_tokens = max_model_len_tokens
        self._vocabulary_tokens = vocabulary_tokens
        self.work = WorkByRouter()
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
        hand_off = submit.hand_off and self._goes_on_after_first_token(request)
        tokens = len(request.prompt_token_ids or ()) + len(submit.output_token_ids)
        if hand_off:
            enginecore.hand_off_after_first_token(request)
        enginecore.resume_from(request, list(submit.output_token_ids), submit.manifest)
        # From here on nothing is refused.
        attempt = Attempt(
            router_id=router_id,
            request_key=submit.request_key,
            number=submit.attempt,
            front_request_id=request.request_id,
            hand_off=hand_off,
            first_position=len(submit.output_token_ids),
            share=self._share(router_id, submit, tokens, decodes=not hand_off),
            guided=bool((request.sampling_params or {}).get("structured_outputs")),
            next_position=len(submit.output_token_ids),
        )
        request.request_id = attempt.engine_id
        request.client_index = 0
        request.arrival_time = 0.0
        self._by_engine_id[attempt.engine_id] = attempt
        self._latest[router_id, submit.request_key] = attempt
        if latest is None:
            return request, []
        # Blocks of one that was handed off are left to their lease: they may be being read.
        fenced = [] if latest.ended else [latest.engine_id]
        self._end(latest)
        latest.aborted = True
        return request, fenced

    def _share(
        self, router_id: str, submit: worker_pb2.Submit, tokens: int, *, decodes: bool
    ) -> Share:
        # Of a router that does not say, nothing is thought to be cached.
        self.work.release(router_id, submit.request_key)
        to_compute = 0 if submit.manifest else min(submit.to_compute_tokens or tokens, tokens)
        return self.work.add(router_id, tokens, to_compute, decodes=decodes)

    def _end(self, attempt: Attempt) -> None:
        attempt.ended = True
        self.work.end(attempt.share)

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
        max_tokens = (request.sampling_params or {}).get(
            "max_tokens", enginecore.DEFAULT_MAX_TOKENS
        )
        prompt_tokens = len(request.prompt_token_ids or ())
        return max_tokens != 1 and prompt_tokens + 1 < self._max_model_len_tokens

    def record(self, output: EngineOutput) -> Attempt | None:
        """Keep what the engine made, in the form in which routers get it; None: nobody's."""
        attempt = self._by_engine_id.get(output.request_id)
        if attempt is None or attempt.ended:
            return None
        if output.new_token_ids and not attempt.share.begun:
            self.work.begin(attempt.share)
        if output.finish_reason is not None:
            self._end(attempt)
        position = attempt.next_position
        attempt.next_position += len(output.new_token_ids)
        attempt.outputs.append(
            outputs.read(
                attempt.request_key, attempt.number, attempt.front_request_id, position, output,
                hand_off=attempt.hand_off, resumed=attempt.first_position > 0,
                guided=attempt.guided,
            )
        )  # fmt: skip
        return attempt

    def fail(self, router_id: str, submit: worker_pb2.Submit, reason: str) -> Output:
        """The answer to a submission that can't be run; nothing is kept of it."""
        self.work.release(router_id, submit.request_key)
        return Output(
            submit.request_key,
            submit.attempt,
            len(submit.output_token_ids),
            made=None,
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
        self._end(attempt)
        attempt.aborted = True
        return attempt.engine_id

    def forget(self, router_id: str, request_key: str, number: int) -> str | None:
        """Drop an attempt. Returns the engine's id of one that had not ended, to be aborted."""
        attempt = self.find(router_id, request_key, number)
        if attempt is None:
            return None
        self.work.end(attempt.share)
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
        """A router (re)attaches: what is kept for it. Nothing of it goes out until it asks. What it
        reserved may not be wanted any more."""
        self.work.release_all(router_id)
        kept = self.of_router(router_id)
        for attempt in kept:
            attempt.sent_outputs = None
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

    def resend(self, attempt: Attempt, from_position: int) -> None:
        """Send all kept outputs that hold `from_position` or what follows, and go on from there."""
        first = 0
        for output in attempt.outputs:
            end = output.first_position + len(output.token_ids)
            if end > from_position or output.finish or output.manifest:
                break
            first += 1
        attempt.sent_outputs = first
