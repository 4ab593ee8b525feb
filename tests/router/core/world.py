"""Workers, links and an anchor as plain values around a router core, for random histories.

Every token that a worker makes is new, as with unseeded sampling, and every output's payload is the
whole text of its attempt. So a client's text is exact only if each output it is given goes on from
what it has. A link loses what it carries when it breaks; a router that is restarted knows what the
anchor tells.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec
from msgspec.structs import replace

from engine.base import NOTHING_PLACED, NOTHING_QUEUED, EngineLoad, Queued
from protos.anchor_link import Deliver
from protos.enginecore import decode_request, error_output
from protos.ids import Attempt, RequestKey, WorkerId
from router.core.events import (
    AbortOn,
    Command,
    Demand,
    EdgeEnded,
    End,
    Ended,
    Finish,
    Forget,
    HeldAttempt,
    OutputReport,
    RequestAborted,
    RequestArrived,
    RequestRecovered,
    Resend,
    SnapshotTaken,
    StepReported,
    Submit,
    TellLearned,
    TellQueued,
)
from tests.router.core.driving import TICKET, Drive, demand, key

ToWorker: TypeAlias = Submit | TellQueued | TellLearned | AbortOn | Forget | Resend


@dataclass
class Kept:
    """What a worker keeps of an attempt, as `engine.attempts` does."""

    hand_off: bool
    first: int
    until: int
    text: list[int]
    outputs: list[OutputReport] = field(default_factory=list)
    ended: bool = False
    live: bool = True
    aborted: bool = False


@dataclass
class FakeWorker:
    """One incarnation of a worker and its link to the router."""

    name: str
    new_tokens: Iterator[int]
    incarnation: int = 1
    attached: bool = False
    left_alone: bool = False
    """It was said to be dead: a router that stays away for so long is forgotten."""
    kept: dict[tuple[RequestKey, int], Kept] = field(default_factory=dict)
    commands: deque[ToWorker] = field(default_factory=deque)
    reports: deque[list[OutputReport]] = field(default_factory=deque)
    said: list[OutputReport] = field(default_factory=list)

    def hear(self, command: ToWorker) -> None:
        """Take one of the router's commands."""
        if isinstance(command, Submit):
            self._submit(command)
            return
        if isinstance(command, TellQueued):
            assert (command.queued.requests == 0) == (command.queued == NOTHING_QUEUED)
            return
        if isinstance(command, TellLearned):
            return
        kept = self.kept.get((command.key, command.attempt))
        if kept is None:
            return
        if isinstance(command, AbortOn):
            kept.aborted = kept.ended = True
        elif isinstance(command, Resend):
            kept.live = True
            again = [
                output
                for output in kept.outputs
                if output.first_position + len(output.token_ids) > command.from_position
                or output.finish
                or output.manifest
            ]
            self.reports.append(again)
        elif isinstance(command, Forget):
            del self.kept[command.key, command.attempt]

    def _submit(self, command: Submit) -> None:
        tokens = list(command.output_token_ids)
        if any(k == command.key and n >= command.attempt for k, n in self.kept):
            return
        for (request, _), kept in self.kept.items():
            if request == command.key:
                kept.aborted = kept.ended = True
        until = (decode_request(command.engine_request).sampling_params or {})["max_tokens"]
        self.kept[command.key, command.attempt] = Kept(command.hand_off, len(tokens), until, tokens)

    def compute(self, most: int) -> None:
        """One engine step: up to `most` tokens for every running attempt."""
        report = []
        for (request, attempt), kept in self.kept.items():
            if kept.ended:
                continue
            count = 1 if kept.hand_off else min(most, kept.until - len(kept.text))
            position = len(kept.text)
            kept.text += [next(self.new_tokens) for _ in range(count)]
            kept.ended = kept.hand_off or len(kept.text) == kept.until
            output = OutputReport(
                request, Attempt(attempt), position,
                tuple(kept.text[position:]), msgspec.msgpack.encode(kept.text),
                Finish.LENGTH if kept.ended and not kept.hand_off else Finish.NOT_FINISHED,
                b"manifest" if kept.hand_off else b"",
            )  # fmt: skip
            kept.outputs.append(output)
            if kept.live:
                report.append(output)
        if report and self.attached:
            self.reports.append(report)
            self.said += report

    def held(self) -> list[HeldAttempt]:
        """What it says when it welcomes a router."""
        for kept in self.kept.values():
            kept.live = False
        return [
            HeldAttempt(
                request, Attempt(attempt), kept.first, len(kept.text), kept.ended, kept.aborted
            )
            for (request, attempt), kept in self.kept.items()
        ]


@dataclass
class Asked:
    """A request as the anchor knows it."""

    prompt_tokens: int
    max_tokens: int
    text: list[int] = field(default_factory=list)
    ended: bool = False


class World:
    """A router core, its workers and its anchor."""

    def __init__(self, make_drive: Callable[[], Drive] = Drive) -> None:
        self._make_drive = make_drive
        self.new_tokens = itertools.count()
        self.workers = {
            name: FakeWorker(name, self.new_tokens) for name in ("p1", "p2", "d1", "d2")
        }
        self.steps = 0
        self.asked: dict[str, Asked] = {}
        self.ends: dict[RequestKey, list[End]] = {}
        self.drive = make_drive()
        self._take_over()

    def _start_router(self) -> None:
        now_s = self.drive.now_s
        self.drive = self._make_drive()
        self.drive.now_s = now_s
        self._take_over()

    def _take_over(self) -> None:
        members = [(n, "prefill" if n[0] == "p" else "decode") for n in self.workers]
        self.obey(self.drive.members(*members))
        underway = [
            RequestRecovered(key(name), self._demand(name), TICKET, len(asked.text))
            for name, asked in self.asked.items()
            if not asked.ended
        ]
        self.obey(self.drive.feed(SnapshotTaken(tuple(underway))))

    def _demand(self, name: str) -> Demand:
        asked = self.asked[name]
        return demand(name, asked.prompt_tokens, max_tokens=asked.max_tokens)

    # What may happen

    def arrive(self, prompt_tokens: int, max_tokens: int) -> None:
        name = f"r{len(self.asked)}"
        self.asked[name] = Asked(prompt_tokens, max_tokens)
        self.obey(self.drive.feed(RequestArrived(key(name), self._demand(name), TICKET)))

    def abort(self, name: str) -> None:
        if not self.asked[name].ended:
            self.asked[name].ended = True
            self.obey(self.drive.feed(EdgeEnded(TICKET, "200", "CD")))
            self.obey(self.drive.feed(RequestAborted(key(name))))

    def attach(self, worker: FakeWorker) -> None:
        if not worker.attached:
            worker.attached = True
            self.obey(self.drive.up(worker.name, worker.incarnation, worker.held()))

    def break_link(self, worker: FakeWorker) -> None:
        if worker.attached:
            self._cut(worker)
            self.obey(self.drive.broken(worker.name, worker.incarnation))

    def _cut(self, worker: FakeWorker) -> None:
        worker.attached = False
        worker.commands.clear()
        worker.reports.clear()

    def kill(self, worker: FakeWorker, noticed: bool) -> None:
        """Another incarnation takes its place; the router may learn of it from that one only."""
        self._cut(worker)
        self.workers[worker.name] = FakeWorker(worker.name, self.new_tokens, worker.incarnation + 1)
        self.obey(self.drive.broken(worker.name, worker.incarnation))
        if noticed:
            self.obey(self.drive.dead(worker.name, worker.incarnation))

    def declare_dead(self, worker: FakeWorker) -> None:
        """It lives, but could not be reached for too long."""
        self.break_link(worker)
        worker.left_alone = True
        self.obey(self.drive.dead(worker.name, worker.incarnation))

    def hear(self, worker: FakeWorker, count: int) -> None:
        for _ in range(min(count, len(worker.commands))):
            worker.hear(worker.commands.popleft())

    def report(self, worker: FakeWorker, count: int, incarnation: int | None = None) -> None:
        for _ in range(min(count, len(worker.reports))):
            outputs = worker.reports.popleft()
            self.feed_step(worker, outputs, worker.incarnation)

    def feed_step(self, worker: FakeWorker, outputs: list[OutputReport], incarnation: int) -> None:
        """With every third report somebody is due at another router, before all that wait here."""
        self.steps += 1
        queued = NOTHING_QUEUED if self.steps % 3 else Queued(1, 0.1, -100.0)
        step = StepReported(
            WorkerId(worker.name),
            incarnation,
            outputs,
            EngineLoad(),
            NOTHING_PLACED,
            queued,  # type: ignore[arg-type]
        )
        self.obey(self.drive.feed(step))

    def repeat_old(self, worker: FakeWorker, index: int, older: bool) -> None:
        """A stale output arrives: said before, or of an attempt that was superseded."""
        if worker.said and worker.attached:
            output = worker.said[index % len(worker.said)]
            if older:
                output = replace(output, attempt=Attempt(output.attempt - 1))
            self.feed_step(worker, [output], worker.incarnation)

    def restart_router(self) -> None:
        for worker in self.workers.values():
            self._cut(worker)
            if worker.left_alone:
                worker.kept.clear()
                worker.said.clear()  # Nothing of it comes over the next router's link.
                worker.left_alone = False
        self._start_router()

    def pass_time(self, seconds: float) -> None:
        self.obey(self.drive.pass_time(seconds))

    # What must hold

    def obey(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Deliver):
                self._give(command)
            elif isinstance(command, Ended):
                self.ends.setdefault(command.key, []).append(command.end)
            elif isinstance(command, ToWorker):
                worker = self.workers[command.worker]
                assert worker.attached, f"{command} to a worker without a link"
                worker.commands.append(command)

    def _give(self, command: Deliver) -> None:
        for delivery in command.deliveries:
            asked = self.asked[delivery.request_id]
            assert not asked.ended, "output after the end"
            assert delivery.first_position == len(asked.text), "a gap or a repetition"
            asked.ended = delivery.finished
            if delivery.payload == error_output(delivery.request_id):
                assert delivery.token_count == 0
                continue
            text = msgspec.msgpack.decode(delivery.payload)
            assert text[: len(asked.text)] == asked.text, "it does not go on from what it was"
            asked.text = text
            assert len(text) == delivery.first_position + delivery.token_count
            assert delivery.finished == (len(text) == asked.max_tokens)

    def settle(self) -> None:
        """Everything works again: all must come to its end, and nothing stay behind."""
        for _ in range(40):
            for name in list(self.workers):
                worker = self.workers[name]
                self.attach(worker)
                self.hear(worker, 1000)
                worker.compute(2)
                self.report(worker, 1000)
                self.hear(worker, 1000)
            self.pass_time(1.1)
        assert all(asked.ended for asked in self.asked.values())
        assert all(len(ends) == 1 for ends in self.ends.values())
        assert self.ends.keys() == {key(name) for name in self.asked}
        assert not self.drive.core.moves.requests
        for known in self.drive.core.pool:
            assert known.reserved_requests == known.reserved_prefill_tokens == 0
            assert not known.live
        for fake in self.workers.values():
            assert not fake.kept, "attempts stay on a worker for ever"
