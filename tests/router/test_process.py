"""The router process, live: a real one between an anchor and workers with simulated engines."""

from __future__ import annotations

import asyncio
import itertools
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from protos import enginecore
from protos.enginecore import EngineRequest
from router.settings import SharePrefixes
from router.ticket_mint import TicketMint
from tests.router.running_router import ROOT, TOKEN, Unit, expected, loaded_libraries, until


@pytest.fixture
async def unit(tmp_path: Path) -> AsyncIterator[Unit]:
    unit = Unit(tmp_path)
    try:
        await unit.start("p0", "d0")
        yield unit
    finally:
        unit.close()


async def ask_ticket(unit: Unit, line: str) -> str:
    reader, writer = await asyncio.open_unix_connection(str(unit.paths.ticket_socket))
    writer.write(line.encode())
    answer = await reader.readline()
    writer.close()
    return answer.decode()


async def test_handed_off_outputs_are_exact(unit: Unit) -> None:
    requests = [unit.request(length, max_tokens=12) for length in (1, 15, 16, 17, 100, 300)]
    streams = [unit.anchor.ask(request) for request in requests]
    for request, stream in zip(requests, streams, strict=True):
        assert await stream.whole() == await expected(request)
        assert stream.finish == enginecore.FINISH_LENGTH
    _, state = await unit.get("/state")
    assert state["counts"]["handoffs"] == len(requests)
    assert state["counts"]["fenced_outputs"] == state["counts"]["resends"] == 0
    assert state["under_way"] == {}
    await unit.idle()


async def test_a_record_tells_what_happened(unit: Unit) -> None:
    ticket = (await ask_ticket(unit, "v1\tPOST\t/v1/completions\tcontent-length=9\n")).split()[1]
    request = unit.request(40, ticket, max_tokens=3)
    await unit.anchor.ask(request).whole()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as log:
        log.connect(str(unit.paths.edge_log_socket))
        log.send(f"v1\tticket={ticket}\tstatus=200\tend=--\trequest_".encode())
        log.send(b"bytes=9\nnothing that could be read\n")
    await asyncio.sleep(0.05)
    for name in (ticket, f"cmpl-{ticket}", f"chatcmpl-{ticket}-0"):
        status, told = await unit.get(f"/requests/{name}")
        assert (status, told["id"], told["path"]) == (200, ticket, "/v1/completions")
    assert told["edge"] == {"status": "200", "termination": "--"}
    (record,) = told["requests"]
    assert record["end"] == "complete"
    assert record["output_tokens"] == 3
    first, second = record["attempts"]
    assert (first["worker"], second["worker"]) == ("p0", "d0")
    assert first["prompt_use"]["computed_tokens"] == 40
    assert second["prompt_use"]["computed_tokens"] <= 1
    assert (await unit.get("/requests/unknown"))[0] == 404
    assert "baton_unread_edge_lines_total 1.0" in (await unit.get("/metrics"))[1]


async def link_bytes(unit: Unit) -> dict[tuple[str, str], float]:
    text = (await unit.get("/metrics"))[1]
    found = re.findall(
        r'^baton_link_bytes_total{direction="(\w+)",link="([\w-]+)"} (\S+)$', text, re.MULTILINE
    )
    return {(link, direction): float(count) for direction, link, count in found}


async def test_a_prompt_crosses_each_link_once_for_each_engine_that_needs_it(unit: Unit) -> None:
    request = unit.request(1500, max_tokens=2)
    payload_bytes = len(enginecore.encode(request))
    before = await link_bytes(unit)
    await unit.anchor.ask(request).whole()
    after = await link_bytes(unit)

    def added(link: str) -> float:
        return after[link, "requests"] - before.get((link, "requests"), 0.0)

    assert payload_bytes <= added("anchor-router") < 1.5 * payload_bytes
    # It is handed over: a prefill and a decode worker need its tokens.
    assert 2 * payload_bytes <= added("router-worker") < 2.5 * payload_bytes


async def test_the_edge_tells_the_bytes_of_its_clients(unit: Unit) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as log:
        log.connect(str(unit.paths.edge_log_socket))
        log.send(b"v1\tticket=T1\tstatus=200\trequest_bytes=70\tresponse_bytes=-1\n")
        log.send(b"v1\tticket=T2\tstatus=200\trequest_bytes=7\tresponse_bytes=5\n")
        async with asyncio.timeout(10):
            while (told := await link_bytes(unit)).get(("client-edge", "responses")) != 5.0:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert told["client-edge", "requests"] == 77.0


async def test_health_metrics_and_workers(unit: Unit) -> None:
    await unit.anchor.ask(unit.request(40, max_tokens=4)).whole()
    status, workers = await unit.get("/workers")
    assert status == 200
    assert {(w["id"], w["role"], w["state"]) for w in workers["workers"]} == {
        ("p0", "prefill", "serving"),
        ("d0", "decode", "serving"),
    }
    await asyncio.sleep(1.2)
    _, metrics = await unit.get("/metrics")
    for line in (
        'baton_requests_total{end="complete"} 1.0',
        'baton_decisions_total{reason="long_prompt"} 1.0',
        "baton_handoffs_total 1.0",
        'vllm:time_to_first_token_seconds_count{model_name="tiny"} 1.0',
        'vllm:num_requests_running{role="decode",worker="d0"} 0.0',
        'baton_worker_up{role="prefill",worker="p0"} 1.0',
    ):
        assert line in metrics
    unit.kill_worker("p0")
    await asyncio.sleep(0.5)
    status, health = await unit.get("/health")
    assert (status, health["reasons"]) == (503, ["no prefill worker is up"])


async def test_workers_with_other_weights_wait_for_the_end_of_those_served(
    unit: Unit, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for worker in ("p1", "d1"):
        unit.start_worker(worker, model=str(model))
    unit.tell_members()
    await unit.sees(4)

    async def states() -> dict[str, str]:
        _, answer = await unit.get("/workers")
        return {worker["id"]: worker["state"].partition(":")[0] for worker in answer["workers"]}

    async def used_by(request: EngineRequest) -> set[str]:
        await unit.anchor.ask(request).whole()
        _, answer = await unit.get(f"/requests/{request.external_req_id}")
        return {each["worker"] for each in answer["requests"][0]["attempts"]}

    assert await states() == {
        "p0": "serving", "d0": "serving", "p1": "unusable", "d1": "unusable",
    }  # fmt: skip
    for _ in range(4):
        assert await used_by(unit.request(300)) == {"p0", "d0"}
    for worker in ("p0", "d0"):
        unit.bury_worker(worker, "redeployed")
    await unit.sees(2)
    assert await states() == {"p1": "serving", "d1": "serving"}
    assert await used_by(unit.request(300)) == {"p1", "d1"}


@pytest.mark.parametrize("share_prefixes", ["cluster", "tenant"])
async def test_tenants_share_prefixes_if_they_may(
    tmp_path: Path, share_prefixes: SharePrefixes
) -> None:
    """Also with a router that did not give the ticket."""
    unit = Unit(tmp_path, local_prefill_max_tokens=2048, share_prefixes=share_prefixes)
    try:
        await unit.start("d0", "p0")
        prompt = list(range(300))

        async def cached(key: str, salt: str | None = None, outlives_router: bool = False) -> int:
            question = f"v1\tPOST\t/v1/completions\tauthorization=Bearer {key}\n"
            request = unit.request(1, (await ask_ticket(unit, question)).split()[1], max_tokens=2)
            request.prompt_token_ids, request.cache_salt = prompt, salt
            if outlives_router:
                before = unit.anchor.hellos
                unit.kill_router()
                unit.start_router()
                await unit.anchor.greeted(before + 1)
                await unit.healthy()
            await unit.anchor.ask(request).whole()
            _, answer = await unit.get(f"/requests/{request.external_req_id}")
            tokens: int = answer["requests"][0]["actual"]["prompt"]["cached_tokens"]
            return tokens

        shared = 288 if share_prefixes == "cluster" else 0  # Of blocks of 16 tokens.
        assert await cached("one") == 0
        assert await cached("one") == 288
        assert await cached("other") == shared
        assert await cached("one", "secret") == 0
        assert await cached("one", "secret") == 288
        assert await cached("other", "secret") == shared
        assert await cached("one", outlives_router=True) == 288
        assert await cached("third", outlives_router=True) == shared
    finally:
        unit.close()


async def indexed(unit: Unit) -> dict[str, int]:
    _, answer = await unit.get("/workers")
    return {worker["id"]: worker["kv_index_blocks"] for worker in answer["workers"]}


async def until_indexed(unit: Unit, wanted: dict[str, int]) -> None:
    async with asyncio.timeout(5):
        while await indexed(unit) != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_the_index_knows_what_workers_hold_and_so_does_the_next_router(unit: Unit) -> None:
    await unit.anchor.ask(unit.request(700, max_tokens=4)).whole()
    await until_indexed(unit, {"p0": 5, "d0": 5})
    _, metrics = await unit.get("/metrics")
    for line in (
        'baton_kv_index_blocks{worker="p0"} 5.0',
        "baton_kv_index_entries 5.0",
        "baton_kv_index_snapshots_total 2.0",
        "baton_kv_index_changes_total 2.0",
        "baton_kv_index_gaps_total 0.0",
        "baton_kv_index_left_out_total 0.0",
    ):
        assert line in metrics
    unit.kill_router()
    unit.start_router()
    await unit.healthy()
    await until_indexed(unit, {"p0": 5, "d0": 5})
    unit.kill_worker("p0")
    await until_indexed(unit, {"d0": 5})


async def test_fronts_are_told_and_answered(unit: Unit) -> None:
    assert unit.anchor.ready[0].max_model_len == 2048
    for call_id, method in enumerate(("get_supported_tasks", "reset_mm_cache", "start_profile")):
        call = enginecore.UtilityCall(0, call_id, method, [])
        unit.anchor.utility(enginecore.encode(call))
    await until(lambda: len(unit.anchor.replies) == 3)
    answers = [msgspec.msgpack.decode(reply)[4] for reply in unit.anchor.replies]
    assert answers[0] == [0, None, [None, ["generate"]]]
    assert answers[1] == [1, None, [None, None]]
    assert answers[2][1].startswith("start_profile is not offered")


async def test_tickets_are_needed_and_can_not_be_forged(unit: Unit) -> None:
    assert (await ask_ticket(unit, "v9\n")).startswith("500\t-\t")
    forged = TicketMint("another token", 60.0).issue(time.time())
    expired = TicketMint(TOKEN, 60.0).issue(time.time() - 1000)
    for ticket in (forged, expired):
        stream = unit.anchor.ask(unit.request(5, ticket))
        assert await stream.whole() == []
        assert stream.finish == enginecore.FINISH_ERROR


async def test_aborts_free_both_workers(unit: Unit) -> None:
    requests = [unit.request(200, max_tokens=500) for _ in range(8)]
    streams = [unit.anchor.ask(request) for request in requests]
    for delay, request in enumerate(requests):
        await streams[delay].begun(1 if delay % 2 else 0)
        unit.anchor.abort(request.request_id)
        await asyncio.sleep(0.003 * delay)
    await unit.idle()
    _, state = await unit.get("/state")
    assert state["under_way"] == {}


async def test_a_killed_decode_worker_ends_its_streams_with_an_error(unit: Unit) -> None:
    unit.start_worker("d1")
    unit.tell_members()
    await unit.sees(3)
    requests = [unit.request(60, max_tokens=300) for _ in range(8)]
    streams = [unit.anchor.ask(request) for request in requests]
    for stream in streams:
        await stream.begun(5)
    killed_s = time.monotonic()
    unit.kill_worker("d0")
    finishes = []
    for request, stream in zip(requests, streams, strict=True):
        tokens, reference = await stream.whole(), await expected(request)
        finishes.append(stream.finish)
        assert tokens == reference[: len(tokens)]
        if stream.finish == enginecore.FINISH_ERROR:
            assert stream.times_s[-1] - killed_s < 1.0
        else:
            assert tokens == reference
    assert finishes.count(enginecore.FINISH_ERROR) == 4
    again = unit.request(60)
    assert await unit.anchor.ask(again).whole() == await expected(again)


async def test_a_killed_prefill_worker_fails_nothing(unit: Unit) -> None:
    unit.start_worker("p1")
    unit.tell_members()
    await unit.sees(3)
    requests = [unit.request(1500, max_tokens=5) for _ in range(12)]
    streams = [unit.anchor.ask(request) for request in requests]
    await asyncio.sleep(0.02)
    unit.kill_worker("p0")
    for request, stream in zip(requests, streams, strict=True):
        assert await stream.whole() == await expected(request)


@pytest.mark.parametrize("why", ["the engine of d0 hung: no step for 9 s", ""])
async def test_what_was_lost_with_a_buried_worker_says_why_it_was_buried(
    unit: Unit, why: str
) -> None:
    """The supervisor may know of its end, and why, before its link says anything."""
    ticket = (await ask_ticket(unit, "v1\tPOST\t/v1/completions\n")).split()[1]
    stream = unit.anchor.ask(unit.request(60, ticket, max_tokens=500))
    await stream.begun(5)
    unit.bury_worker("d0", why)
    await stream.whole()
    assert stream.finish == enginecore.FINISH_ERROR
    _, told = await unit.get(f"/requests/{ticket}")
    assert told["requests"][0]["error"].endswith(
        f"d0 is gone: {why or 'the membership no longer has it'}."
    )


async def test_streams_survive_the_router(unit: Unit) -> None:
    requests = [unit.request(50 + n, max_tokens=500) for n in range(8)]
    streams = [unit.anchor.ask(request) for request in requests]
    for kill in range(3):
        before = unit.anchor.hellos
        await streams[0].begun(20 + kill * 20)
        unit.kill_router()
        late = unit.request(30, max_tokens=400)
        requests.append(late)
        streams.append(unit.anchor.ask(late))
        unit.start_router()
        await unit.anchor.greeted(before + 1)
    for request, stream in zip(requests, streams, strict=True):
        assert await stream.whole() == await expected(request)
    gaps = [later - earlier for s in streams for earlier, later in itertools.pairwise(s.times_s)]
    assert max(gaps) < 2.0
    await unit.healthy()
    _, state = await unit.get("/state")
    assert state["under_way"] == {}
    await unit.idle()


async def test_terms_survive_the_router(unit: Unit) -> None:
    """Of a request under way, and of one whose ticket a former router gave."""
    said = "authorization=Bearer one\tx-baton-priority=low\tx-baton-ttft-ms=60000"
    said += "\tx-baton-output-tokens=250"
    question = f"v1\tPOST\t/v1/completions\t{said}\n"
    tickets = [(await ask_ticket(unit, question)).split()[1] for _ in range(2)]
    underway, late = (unit.request(50, ticket, max_tokens=300) for ticket in tickets)
    streams = [unit.anchor.ask(underway)]
    await streams[0].begun(20)
    before = unit.anchor.hellos
    unit.kill_router()
    unit.start_router()
    await unit.anchor.greeted(before + 1)
    streams.append(unit.anchor.ask(late))
    for request, stream in zip((underway, late), streams, strict=True):
        assert await stream.whole() == await expected(request)
    for ticket, recovered in zip(tickets, (True, False), strict=True):
        _, answer = await unit.get(f"/requests/{ticket}")
        assert (answer["priority"], answer["ttft_slo_s"], answer["tpot_slo_s"]) == (
            "low", 60.0, None,
        )  # fmt: skip
        assert answer["hinted_output_tokens"] == 250
        assert [each["recovered"] for each in answer["requests"]] == [recovered]


async def test_neither_vllm_nor_torch_nor_ray_is_loaded(unit: Unit) -> None:
    await unit.get("/metrics")
    assert unit.router is not None
    assert not loaded_libraries(unit.router.pid) & {"torch", "ray", "vllm"}
    code = "import sys, router.process, router.http_api; print(*sys.modules)"
    told = await asyncio.to_thread(subprocess.check_output, [sys.executable, "-c", code], cwd=ROOT)
    names = told.decode().split()
    assert not {name.split(".")[0] for name in names} & {"torch", "ray", "vllm", "transformers"}


async def test_it_ends_on_sigterm_and_with_its_anchor(unit: Unit) -> None:
    assert unit.kill_router(signal.SIGTERM) == 0
    unit.start_router()
    await unit.anchor.greeted(2)
    unit.anchor.close()
    assert unit.router is not None
    assert await asyncio.to_thread(unit.router.wait, 5) == 1
