"""What an engine computes with, as a digest: equal digests are equal models, wherever they lie.

It names the roots of content addresses, and workers whose digests differ share no request and no
KV state. Reading all of a checkpoint would take minutes, so of the weights it covers:
- of safetensors the sizes of the files and their headers, that is the name, type, shape and place
  of every tensor, and of each tensor 1 KiB from its middle;
- of other formats the sizes of the files and 256 samples of 1 KiB, evenly spread;
- all of the configuration, the tokenizer's vocabulary, and code that comes with the model.
So another training step shows, since it changes every tensor, or most; a few values that were
changed by hand, or by a failing disk, need not. Paths and times do not count, the files' own names
do: the same weights cut into other files look different. What is neither a file nor said by one
(number formats, quantization when loading, the seed of made-up weights) the caller adds.

Boundary: reads files, loads nothing, decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Final

DIGEST_BYTES: Final = 16
SAMPLE_BYTES: Final = 1024
_SAMPLES: Final = 256
_LENGTH_BYTES: Final = 8
"""Before a safetensors header."""
_LONGEST_HEADER_BYTES: Final = 100_000_000
"""The format's own limit."""
_WHOLE: Final = (
    "config.json", "params.json", "tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.py",
)  # fmt: skip
# Neither chat templates nor defaults for sampling: they are the fronts', and may change alone.
_SAMPLED: Final = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def weights_digest(directory: Path, loaded_as: Mapping[str, object]) -> str:
    """Of the model in this directory, loaded in this way; hexadecimal. A directory that holds none,
    as for a simulated engine, counts by its path.

    Raises OSError if its files can't be read, ValueError if one is no safetensors file.
    """
    digest = blake2b(digest_size=DIGEST_BYTES, person=b"baton-weights")
    settings = json.dumps(loaded_as, sort_keys=True)
    for part in _parts(directory, settings):
        # With its length before it, a part can't pass for the end of another.
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _parts(directory: Path, settings: str) -> Iterator[bytes]:
    yield settings.encode()
    whole, sampled = _found(directory, _WHOLE), _found(directory, _SAMPLED)
    if not whole and not sampled:
        yield str(directory).encode()
    for path in whole:
        yield path.name.encode()
        yield path.read_bytes()
    for path in sampled:
        yield path.name.encode()
        with path.open("rb") as file:
            yield from _sampled(path, file)


def _found(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    found = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    return sorted(found)


def _sampled(path: Path, file: BinaryIO) -> Iterator[bytes]:
    size = file.seek(0, 2)
    yield str(size).encode()
    if path.suffix == ".safetensors":
        header = _header(path, file, size)
        yield header
        spans = _tensors(path, header)
    else:
        spans = [(size * n // _SAMPLES, size * (n + 1) // _SAMPLES) for n in range(_SAMPLES)]
    for begin, end in spans:
        file.seek(max(begin, (begin + end - SAMPLE_BYTES) // 2))
        yield file.read(min(SAMPLE_BYTES, end - begin))


def _header(path: Path, file: BinaryIO, size: int) -> bytes:
    file.seek(0)
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if length > min(size - _LENGTH_BYTES, _LONGEST_HEADER_BYTES):
        raise ValueError(f"{path} is no whole safetensors file; download or copy it again.")
    return file.read(length)


def _tensors(path: Path, header: bytes) -> list[tuple[int, int]]:
    """Where each begins and ends in the file, in that order."""
    data_at = _LENGTH_BYTES + len(header)
    try:
        entries = json.loads(header)
        spans = [entries[name]["data_offsets"] for name in entries if name != "__metadata__"]
        return sorted((data_at + int(begin), data_at + int(end)) for begin, end in spans)
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} has a header that is not of safetensors' format.") from None
