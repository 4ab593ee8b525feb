"""Recorded events, replayed: the same commands; and what is said where they are others."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from engine.spec import EngineTimes, PoolTimes, SimulatedTiming
from kvstore.index_feed import CacheChange, CacheSnapshot
from protos.anchor_link import LENGTH
from protos.ids import Incarnation, WorkerId
from router.core.events import (
    AskCache,
    CacheReported,
    Command,
    Event,
    RequestArrived,
    SnapshotTaken,
    Submit,
    Tick,
)
from router.live_core import Origin, make_core
from router.recorder import Recorder
from router.recording import FORMAT, Entry, Recording, RecordingError
from router.replay import replay
from router.settings import JointSettings
from tests.router.core.driving import SETTINGS, TICKET, Drive, demand, key
from tests.router.core.test_histories import walk
from tests.router.running_router import Unit, until

ENGINE = EngineTimes(SimulatedTiming(), max_step_tokens=2048)
JOINT = JointSettings(ttft_slo_s=1.0, tpot_slo_s=0.05, engines=PoolTimes(ENGINE, ENGINE))


def seeded(tie_break_seed: int, joint: JointSettings | None = None) -> Origin:
    return Origin(SETTINGS, joint, tie_break_seed)


ORIGIN = seeded(5)


class Recorded(Drive):
    """A core as a live router makes it, all of whose events are recorded."""

    def __init__(self, recorder: Recorder, origin: Origin = ORIGIN) -> None:
        super().__init__(origin.settings)
        self.core = make_core(origin)
        self._recorder = recorder

    def feed(self, event: Event) -> list[Command]:
        commands = super().feed(event)
        self._recorder.record(self.now_s, event, commands)
        return commands


def record(path: Path, entries: Sequence[Entry], origin: Origin = ORIGIN) -> None:
    with closing(Recorder(path, "r", origin)) as recorder:
        for entry in entries:
            recorder.record(*entry)


def short_run(path: Path) -> list[Entry]:
    """Three requests come to two workers of each pool."""
    with closing(Recorder(path, "r", ORIGIN)) as recorder:
        drive = Recorded(recorder)
        for name in ("p1", "p2", "d1", "d2"):
            drive.up(name)
        for name in ("a", "b", "c"):
            drive.arrive(name)
        drive.pass_time(1.0)
    return list(Recording(path))


@pytest.mark.parametrize("joint", [None, JOINT])
@pytest.mark.parametrize("seed", range(8))
def test_histories_replay_to_the_same_commands(
    tmp_path: Path, seed: int, joint: JointSettings | None
) -> None:
    """Each restart of the router begins another recording."""
    recorders: list[Recorder] = []

    def make_drive() -> Drive:
        path = tmp_path / str(len(recorders))
        origin = seeded(len(recorders), joint)
        recorders.append(Recorder(path, "r", origin))
        return Recorded(recorders[-1], origin)

    walk(seed, make_drive=make_drive)
    events = 0
    for number, recorder in enumerate(recorders):
        recorder.close()
        replayed = replay(Recording(tmp_path / str(number)))
        assert replayed.difference is None
        events += replayed.events
    assert events > 100


def test_what_caches_hold_is_recorded_too(tmp_path: Path) -> None:
    path = tmp_path / "events"
    with closing(Recorder(path, "r", ORIGIN)) as recorder:
        drive = Recorded(recorder)
        drive.up("d1")
        worker, incarnation = WorkerId("d1"), Incarnation(1)
        for report in (
            CacheSnapshot(7, [b"one", b"two"]),
            CacheChange(8, removed=[b"one"], stored=[b"three"]),
            CacheChange(10),
        ):
            drive.feed(CacheReported(worker, incarnation, report))
    *_, snapshot, change, gap = Recording(path)
    assert snapshot.event.report == CacheSnapshot(7, [b"one", b"two"])
    assert change.event.report.stored == [b"three"]
    assert gap.commands == [AskCache(worker)]
    assert replay(Recording(path)).difference is None


def test_another_event_is_answered_otherwise(tmp_path: Path) -> None:
    entries = short_run(tmp_path / "events")
    assert replay(Recording(tmp_path / "events")).events == len(entries) == 8
    shorter = RequestArrived(key("b"), demand("b", prompt_tokens=3), TICKET)
    entries[5] = entries[5]._replace(event=shorter)
    record(tmp_path / "changed", entries)
    difference = replay(Recording(tmp_path / "changed")).difference
    assert difference is not None
    assert difference.number == 6
    assert isinstance(difference.event, RequestArrived)
    assert difference.event.demand.shape.prompt_tokens == 3
    (then,), (now,) = difference.recorded or (), difference.replayed
    assert isinstance(then, Submit)
    assert isinstance(now, Submit)
    assert (then.hand_off, now.hand_off) == (True, False)


def test_another_seed_of_ties_is_found_out(tmp_path: Path) -> None:
    """Where nothing else differs: so a recording must hold it."""
    entries = short_run(tmp_path / "events")
    found = []
    for seed in range(8):
        record(tmp_path / str(seed), entries, seeded(seed))
        found.append(replay(Recording(tmp_path / str(seed))).difference)
    assert found[ORIGIN.tie_break_seed] is None
    assert any(difference is not None for difference in found)


def test_an_event_that_the_core_could_not_take(tmp_path: Path) -> None:
    """It is the last that a router records; the replay fails in the same way."""
    (first, *_) = short_run(tmp_path / "events")
    recovered = Entry(first.now_s, SnapshotTaken(()), None)
    record(tmp_path / "failed", [first, recovered])
    with pytest.raises(AssertionError, match="before the snapshot"):
        replay(Recording(tmp_path / "failed"))
    record(tmp_path / "went well", [first, Entry(first.now_s, Tick(), None)])
    difference = replay(Recording(tmp_path / "went well")).difference
    assert difference is not None
    assert (difference.recorded, difference.replayed) == (None, [])


# Files


def test_only_its_user_may_read_it_and_nothing_is_overwritten(tmp_path: Path) -> None:
    short_run(tmp_path / "events")
    assert stat.S_IMODE((tmp_path / "events").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        Recorder(tmp_path / "events", "r", ORIGIN)


def test_a_full_file_holds_the_first_events(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Recorder(tmp_path / "events", "r", ORIGIN, limit_bytes=20_000)) as recorder:
        drive = Recorded(recorder)
        for _ in range(100):
            for _ in range(10):
                drive.pass_time(0.1)
            recorder.flush()
    assert (tmp_path / "events").stat().st_size <= 20_000
    replayed = replay(Recording(tmp_path / "events"))
    assert replayed.difference is None
    assert 500 < replayed.events < 1000
    (record,) = caplog.records
    assert "as long as it may get" in record.message


def test_a_full_disk_ends_the_recording_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", lambda *_: full)
        recorder = Recorder(tmp_path / "events", "r", ORIGIN)
    drive = Recorded(recorder)
    drive.pass_time(0.1)
    recorder.close()
    drive.pass_time(0.1)
    assert "No space left" in caplog.text


def test_a_file_that_was_cut_is_replayed_up_to_there(tmp_path: Path) -> None:
    entries = short_run(tmp_path / "events")
    content = (tmp_path / "events").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-3])
    recording = Recording(tmp_path / "cut")
    assert replay(recording).events == len(entries) - 1
    assert recording.was_cut


def message(*values: object) -> bytes:
    body = msgspec.msgpack.encode(values)
    return LENGTH.pack(len(body)) + body


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is no recording"),
        (b"# Baton, a text", "is no recording"),
        (message("something else", 1), "is no recording"),
        (message("baton recording"), "is no recording"),
        (message("baton recording", FORMAT, "r", {}), "is no recording"),
        (
            message("baton recording", 99, "r", {}),
            f"has format 99, this version of Baton reads {FORMAT}",
        ),
    ],
)
def test_what_is_no_recording(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=problem):
        Recording(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="can't be read: No such file"):
        Recording(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (message(1.0, "Sneeze", {}, []), "event 9 of .* by this version of Baton: 'Sneeze'"),
        (message(1.0, "FrontGone", {}, []), "missing required field `front`"),
        (b"\xff" * 8, "is damaged after event 8"),
    ],
)
def test_an_event_that_is_not_understood(tmp_path: Path, content: bytes, problem: str) -> None:
    short_run(tmp_path / "events")
    with (tmp_path / "events").open("ab") as file:
        file.write(content)
    with pytest.raises(RecordingError, match=problem):
        replay(Recording(tmp_path / "events"))


# A router process

ALL_KINDS = {"SnapshotTaken", "WorkerUp", "RequestArrived", "StepReported"}


def kinds(path: Path) -> set[str]:
    """Names of the events that it holds."""
    return {type(entry.event).__name__ for entry in Recording(path)}


@pytest.mark.parametrize("joint", [None, JOINT])
async def test_a_router_process_records_what_replays(
    tmp_path: Path, joint: JointSettings | None
) -> None:
    """With hand-offs, aborts, a lost worker, and a router that is killed and starts anew."""
    directory = tmp_path / "recorded"
    directory.mkdir()
    (tmp_path / "unit").mkdir()
    unit = Unit(tmp_path / "unit", 20, record_events=directory, joint=joint)
    try:
        await unit.start("p0", "p1", "d0", "d1")
        requests = [unit.request(length, max_tokens=200) for length in (1, 10, 40, 100, 300, 70)]
        streams = [unit.anchor.ask(request) for request in requests]
        for stream in streams:
            await stream.begun(3)
        unit.anchor.abort(requests[2].request_id)
        unit.kill_worker("d1")
        # Those that came before may all have been there.
        stays = unit.anchor.ask(unit.request(70, max_tokens=200))
        await stays.begun(3)
        # A router that is killed takes with it what it has not written yet.
        (first,) = directory.iterdir()
        await until(lambda: kinds(first) >= ALL_KINDS)
        unit.kill_router()
        unit.start_router()
        await unit.anchor.greeted(2)
        late = unit.anchor.ask(unit.request(50, max_tokens=5))
        assert len(await late.whole()) == 5
        assert unit.kill_router(signal.SIGTERM) == 0
    finally:
        unit.close()
    first, second = sorted(directory.iterdir())
    for path in (first, second):
        replayed = replay(Recording(path))
        assert replayed.difference is None
        assert kinds(path) >= ALL_KINDS
    recovered = [e.event for e in Recording(second) if isinstance(e.event, SnapshotTaken)]
    assert recovered[0].underway
    assert not Recording(second).was_cut


async def test_a_router_that_can_not_record_serves(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    unit = Unit(tmp_path, record_events=tmp_path / "nowhere")
    try:
        await unit.start("p0", "d0")
        assert len(await unit.anchor.ask(unit.request(40, max_tokens=5)).whole()) == 5
    finally:
        unit.close()
    assert "no events are recorded" in capfd.readouterr().err
