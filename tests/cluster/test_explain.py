"""`baton explain` and `baton replay`: what they make of what routers tell."""

from __future__ import annotations

import json
import re
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.explain import show
from cluster.replay import replay_file
from cluster.wording import duration, edge_sentence, plain, reason_sentence
from protos.enginecore import ENGINE_TAG
from protos.ids import Incarnation, WorkerId
from router.core.events import (
    EdgeEnded,
    Finish,
    Grounds,
    Outlook,
    PromptUse,
    RequestArrived,
    Role,
    TicketAsked,
    TicketRefused,
    WorkerUp,
)
from router.core.placement import Reason
from router.core.records import RecordBook, TicketStory
from router.live_core import Origin, make_core
from router.recorder import Recorder
from tests.router.core.driving import SETTINGS, TICKET, Drive, demand, key, output
from tests.router.core.test_hindsight import foretold, told_by


def story_of(drive: Drive) -> dict[str, Any]:
    """As it comes over HTTP."""
    return told_of(drive.core.book.find(TICKET))


def told_of(story: TicketStory | None) -> dict[str, Any]:
    assert story is not None
    told: dict[str, Any] = json.loads(json.dumps(story.as_json(1.7e9)))
    return told


def shown(story: dict[str, Any], width: int = 100) -> str:
    written = StringIO()
    show(story, Console(file=written, width=width, soft_wrap=True, highlight=False))
    return written.getvalue()


def rows(text: str, first: str) -> list[list[str]]:
    """Lines that begin with this word, in words."""
    return [words for words in map(str.split, text.splitlines()) if words[:1] == [first]]


@pytest.fixture
def handed_over() -> dict[str, Any]:
    """A request whose times were predicted, on 1 prefill and 2 decode workers."""
    drive = foretold(SETTINGS)
    drive.feed(TicketAsked(TICKET, "POST", "/v1/completions"))
    for worker in ("p", "d1", "d2"):
        drive.up(worker)
    drive.arrive()
    drive.now_s += 0.3
    use = PromptUse(10, computed_tokens=6, cached_tokens=4, transferred_tokens=0)
    drive.step("p", told_by(use, output(1, 0, [1], manifest=b"m")))
    drive.now_s += 0.02
    moved = PromptUse(10, computed_tokens=0, cached_tokens=0, transferred_tokens=10)
    drive.step("d1", told_by(moved, output(2, 1, [2])))
    drive.now_s += 0.05
    drive.step("d1", output(2, 2, [3], finish=Finish.LENGTH))
    drive.feed(EdgeEnded(TICKET, "200", "--"))
    return story_of(drive)


def test_one_that_was_not_let_in() -> None:
    book, asked = RecordBook(100), TicketAsked(TICKET, "POST", "/v1/completions")
    ttft, tpot = Outlook(2.0, 0.3, 2.4, 3.1), Outlook(None, 0.005, 0.0112, 0.0123)
    grounds = Grounds(4000, 120.0, 37.6, 5.25, ttft, tpot)
    book.refuse(100.0, asked, TicketRefused(429, 2, "Its first token would …", TICKET, grounds))
    text = shown(told_of(book.find(TICKET)))
    assert "refused with status 429: Its first token would …" in text
    assert "guessed from its body: 4,000 prompt tokens; expected: 120 output tokens" in text
    assert "to go before it: 38 requests, whose prompts take 5.25 s on one engine" in text
    (row,) = [line.split("  ") for line in text.splitlines() if "time to first token" in line]
    assert [cell.strip() for cell in row if cell.strip()][1:] == ["300 ms", "2.4 s", "3.1 s", "2 s"]
    (row,) = [line.split() for line in text.splitlines() if "per output token" in line]
    assert row[4:] == ["5", "ms", "11.2", "ms", "12.3", "ms", "-"]


def test_one_that_nobody_could_serve() -> None:
    book, asked = RecordBook(100), TicketAsked(TICKET, "POST", "/v1/completions")
    book.refuse(100.0, asked, TicketRefused(503, 5, "No worker can serve it.", TICKET))
    assert "refused with status 503: No worker can serve it." in shown(told_of(book.find(TICKET)))


def test_a_request_that_was_handed_over(handed_over: dict[str, Any]) -> None:
    text = shown(handed_over)
    for line in (
        f"{TICKET}  POST /v1/completions  20",
        "answered with status 200",
        "request 0:a: complete; 10 prompt tokens, 3 output tokens",
        "first token after 300 ms; then one every 35 ms; hand-off took 20 ms; ended after 370 ms",
        "of its prompt 6 tokens computed, 4 cached, 10 transferred",
        "0.000 s  arrived",
        "0.300 s  handing_off: attempt 2 on d1",
        "decision 1, after 0.000 s: prefill on p, decode on d1",
        "Its prompt of 10 tokens is longer than router.local_prefill_max_tokens (4):",
        "3 compared, 3 shown",
    ):
        assert line in text
    assert [" ".join(words) for words in rows(text, "time")] == [
        "time to first token 200 ms 300 ms 1.5",
        "time per output token 50 ms 35 ms 0.7",
    ]
    assert [words[1:3] for words in rows(text, "▸")] == [["prefill", "p"], ["decode", "d1"]]
    (second,) = rows(text, "2")
    assert " ".join(second) == "2 d1 decode 0.300 s 1 0 0 10"


def test_the_tables_fit_a_terminal(handed_over: dict[str, Any]) -> None:
    assert "…" not in shown(handed_over, width=80)


def test_of_many_candidates_the_best_are_shown_and_the_chosen_one(
    handed_over: dict[str, Any],
) -> None:
    (decision,) = handed_over["requests"][0]["decisions"]
    (like,) = [each for each in decision["candidates"] if each["worker"] == "d1"]
    decision["candidates"] = [
        {**like, "role": "prefill", "worker": f"p{number}", "cost": 50.0 - number}
        for number in range(40)
    ] + [{**like, "worker": f"d{number}", "cost": 1.0} for number in range(40)]
    decision["candidates_left_out"] = 200
    decision["prefill"], decision["worker"] = "p39", "d25"
    text = shown(handed_over)
    assert re.findall(r"prefill +(p\d+) ", text) == ["p39", "p38", "p37", "p36", "p35"]
    assert [words[1:3] for words in rows(text, "▸")] == [["prefill", "p39"], ["decode", "d25"]]
    assert "280 compared, 10 shown" in text


def test_what_was_compared_for_the_whole_and_for_its_parts(handed_over: dict[str, Any]) -> None:
    """Policies that predict compare one worker for both with a pair; the order says which is."""
    (decision,) = handed_over["requests"][0]["decisions"]
    prefill, second, third = decision["candidates"]
    decision["candidates"] = [second, third, prefill, second, third]
    text = shown(handed_over)
    assert [words[1:3] for words in rows(text, "▸")] == [["prefill", "p"], ["decode", "d1"]]
    assert rows(text, "whole")[0][1] == "d1"
    decision["prefill"] = None
    assert [words[1:3] for words in rows(shown(handed_over), "▸")] == [["whole", "d1"]]


def test_each_engine_request_of_a_ticket_is_shown() -> None:
    drive = Drive()
    drive.up("d")
    for name in ("a", "b"):
        drive.feed(RequestArrived(key(name), demand(name, 3), TICKET))
    text = shown(story_of(drive))
    assert "the response has not ended; 2 engine requests" in text
    assert "request 0:a: under way; 3 prompt tokens" in text
    assert "request 0:b: under way" in text


def test_a_ticket_whose_request_never_came() -> None:
    drive = Drive()
    drive.up("d")
    drive.feed(TicketAsked(TICKET, "POST", "/v1/chat/completions"))
    drive.feed(EdgeEnded(TICKET, "400", "--"))
    text = shown(story_of(drive))
    assert "answered with status 400" in text
    assert "No request of it has reached the router" in text


def test_a_failure_is_told_with_its_reason() -> None:
    drive = Drive()
    drive.members(("d", "decode"))
    drive.recover(("a", 3))
    drive.dead("d")
    text = shown(story_of(drive))
    assert "request 0:a: failed" in text
    assert "The worker that held it was lost while the router restarted." in text
    assert "Taken over from a router that ended" in text


def test_every_reason_has_a_sentence() -> None:
    for reason in Reason:
        decision = {"reason": reason, "prompt_tokens": 7, "local_prefill_max_tokens": 3}
        sentence = reason_sentence(decision)
        assert not sentence.startswith("Reason:")
        assert "_" not in sentence.replace("local_prefill_max_tokens", "")
        assert sentence.endswith(".")
    assert reason_sentence({"reason": "of_another_version"}) == "Reason: of another version."


def test_how_the_edge_says_it() -> None:
    assert edge_sentence({"status": "200", "termination": "CD"}).endswith(": its client left")
    assert edge_sentence({"status": "200", "termination": "LR"}).endswith("HAProxy says LR")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 ms"), (0.00412, "4.12 ms"), (0.9994, "999 ms"), (1.5, "1.5 s"), (123.4, "123 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers() -> None:
    assert [plain(value) for value in (12345, 3.0, 0.12345)] == ["12,345", "3", "0.123"]


# baton replay


def write_recording(path: Path, *prompts: tuple[int, int]) -> None:
    """Of requests as they were answered, and as the file has them: prompt tokens."""
    origin = Origin(SETTINGS, None, 1)
    drive = Drive()
    drive.core = make_core(origin)
    drive.up("p")
    drive.up("d")
    with closing(Recorder(path, "router-0", origin)) as recorder:
        recorder.record(100.0, worker_up("p"), [])
        recorder.record(100.0, worker_up("d"), [])
        for answered, written in prompts:
            drive.now_s += 1.5
            commands = drive.arrive("a", answered)
            asked = RequestArrived(key("a"), demand("a", written), TICKET)
            recorder.record(drive.now_s, asked, commands)


def worker_up(name: str) -> WorkerUp:
    role = Role.PREFILL if name == "p" else Role.DECODE
    return WorkerUp(WorkerId(name), Incarnation(1), role, ENGINE_TAG, 16, 1000, 1000)


def replayed(path: Path) -> tuple[bool, str]:
    written = StringIO()
    same = replay_file(path, Console(file=written, soft_wrap=True, highlight=False))
    return same, written.getvalue()


def test_a_replay_with_the_same_commands(tmp_path: Path) -> None:
    write_recording(tmp_path / "events", (10, 10))
    same, text = replayed(tmp_path / "events")
    assert same
    assert text == "3 events, all commands identical (1, over 1.5 s of router-0)\n"
    with (tmp_path / "events").open("ab") as file:
        file.write(b"\0\0\1\0half")
    assert "ends within an event" in replayed(tmp_path / "events")[1]


def test_a_replay_that_differs_shows_both_sides(tmp_path: Path) -> None:
    write_recording(tmp_path / "events", (10, 3))
    same, text = replayed(tmp_path / "events")
    assert not same
    first, event, then, now = text.splitlines()
    assert first == "event 3, 1.500 s after the first, is answered otherwise than it was"
    assert event.startswith("  event:    RequestArrived {'key': '0:a',")
    assert then.startswith("  recorded: command 1 of 1: Submit {'worker': 'p',")
    assert now.startswith("  replayed: command 1 of 1: Submit {'worker': 'd',")
    assert " bytes, " in then, "payloads are shown as digests"
