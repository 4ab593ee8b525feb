"""Streams a completion from Baton's gRPC API: python grpc_client.py "Once upon a time"

It needs grpcio, protobuf and what docs/grpc.md has generated from protos/inference.proto.
"""

from __future__ import annotations

import argparse
import sys

import grpc

from protos import inference_pb2, inference_pb2_grpc


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt")
    parser.add_argument("--target", default="127.0.0.1:8001")
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()

    request = inference_pb2.GenerateRequest(
        text=arguments.prompt,  # Or token_ids=inference_pb2.TokenIds(ids=[1, 2, 3]).
        sampling=inference_pb2.Sampling(
            max_tokens=arguments.max_tokens,
            temperature=0.0,
            logprobs=0,  # Each token's own, and no alternatives.
        ),
    )
    with grpc.insecure_channel(arguments.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        # The deadline goes with the request: when it has passed, nothing computes for it any more.
        call = stub.Generate(request, timeout=60, wait_for_ready=True)
        logprob = 0.0
        try:
            for message in call:
                print(message.text, end="", flush=True)
                logprob += sum(token.logprob for token in message.logprobs)
        except grpc.RpcError as error:
            sys.exit(f"\n{error.code().name}: {error.details()}")

    # Only a stream that ended well comes here; its last message tells how.
    reason = inference_pb2.FinishReason.Name(message.finish_reason)
    usage = message.usage
    print(f"\n{reason}, log probability {logprob:.2f}, request {message.request_id}")
    print(f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, {usage.cached_tokens} cached")


if __name__ == "__main__":
    main()
