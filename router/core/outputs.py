"""What an engine's output means for its request: fencing, order, hand-off, end.

The hot path: once per request and step.
"""

from __future__ import annotations

from typing import Final

from router.core.backlog import OUTPUT_WEIGHT
from router.core.events import Fault, Finish, OutputReport
from router.core.lifecycle import Request, State, Trigger
from router.core.moves import Moves
from router.core.recovery import Recovery
from router.core.workers import Worker

_FAILED: Final = frozenset((Finish.ERROR, Finish.ABORTED, Finish.REFUSED))


class OutputIntake:
    """Takes the outputs of living workers."""

    def __init__(self, moves: Moves, recovery: Recovery) -> None:
        self._moves = moves
        self._recovery = recovery
        self._requests = moves.requests

    def take(self, now_s: float, worker: Worker, output: OutputReport) -> None:
        """Drop what is fenced or known, ask for what is missing, pass on the rest."""
        request = self._requests.get(output.key)
        if request is None:
            self._moves.counts.fenced_outputs += 1
            return
        current = request.current
        if (
            current is None
            or current.attempt != output.attempt
            or current.worker is not worker
            or not current.live
        ):
            self._moves.counts.fenced_outputs += 1
            return
        if output.finish in _FAILED:
            fault = Fault.REFUSED if output.finish == Finish.REFUSED else Fault.ENGINE
            self._moves.engine_failed(now_s, request, fault, _sentence(worker, output))
            return
        if self._in_order(request, output):
            if not current.spoke:
                current.spoke = True
                self._first_output(now_s, request, output)
            self._pass_on(now_s, request, output)

    def _in_order(self, request: Request, output: OutputReport) -> bool:
        """Take over the tokens; False if they are known already, or if some before are missing."""
        position = request.position
        first, end = output.first_position, output.first_position + len(output.token_ids)
        if first == position:
            request.tokens += output.token_ids
        elif first > position:
            assert request.current is not None
            self._moves.outbox.ask_again(request, request.current, position)
            return False
        elif end < position or (end == position and not (output.finish or output.manifest)):
            self._moves.counts.repeated_outputs += 1
            return False
        else:
            request.tokens += output.token_ids[position - first :]
        made = end - position
        self._moves.backlog.charge(request.waits.tenant, OUTPUT_WEIGHT * made)
        request.position = request.record.output_tokens = end
        request.asked_from = -1
        return True

    def _first_output(self, now_s: float, request: Request, output: OutputReport) -> None:
        record = request.record
        if output.prompt_use is not None:
            record.attempts[-1].prompt_use = output.prompt_use
        if record.first_token_s is None and output.token_ids:
            self._moves.begin_output(now_s, request)
        self._moves.first_token(now_s, request)
        if request.state is State.HANDING_OFF:
            record.resumed_s = now_s
            request.advance(now_s, Trigger.RESUMED)
            self._moves.outbox.abort_source(request)

    def _pass_on(self, now_s: float, request: Request, output: OutputReport) -> None:
        finished = bool(output.finish) and not output.manifest
        if finished or request.position > request.delivered:
            self._moves.outbox.give(request, output, finished)
        if finished:
            self._moves.complete(now_s, request)
        elif request.state is State.RECOVERING:
            self._recovery.rebuilt(now_s, request, output.manifest)
        elif output.manifest:
            self._moves.hand_off(now_s, request, output.manifest)


def _sentence(worker: Worker, output: OutputReport) -> str:
    if output.error:
        return output.error
    what = "ended it" if output.finish == Finish.ABORTED else "reported an error"
    return f"The engine of {worker.id} {what} without saying why."
