"""`baton simulate` as it is typed: what it prints, what it writes, and what it says to mistakes."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from simulator.cli import read_slo

RUNNER = CliRunner()


def typed(*arguments: str) -> tuple[int, str]:
    result = RUNNER.invoke(app, ["simulate", *arguments])
    return result.exit_code, result.output


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    lines = [
        {
            "timestamp": 100 * n,
            "input_length": 900,
            "output_length": 20,
            "hash_ids": [n % 7, 99 + n],
        }
        for n in range(300)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_trace_and_its_page(trace: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, told = typed(str(trace), "--gpus", "2", "--prefill", "1", "--html", str(page))
    assert code == 0, told
    assert "1 prefill and 1 decode engines" in " ".join(told.split())
    assert "300 in 30 s" in told
    assert "100.0%" in told
    text = page.read_text()
    for svg in text.split("<svg")[1:]:
        xml.etree.ElementTree.fromstring("<svg" + svg.partition("</svg>")[0] + "</svg>")
    assert text.count("<svg") == 3
    assert "300 requests" in text


def test_a_rate_speeds_a_trace_up(trace: Path) -> None:
    code, told = typed(str(trace), "--rate", "100")
    assert code == 0, told
    assert "300 in 3 s" in told


def test_only_so_many_minutes(trace: Path) -> None:
    code, told = typed(str(trace), "--minutes", "0.1")
    assert code == 0, told
    assert "│ 60 in" in told


def test_the_same_seed_tells_the_same() -> None:
    asked = ("sessions", "--rate", "20", "--minutes", "1", "--policy", "dynamo_kv", "--seed", "4")
    assert typed(*asked) == typed(*asked)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("poison", "--rate", "1"), "did you mean 'poisson'"),
        (("poisson",), "poisson needs --rate"),
        (("poisson", "--rate", "0.001", "--minutes", "0.01"), "nothing of poisson arrives"),
        (("missing.jsonl",), "can't be read"),
        (("poisson", "--rate", "1", "--policy", "dinamo_kv"), "did you mean 'dynamo_kv'"),
        (("poisson", "--rate", "1", "--model", "llama-3.1-8b"), "did you mean 'llama-3.1-8b-h100'"),
        (("poisson", "--rate", "1", "--slo", "1ms,1ms"), "the best reachable is"),
        (("poisson", "--rate", "1", "--slo", "soon"), "as in --slo 2s,50ms"),
        (("poisson", "--rate", "1", "--slo", "0s,50ms"), "above 0"),
        (("poisson", "--rate", "1", "--gpus", "6", "--model", "llama-3.1-70b-h100x4"), "runs on 4"),
        (("poisson", "--rate", "1", "--gpus", "2", "--prefill", "2"), "no engine to decode"),
    ],
)
def test_mistakes_get_a_sentence(arguments: tuple[str, ...], words: str) -> None:
    code, told = typed(*arguments)
    assert code == 2
    assert words in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "holds no requests"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\nnonsense', "line 2"),
        (
            '{"timestamp": 5, "input_length": 1, "output_length": 1}\n'
            '{"timestamp": 1, "input_length": 1, "output_length": 1}',
            "sort the trace by time",
        ),
        ('{"timestamp": -1, "input_length": 1, "output_length": 1}', "line 1: timestamp is -1"),
        ('{"timestamp": 7, "input_length": 9, "output_length": 1}', None),
    ],
)
def test_traces_that_can_not_be_run(tmp_path: Path, lines: str, words: str | None) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(lines)
    code, told = typed(str(path))
    assert code == (0 if words is None else 2), told
    assert words is None or words in told


def test_one_moment_has_no_rate(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 7, "input_length": 9, "output_length": 1}')
    code, told = typed(str(path), "--rate", "5")
    assert code == 2
    assert "all arrive at once" in told


def test_units_of_an_slo() -> None:
    slo = read_slo("1.5s, 80ms")
    assert (slo.ttft_s, slo.tpot_s) == (1.5, pytest.approx(0.08))
