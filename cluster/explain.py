"""`baton explain ID`: what was decided for a request, why, and what came of it, readable.

Boundary: lays out what `GET /cluster/requests/{id}` answers; words and units are `wording`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any, Final, NamedTuple, TypeAlias
from urllib.parse import quote

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.client import ask
from cluster.wording import (
    duration,
    edge_sentence,
    name_of,
    plain,
    reason_sentence,
    value_of,
)

_SHOWN: Final = 10
"""Of the candidates, about."""
_PREDICTED: Final = {
    "ttft_s": "time to first token",
    "tpot_s": "time per output token",
    "output_tokens": "output tokens",
}
Json: TypeAlias = Mapping[str, Any]


def explain(address: str, request_id: str, console: Console, as_json: bool = False) -> None:
    """Ask and print. Raises BatonError if nobody knows the request."""
    story = ask(address, f"/cluster/requests/{quote(request_id, safe='')}")
    if as_json:
        _line(console, json.dumps(story, indent=2))
    else:
        show(story, console)


def show(story: Json, console: Console) -> None:
    """A ticket and each engine request that came with it."""
    asked = datetime.fromtimestamp(story["asked_at"]).astimezone()
    what = " ".join(part for part in (story["method"], story["path"]) if part)
    _line(console, f"{story['id']}  {what or 'without a ticket'}  {asked:%Y-%m-%d %H:%M:%S %Z}")
    if story["refusal"] is not None:
        _show_refusal(story["refusal"], console)
        return
    requests = story["requests"]
    count = "" if len(requests) == 1 else f"; {len(requests)} engine requests"
    _line(console, edge_sentence(story["edge"]) + count)
    if not requests:
        _line(console, "No request of it has reached the router: see how the response ended.")
    for request in requests:
        _line(console, "")
        _show_request(request, console)


def _show_refusal(refusal: Json, console: Console) -> None:
    _line(console, f"refused with status {refusal['status']}: {refusal['message']}")
    grounds = refusal["grounds"]
    if grounds is None:
        return
    _line(
        console,
        f"  guessed from its body: {grounds['prompt_tokens']:,} prompt tokens; expected: "
        f"{grounds['output_tokens']:,.0f} output tokens",
    )
    _line(
        console,
        f"  to go before it: {grounds['requests_before']:,.0f} requests, whose prompts take "
        f"{duration(grounds['work_before_s'])} on one engine",
    )
    table = _table("", "alone", "predicted", "with the margin", "promised")
    for latency in ("ttft", "tpot"):
        seen = grounds[latency]
        values = ("alone_s", "predicted_s", "at_most_s", "promised_s")
        table.add_row(_PREDICTED[f"{latency}_s"], *(value_of(each, seen[each]) for each in values))
    console.print(table)


def _show_request(request: Json, console: Console) -> None:
    end = request["end"] or "under way"
    tokens = f"{request['prompt_tokens']:,} prompt tokens, {request['output_tokens']:,} output"
    _line(console, f"request {request['key']}: {end}; {tokens} tokens")
    if request["error"]:
        _line(console, f"  {request['error']}")
    if request["recovered"]:
        _line(console, "  Taken over from a router that ended: times before that are not known.")
    if request["stripped_arguments"]:
        removed = ", ".join(request["stripped_arguments"])
        _line(console, f"  Engine-internal arguments that were removed: {removed}")
    _line(console, f"  {_got(request['actual'])}")
    _line(console, "")
    for step in request["story"]:
        _line(console, f"  {step['after_s']:9.3f} s  {step['what']}")
    for number, decision in enumerate(request["decisions"], start=1):
        _show_decision(number, decision, console)
    if request["attempts"]:
        _show_attempts(request["attempts"], console)


def _got(actual: Json) -> str:
    """What the client got, and what of its prompt was spared."""
    told = [
        f"{name} {duration(actual[key])}"
        for key, name in (
            ("ttft_s", "first token after"),
            ("tpot_s", "then one every"),
            ("handoff_s", "hand-off took"),
            ("duration_s", "ended after"),
        )
        if actual[key] is not None
    ]
    prompt = actual["prompt"]
    told.append(
        f"of its prompt {prompt['computed_tokens']:,} tokens computed, "
        f"{prompt['cached_tokens']:,} cached, {prompt['transferred_tokens']:,} transferred"
    )
    return "; ".join(told)


def _show_decision(number: int, decision: Json, console: Console) -> None:
    where = f"all of it on {decision['worker']}"
    if decision["prefill"] is not None:
        where = f"prefill on {decision['prefill']}, decode on {decision['worker'] or 'one to come'}"
    _line(console, f"\ndecision {number}, after {decision['after_s']:.3f} s: {where}")
    _line(console, f"  {reason_sentence(decision)}")
    _show_prediction(decision, console)
    _show_candidates(decision, console)


def _show_prediction(decision: Json, console: Console) -> None:
    predicted, measured = decision["predicted"], decision["measured"]
    if predicted is None:
        return
    table = _table("from the decision on", "predicted", "measured", "measured/predicted")
    for key, value in measured.items():
        expected = predicted.get(key)
        if value is None and expected is None:
            continue
        ratio = "-" if value is None or not expected else plain(value / expected)
        table.add_row(_PREDICTED[key], value_of(key, expected), value_of(key, value), ratio)
    console.print(table)


class _Part(NamedTuple):
    """What was compared for one part of a request."""

    name: str
    candidates: Sequence[Json]
    chosen: str | None


def _show_candidates(decision: Json, console: Console) -> None:
    parts = _parts(decision)
    if not parts:
        return
    numbers = [key for key in parts[0].candidates[0] if key not in ("worker", "role")]
    table = _table("", "part", "worker", *map(name_of, numbers))
    shown = 0
    for part in parts:
        best = sorted(part.candidates, key=lambda each: each["cost"])
        best = _best(best, part.chosen, max(3, _SHOWN // len(parts)))
        shown += len(best)
        for each in best:
            mark = "▸" if each["worker"] == part.chosen else ""
            values = [value_of(number, each[number]) for number in numbers]
            table.add_row(mark, part.name, each["worker"], *values)
    compared = len(decision["candidates"]) + decision.get("candidates_left_out", 0)
    console.print(table)
    _line(console, f"  {compared} compared, {shown} shown; the least cost is chosen (▸)")


def _best(candidates: list[Json], chosen: str | None, count: int) -> list[Json]:
    """The first of them, and the chosen one, which chance may have taken of many equals."""
    kept = candidates[:count]
    missing = [each for each in candidates[count:] if each["worker"] == chosen]
    return [*kept[: count - len(missing)], *missing]


def _parts(decision: Json) -> list[_Part]:
    """Candidates come part by part: for the whole request, then for its prefill and its decode."""
    runs = [(role, list(run)) for role, run in groupby(decision["candidates"], _role)]
    if len(runs) == 1:
        name = "decode" if decision["reason"] == "resume" else "whole"
        return [_Part(name, runs[0][1], decision["worker"])]
    parts: list[_Part] = []
    split = decision["prefill"] is not None
    for at, (role, run) in enumerate(runs):
        if role == "prefill":
            parts.append(_Part("prefill", run, decision["prefill"]))
        elif at == 0:
            parts.append(_Part("whole", run, None if split else decision["worker"]))
        else:
            parts.append(_Part("decode", run, decision["worker"] if split else None))
    return parts


def _role(candidate: Json) -> str:
    role: str = candidate["role"]
    return role


def _show_attempts(attempts: Sequence[Json], console: Console) -> None:
    table = _table(
        "", "worker", "pool", "after", "output\nso far", "computed", "cached", "transferred"
    )
    for attempt in attempts:
        use = attempt["prompt_use"] or {}
        table.add_row(
            str(attempt["attempt"]),
            attempt["worker"],
            attempt["role"],
            f"{attempt['after_s']:.3f} s",
            f"{attempt['injected_tokens']:,}",
            *(
                value_of("", use.get(f"{how}_tokens"))
                for how in ("computed", "cached", "transferred")
            ),
        )
    _line(console, "\nattempts, and how each came by the prompt's tokens:")
    console.print(table)


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, emoji=False)
