"""What the supervisor knows: members, and those that are none any more."""

from __future__ import annotations

from cluster.config import Config
from cluster.news import NewsLog
from cluster.state import ClusterState, SupervisorSettings
from engine.spec import WorkerAddress
from protos.ids import Incarnation, WorkerId
from protos.membership import Gone


def make_state() -> ClusterState:
    return ClusterState(
        SupervisorSettings(
            config=Config(),
            model="/model",
            served_names=["model"],
            link_token="",
            run_directory="/run",
            admin_socket="/run/admin.sock",
        )
    )


def make_address(name: str, incarnation: int = 1) -> WorkerAddress:
    return WorkerAddress(
        worker_id=WorkerId(name),
        incarnation=Incarnation(incarnation),
        role="decode",
        address="127.0.0.1:1",
        node="here",
        pid=1,
        engine_pid=None,
        weights="",
    )


def test_who_is_expelled_is_told_with_the_reason_for_it() -> None:
    state = make_state()
    state.admit(make_address("decode-0", 5))
    state.admit(make_address("decode-1", 6))
    before = state.membership()
    assert [member.worker_id for member in before.members] == ["decode-0", "decode-1"]
    assert before.gone == []
    state.expel(WorkerId("decode-0"), "it hung")
    after = state.membership()
    assert after.version > before.version
    assert [member.worker_id for member in after.members] == ["decode-1"]
    assert after.gone == [Gone("decode-0", 5, "it hung")]
    assert state.address(WorkerId("decode-0")) is None


def test_who_was_no_member_changes_nothing() -> None:
    state = make_state()
    before = state.membership()
    state.expel(WorkerId("decode-9"), "it never started")
    assert state.membership() == before


def test_only_the_last_that_are_gone_are_told() -> None:
    state = make_state()
    for number in range(150):
        state.admit(make_address(f"decode-{number}"))
        state.expel(WorkerId(f"decode-{number}"), "killed")
    gone = [each.worker_id for each in state.membership().gone]
    assert gone == [f"decode-{number}" for number in range(50, 150)]


def test_news_are_told_once_to_whoever_remembers_their_number() -> None:
    log = NewsLog()
    log.add("decode-0", "starting", "", 0.0, fatal=False)
    log.add("decode-0", "ready", "", 2.5, fatal=False)
    assert [news.kind for news in log.after(0)] == ["starting", "ready"]
    assert [news.number for news in log.after(1)] == [2]
    assert log.after(2) == []
