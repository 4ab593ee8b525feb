"""The methods of `baton.v1.Inference`: each call is one request on the edge, like other clients'.

Boundary: decides nothing, and keeps nothing between calls.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import aiohttp
import grpc

from protos.inference_pb2 import GenerateRequest, GenerateResponse
from router.ticket_mint import LONGEST_DEADLINE_MS
from router.tickets import DEADLINE_FIELD
from router.unit.grpc_front import errors, translate
from router.unit.grpc_front.errors import ErrorEvent, Failure
from router.unit.grpc_front.translate import AnswerReader

_log = logging.getLogger("grpc")

SERVICE: Final = "baton.v1.Inference"
_PASSED_ON: Final = (
    "authorization", "x-api-key", "idempotency-key", "x-baton-priority", "x-baton-ttft-ms",
    "x-baton-itl-ms", "x-baton-output-tokens",
)  # fmt: skip
"""Metadata that are headers of the HTTP API."""
_REQUEST_LIMIT_S: Final = 60
"""Between a call's beginning and the end of its one message."""


class Inference:
    """The service's methods."""

    def __init__(
        self, edge: aiohttp.ClientSession, router: aiohttp.ClientSession, max_body_bytes: int
    ) -> None:
        self._edge = edge
        self._router = router
        self._max_body_bytes = max_body_bytes

    def handler(self) -> grpc.GenericRpcHandler:
        """To the server requests are streams of bytes, of which a client sends one.

        So what is no message, or does not come, gets a status that says so.
        """
        generate = grpc.stream_stream_rpc_method_handler(
            self.generate, response_serializer=GenerateResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Generate": generate})

    async def generate(self, _: object, context: grpc.aio.ServicerContext) -> None:
        """One call, to its end. When its client leaves it is cancelled, and the request with it."""
        try:
            await self._generate(context)
        except grpc.aio.InternalError:
            # The client left while something was written to it; the cancellation is on its way.
            raise asyncio.CancelledError from None

    async def _generate(self, context: grpc.aio.ServicerContext) -> None:
        try:
            await self._answer(await _request(context), context)
        except Failure as failure:
            await context.abort(failure.code, failure.message, failure.metadata)

    async def _answer(self, request: GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        body = translate.completion_body(request)
        if len(body) > self._max_body_bytes:
            what = f"The request is larger than {self._max_body_bytes} bytes as JSON."
            raise Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, what)
        post = self._edge.post("/v1/completions", data=body, headers=_headers(context))
        try:
            async with post as response:
                if response.status != 200:
                    # Without initial metadata, which would keep a client from trying again by
                    # itself (gRFC A6).
                    content = await response.read()
                    raise errors.http_failure(response.status, content, response.headers)
                request_id = response.headers.get("X-Request-Id", "")
                if request_id:
                    await context.send_initial_metadata((("x-request-id", request_id),))
                reader = AnswerReader(request_id, request.sampling.logprobs)
                await self._pass_on(response, reader, context)
        except aiohttp.ClientError as error:
            _log.warning("the edge can't be reached: %r", error)
            what = "The edge can't be reached; try again."
            raise Failure(grpc.StatusCode.UNAVAILABLE, what) from None

    async def _pass_on(
        self,
        response: aiohttp.ClientResponse,
        reader: AnswerReader,
        context: grpc.aio.ServicerContext,
    ) -> None:
        try:
            async for data in response.content.iter_any():
                for message in reader.feed(data):
                    # Returns when the transport has taken it; until then nothing more is read.
                    await context.write(message)
        except aiohttp.ClientError as error:
            _log.warning("an answer was cut: %r", error)
        except ErrorEvent as failure:
            raise await self._failure_on_record(reader.request_id) or failure from None
        reader.end()

    async def _failure_on_record(self, request_id: str) -> Failure | None:
        """What the router knows of it; None if it can't be asked or doesn't know."""
        try:
            async with self._router.get(f"/requests/{request_id}") as response:
                return errors.recorded_failure(await response.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            _log.warning("the router can't be asked about %s: %r", request_id, error)
            return None


async def _request(context: grpc.aio.ServicerContext) -> GenerateRequest:
    try:
        async with asyncio.timeout(_REQUEST_LIMIT_S):
            data = await context.read()
    except TimeoutError:
        what = f"The request did not come within {_REQUEST_LIMIT_S} s."
        raise Failure(grpc.StatusCode.DEADLINE_EXCEEDED, what) from None
    return translate.parse(b"" if data is grpc.aio.EOF else data)


def _headers(context: grpc.aio.ServicerContext) -> list[tuple[str, str]]:
    headers = [(name, value) for name, value in context.invocation_metadata() if name in _PASSED_ON]
    remaining_s = context.time_remaining()
    if remaining_s is not None:
        deadline_ms = min(max(1, int(remaining_s * 1000)), LONGEST_DEADLINE_MS)
        headers.append((DEADLINE_FIELD, str(deadline_ms)))
    return headers
