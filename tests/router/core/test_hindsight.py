"""What became of decisions: measured from each, and held against what it predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from protos.ids import RequestKey
from router.core.events import End, Ended, Finish, OutputReport, PromptUse, Shape
from router.core.moves import CoreSettings
from router.core.placement import Decision, LeastPredictedWork, Predicted, View
from tests.router.core.driving import SETTINGS, TICKET, Drive, output, records

TTFT_S, TPOT_S = 0.2, 0.05
"""What every decision predicts."""


class Foretelling(LeastPredictedWork):
    """Predicts the same of each request."""

    def place(self, now_s: float, view: View, key: RequestKey, shape: Shape) -> Decision | None:
        decision = super().place(now_s, view, key, shape)
        if decision is None:
            return None
        first_s = None if shape.output_tokens else TTFT_S
        return replace(decision, predicted=Predicted(first_s, TPOT_S))


@pytest.fixture
def drive() -> Drive:
    return foretold(SETTINGS)


def foretold(settings: CoreSettings) -> Drive:
    drive = Drive(settings, Foretelling(lambda n: 0))
    drive.members(("p", "prefill"), ("d1", "decode"), ("d2", "decode"))
    drive.recover()
    return drive


def told(drive: Drive) -> dict[str, Any]:
    story = drive.core.book.find(TICKET)
    assert story is not None
    (request,) = story.as_json(0.0)["requests"]
    answer: dict[str, Any] = request
    return answer


def about(**values: float | None) -> dict[str, Any]:
    return {
        name: None if value is None else pytest.approx(value, abs=1e-9)
        for name, value in values.items()
    }


def ended(commands: list[Any]) -> Ended:
    (end,) = [command for command in commands if isinstance(command, Ended)]
    return end


def told_by(use: PromptUse, report: OutputReport) -> OutputReport:
    return msgspec.structs.replace(report, prompt_use=use)


def test_a_handed_over_request_beside_its_prediction(drive: Drive) -> None:
    drive.up("p")
    drive.up("d1")
    drive.arrive()
    use = PromptUse(10, computed_tokens=6, cached_tokens=4, transferred_tokens=0)
    drive.now_s += 0.3
    drive.step("p", told_by(use, output(1, 0, [1], manifest=b"m")))
    drive.now_s += 0.02
    moved = PromptUse(10, computed_tokens=0, cached_tokens=0, transferred_tokens=10)
    drive.step("d1", told_by(moved, output(2, 1, [2])))
    drive.now_s += 0.05
    end = ended(drive.step("d1", output(2, 2, [3], finish=Finish.LENGTH)))
    assert end.ttft_to_predicted == pytest.approx(1.5)
    assert end.tpot_to_predicted == pytest.approx(0.7)
    request = told(drive)
    (decision,) = request["decisions"]
    assert decision["after_s"] == 0
    assert decision["predicted"] == {"ttft_s": TTFT_S, "tpot_s": TPOT_S}
    assert decision["measured"] == about(ttft_s=0.3, tpot_s=0.035, output_tokens=3)
    assert decision["measured_to_predicted"] == about(ttft=1.5, tpot=0.7)
    actual = request["actual"]
    assert actual.pop("prompt") == {
        "computed_tokens": 6,
        "cached_tokens": 4,
        "transferred_tokens": 10,
    }
    assert actual == about(
        ttft_s=0.3, tpot_s=0.035, duration_s=0.37, handoff_s=0.02, output_tokens=3
    )


def test_a_wait_for_a_worker_is_not_the_decisions(drive: Drive) -> None:
    drive.arrive()
    drive.now_s += 3.0
    drive.up("d1")
    drive.now_s += 0.4
    drive.step("d1", output(1, 0, [1]))
    request = told(drive)
    (decision,) = request["decisions"]
    assert decision["after_s"] == 3.0
    assert decision["measured"] == about(ttft_s=0.4, tpot_s=None, output_tokens=None)
    assert request["actual"]["ttft_s"] == pytest.approx(3.4)


def test_a_request_placed_anew_before_its_first_token(drive: Drive) -> None:
    drive.up("d1")
    drive.arrive()
    drive.now_s += 1.0
    drive.up("d2")
    drive.dead("d1")
    drive.now_s += 0.1
    drive.step("d2", output(2, 0, [1]))
    drive.now_s += 0.1
    end = ended(drive.step("d2", output(2, 1, [2], finish=Finish.STOP)))
    lost, kept = told(drive)["decisions"]
    assert lost["measured"] == about(ttft_s=None, tpot_s=None, output_tokens=None)
    assert lost["measured_to_predicted"] == {"ttft": None, "tpot": None}
    assert kept["measured"] == about(ttft_s=0.1, tpot_s=0.1, output_tokens=2)
    assert (end.ttft_to_predicted, end.tpot_to_predicted) == (
        pytest.approx(0.5),
        pytest.approx(2.0),
    )


def test_a_stream_that_goes_on_elsewhere() -> None:
    drive = foretold(replace(SETTINGS, resume_streams=True))
    drive.up("d1")
    drive.arrive()
    drive.now_s += 0.1
    drive.step("d1", output(1, 0, [1, 2]))
    drive.now_s += 1.0
    drive.up("d2")
    drive.dead("d1")
    drive.now_s += 0.2
    end = ended(drive.step("d2", output(2, 2, [3, 4], finish=Finish.LENGTH)))
    first, second = told(drive)["decisions"]
    assert first["measured"] == about(ttft_s=0.1, tpot_s=None, output_tokens=None)
    assert second["predicted"] == {"ttft_s": None, "tpot_s": TPOT_S}
    assert second["measured"] == about(ttft_s=None, tpot_s=0.1, output_tokens=2)
    assert end.ttft_to_predicted == pytest.approx(0.5)
    assert end.tpot_to_predicted == pytest.approx(2.0)


def test_nothing_is_compared_where_nothing_was_predicted() -> None:
    drive = Drive()
    drive.up("d1")
    drive.arrive(prompt_tokens=4)
    drive.now_s += 0.1
    end = ended(drive.step("d1", output(1, 0, [1], finish=Finish.LENGTH)))
    assert (end.ttft_to_predicted, end.tpot_to_predicted) == (None, None)
    (decision,) = told(drive)["decisions"]
    assert decision["predicted"] is None
    assert decision["measured"] == about(ttft_s=0.1, tpot_s=None, output_tokens=1)


def test_of_a_request_that_was_taken_over_no_times_are_told() -> None:
    drive = Drive(placement=Foretelling(lambda n: 0))
    drive.members(("d1", "decode"))
    drive.recover(("a", 0))
    drive.up("d1")
    drive.now_s += 0.1
    end = ended(drive.step("d1", output(1001, 0, [1], finish=Finish.LENGTH)))
    assert end.end is End.COMPLETE
    assert end.ttft_to_predicted is None
    (record,) = records(drive)
    assert (record.ttft_s, record.tpot_s, record.duration_s) == (None, None, None)
