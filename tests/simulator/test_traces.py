"""Reading traces: every format as it comes, and every mistake named with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from simulator.traces import BLOCK_TOKENS, TracedRequest, TraceError, read

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.00993+00:00,2162,5
2024-05-10 02:00:01.509930+02:00,2399,6
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
7.5,GPT-4,100,0,100,API log
45,ChatGPT,1087,230,1317,API log
"""


def entry(**changed: Any) -> dict[str, Any]:
    return {"timestamp": 0, "input_length": 600, "output_length": 5, **changed}


def write(directory: Path, *lines: Any) -> Path:
    path = directory / "trace.jsonl"
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


def test_mooncakes_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        entry(timestamp=3000, hash_ids=[0, 7]),
        "",
        entry(timestamp=3000, client=None),
        entry(timestamp=3500, input_length=BLOCK_TOKENS, hash_ids=[0], client=20),
    )
    assert list(read(path)) == [
        TracedRequest(0.0, 600, 5, (0, 7)),
        TracedRequest(0.0, 600, 5),
        TracedRequest(0.5, BLOCK_TOKENS, 5, (0,), "20"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AZURE, [(0.0, 374, 44), (4.314579, 396, 109)]),
        (AZURE_2024, [(0.0, 2162, 5), (1.5, 2399, 6)]),
        (BURSTGPT, [(0.0, 472, 18), (40.0, 1087, 230)]),
    ],
    ids=["azure", "azure-2024", "burstgpt"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_csv(tmp_path: Path, text: str, expected: list[Any], packed: bool) -> None:
    path = tmp_path / ("trace.csv.gz" if packed else "trace.csv")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = list(read(path))
    assert [request[1:3] for request in found] == [each[1:] for each in expected]
    assert [request[0] for request in found] == pytest.approx([each[0] for each in expected])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"timestamp": 1', "it is no JSON"),
        ("[1, 2]", "it is no JSON object"),
        (entry(timestamp=-1), "timestamp is -1; it must be milliseconds, 0 or more"),
        (entry(timestamp="soon"), "timestamp is 'soon'"),
        (entry(timestamp=True), "timestamp is True"),
        (entry(timestamp=float("nan")), "timestamp is nan"),
        (entry(timestamp=float("inf")), "timestamp is inf"),
        (entry(timestamp=10**400), "timestamp is 1000"),
        ('{"timestamp": ' + "9" * 5000 + "}", "it is no JSON"),
        (entry(input_length="600"), "input_length is '600'"),
        (entry(hash_ids=[1, 2**64]), "hash_ids must be a list of whole numbers"),
        ({"timestamp": 5, "output_length": 3}, "input_length is None; it must be a whole number"),
        (entry(input_length=0), "input_length is 0"),
        (entry(input_length=1.5), "input_length is 1.5"),
        (entry(output_length=-3), "output_length is -3"),
        (entry(hash_ids=[1]), "it has 1 hash_ids; 600 tokens have 2, one for each 512"),
        (entry(hash_ids=[1, "a"]), "hash_ids must be a list of whole numbers"),
        (entry(hash_ids=[1, -2]), "hash_ids must be a list of whole numbers, each 0 or more"),
        (entry(hash_ids="1, 2"), "hash_ids must be a list"),
        (entry(timestamp=1), "its time 0.001 s is before 0.002 s"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = write(tmp_path, entry(timestamp=2), line, entry(timestamp=9))
    with pytest.raises(TraceError) as error:
        list(read(path))
    assert str(error.value).startswith(f"{path} line 2: ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "number", "said"),
    [
        (AZURE.replace("396", "many"), 3, "ContextTokens is 'many'"),
        (AZURE.replace("2023-11-16 18:15:50.9951690", "later"), 3, "TIMESTAMP is 'later'"),
        (AZURE.replace(",396,109", ""), 3, "it has 1 columns; the first line has 3"),
        (AZURE.replace("18:15:50", "18:15:40"), 3, "sort the trace by time"),
        (BURSTGPT.replace("45,", "nan,"), 4, "Timestamp is 'nan'; it must be seconds"),
        (BURSTGPT.replace("45,", "inf,"), 4, "Timestamp is 'inf'; it must be seconds"),
        (BURSTGPT.replace("1087", "9" * 5000), 4, "Request tokens is '9999"),
        (f"a,{'b' * 200_000}\n", 1, "it is no CSV"),
        (BURSTGPT.replace("1087", "0"), 4, "Request tokens is 0;"),
        ("a,b\n1,2\n", 1, "it names neither JSON nor the columns of a known CSV"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, text: str, number: int, said: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError) as error:
        list(read(path))
    assert str(error.value).startswith(f"{path} line {number}: ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no requests"),
        (b"\n \n", "holds no requests"),
        (AZURE.splitlines(keepends=True)[0].encode(), "holds no requests"),
        (b"\xff\xfe\x00", "can't be read as text"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=said):
        list(read(path))


def test_what_is_not_there_or_not_packed(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        list(read(tmp_path / "none.jsonl"))
    with pytest.raises(TraceError, match="Is a directory"):
        list(read(tmp_path))
    path = tmp_path / "trace.jsonl.gz"
    path.write_text(json.dumps(entry()))
    with pytest.raises(TraceError, match="can't be read as text"):
        list(read(path))
    packed = bytearray(gzip.compress(json.dumps(entry()).encode() * 100))
    packed[12:16] = b"\xff\xff\xff\xff"
    path.write_bytes(packed)
    with pytest.raises(TraceError, match="can't be read as text"):
        list(read(path))
    path.write_bytes(gzip.compress(json.dumps(entry()).encode() * 100)[:-12])
    with pytest.raises(TraceError, match="can't be read as text"):
        list(read(path))


def test_the_shared_traces(shared: Path) -> None:
    """All of them are read, and hold what their tables say."""
    counts = {
        "mooncake_conversation": 12_031,
        "mooncake_arxiv_first1000": 1_000,
        "azure2023_conv": 19_366,
        "servegen_m-large_day9_24h": 172_656,
    }
    for name, expected in counts.items():
        assert sum(1 for _ in read(shared / "traces" / f"{name}.jsonl.gz")) == expected
