"""The book of stories: what is kept, whatever is under way."""

from __future__ import annotations

from protos.ids import RequestKey, TicketId
from router.core.events import NO_TERMS, End
from router.core.records import Record, RecordBook


def test_many_under_way_stay_and_those_that_are_over_still_make_room() -> None:
    book = RecordBook(kept=10)
    names = [f"0:{number}" for number in range(1100)]
    for name in names:
        record = Record(RequestKey(name), 0.0, prompt_tokens=1, max_tokens=1)
        book.add(TicketId(name), record, NO_TERMS)
        if name not in names[:100]:
            record.end = End.COMPLETE
    kept = [name for name in names if book.find(name)]
    assert kept[:100] == names[:100]
    assert len(kept) <= 2 * 100 + 10
