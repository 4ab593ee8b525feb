"""`baton simulate` as it is typed: what it prints, what it writes, and what it says to mistakes."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import xml.etree.ElementTree
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.cli import app
from engine.profiles import PROFILES
from simulator.question import read_slo

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


def test_a_trace_and_its_report(trace: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    code, told = typed(
        str(trace), "--gpus", "2", "--prefill", "1", "--report", str(page), "--report", str(picture)
    )
    assert code == 0, told
    assert f"Curves: {page}, {picture}" in told.replace("\n", "")
    assert "1 prefill and 1 decode engine:" in " ".join(told.split())
    assert "300 in 30 s" in told
    assert "100.0%" in told
    text = page.read_text()
    for svg in text.split("<svg")[1:]:
        xml.etree.ElementTree.fromstring("<svg" + svg.partition("</svg>")[0] + "</svg>")
    assert text.count("<svg") == 5
    assert "300 requests" in text
    for shown in ("first token", "output token", "within both SLOs, by", "cached, by", "prefill-0"):
        assert shown in text
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
        colours = Counter(drawn.convert("RGB").getdata())
    assert colours[(11, 92, 173)] > 1000  # The bars, if nothing else.
    assert colours[(255, 255, 255)] > 0.8 * colours.total()


FORMATS = {
    "azure-2023.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:56.6805900,396,109\n",
    "azure-2024.csv.gz": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:10.009930+00:00,2399,6\n",
    "burstgpt.csv": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n6,GPT-4,100,0,100,API log\n"
    "15,GPT-4,1087,230,1317,API log\n",
    "mooncake.jsonl.gz": '{"timestamp": 0, "input_length": 9, "output_length": 2, "hash_ids": [1]}'
    '\n{"timestamp": 10000, "input_length": 9, "output_length": 2, "hash_ids": [1]}\n',
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_served(tmp_path: Path, name: str) -> None:
    path, text = tmp_path / name, FORMATS[name].encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    code, told = typed(str(path), "--gpus", "1")
    assert code == 0, told
    assert "│ 2 in 1" in told
    assert "│ 100.0%" in told


@pytest.mark.parametrize(
    "name",
    [
        "azure2023_conv", "mooncake_conversation", "mooncake_arxiv_first1000",
        "servegen_m-large_day9_24h",
    ],
)  # fmt: skip
def test_the_shared_traces_are_served(shared: Path, name: str) -> None:
    code, told = typed(str(shared / "traces" / f"{name}.jsonl.gz"), "--minutes", "0.5")
    assert code == 0, told
    assert re.search(r"failed +│ 0 ", told)


def test_requests_that_come_at_once_have_no_other_rates(tmp_path: Path) -> None:
    path, page = tmp_path / "trace.jsonl", tmp_path / "page.html"
    path.write_text('{"timestamp": 7, "input_length": 9, "output_length": 1}')
    code, told = typed(str(path), "--report", str(page))
    assert code == 0, told
    # One token each: nothing lies between tokens.
    assert page.read_text().count("<svg") == 2


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


PLAN = ("poisson", "--rate", "60", "--minutes", "0.5", "--plan")


def test_a_plan_and_the_command_for_just_that() -> None:
    code, told = typed(*PLAN, "--slo", "500ms,12ms")
    assert code == 0, told
    gpus, prefill, decode, within = chosen(told)
    prefills, decodes = prefill.removesuffix(" x 1"), decode.removesuffix(" x 1")
    assert int(gpus) == int(prefills) + int(decodes) < 8
    assert f"Chosen: {gpus} GPUs" in told
    assert f"baton serve --prefill {prefills} --decode {decodes}" in told
    assert f"│ {within} " in again(told)


def chosen(told: str) -> list[str]:
    """Of its row: GPUs, either pool's engines, and the share that was served as promised."""
    row = next(line for line in told.splitlines() if "→" in line)
    return [cell.strip(" →") for cell in row.split("│")[1:5]]


def again(told: str) -> str:
    """What the command says that a plan ends with."""
    _, _, command = told.partition("Again: baton simulate ")
    code, told = typed(*shlex.split(command.partition("\n")[0]))
    assert code == 0, told
    return told


def test_a_plan_may_give_either_pool_engines_of_its_own() -> None:
    """Tokens would be late on 4 GPUs; prompts that are computed there leave them time on 8."""
    code, told = typed(
        "poisson", "--rate", "8", "--minutes", "0.5", "--plan", "--slo", "1s,15ms",
        "--gpus", "32", "--model", "llama-3.1-70b-h100x4",
    )  # fmt: skip
    assert code == 0, told
    *layout, within = chosen(told)
    assert layout == ["12", "1 x 4", "1 x 8"]
    assert "12 GPUs, 1 prefill engine of 4 GPUs and 1 decode engine of 8 GPUs. Why" in told
    assert (
        "BATON_PREFILL__ENGINE_ARGS__TENSOR_PARALLEL_SIZE=4 "
        "BATON_ENGINE_ARGS__TENSOR_PARALLEL_SIZE=8 baton serve --prefill 1 --decode 1 " in told
    )
    assert f"│ {within} " in again(told)


def test_a_plan_says_of_the_same_seed_the_same() -> None:
    assert typed(*PLAN, "--policy", "random") == typed(*PLAN, "--policy", "random")


def test_a_plan_that_is_too_much_says_the_best_there_is() -> None:
    code, told = typed(*PLAN, "--gpus", "2", "--attainment", "0.99", "--slo", "1s,9ms")
    assert code == 0, told
    assert "No layout that was tried does that. The best reachable is 2 GPUs" in told
    assert "<99%" in told
    assert "Raise --gpus" in told


def test_a_plan_for_what_fits_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 900000, "output_length": 5}')
    code, told = typed(str(path), "--gpus", "2", "--plan", "--slo", "2000s,1s")
    assert code == 0, told
    assert "0.0% of the requests are served so. Raise" in told
    assert "known on 1 GPU only" in told


def test_a_plan_leaves_out_engines_on_which_nothing_could_be_in_time() -> None:
    code, told = typed(
        "poisson", "--rate", "1", "--minutes", "0.5", "--plan", "--slo", "2s,15ms",
        "--gpus", "16", "--model", "llama-3.1-70b-h100x4", "--attainment", "0.5",
    )  # fmt: skip
    assert code == 0, told
    assert "is known on 4 or 8 GPUs only" in told
    assert "On 4 GPUs no request would meet the TPOT even alone" in told
    assert "Chosen: 8 GPUs, 1 engine for both of 8 GPUs each" in told
    assert "TENSOR_PARALLEL_SIZE=8 baton serve --prefill 0 --decode 1" in told


def test_a_plan_for_fewer_gpus_than_the_only_engines_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts are in time on 2 GPUs only, tokens on 1 only."""
    one = PROFILES["llama-3.1-8b-h100"]
    two = replace(
        one, gpus=2, step_base_s=1.1 * one.step_base_s, prefill_token_s=one.prefill_token_s / 10
    )
    monkeypatch.setitem(PROFILES, "llama-3.1-8b-h100x2", two)
    code, told = typed(*PLAN, "--gpus", "2", "--slo", "7.5ms,6.5ms")
    assert code == 2, told
    assert "--gpus 2 is too few for engines that could meet --slo 7.5ms,6.5ms even alone" in told


OTHER = ("poisson", "--rate", "1", "--gpus", "16", "--model", "llama-3.1-70b-h100x8",
         "--prefill-model")  # fmt: skip


def test_an_slo_that_caches_make_reachable_is_no_mistake() -> None:
    code, told = typed("agents", "--rate", "5", "--minutes", "2", "--slo", "80ms,50ms")
    assert code == 0, told
    (served,) = re.findall(r"within both SLOs\W+([\d.]+)%", told)
    assert float(served) > 50


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
        (("poisson", "--rate", "1", "--report", "curves.pdf"), "must end in .html or .png"),
        (("poisson", "--rate", "1", "--report", "nowhere/x.png"), "no directory nowhere"),
        (("poisson", "--rate", "1", "--attainment", "0.9"), "add --plan or leave it out"),
        (("poisson", "--rate", "1", "--plan", "--prefill", "1"), "leave --prefill out"),
        (
            ("poisson", "--rate", "1", "--plan", "--gpus", "3", "--model", "llama-3.1-70b-h100x8"),
            "--gpus 3 is too few: Llama-3.1-70B runs on 4 or more",
        ),
        (("poisson", "--rate", "1", "--plan", "--gpus", "0"), "--gpus 0 is too few"),
        (("poisson", "--rate", "1", "--plan", "--slo", "1s,1ms"), "the best reachable is"),
        ((*OTHER, "llama-3.1-70b-h100x4", "--plan"), "leave --prefill-model out"),
        ((*OTHER, "llama-3.1-70b-h10x4"), "did you mean 'llama-3.1-70b-h100x4'"),
        ((*OTHER, "llama-3.1-70b-h100x4"), "needs --prefill, the number of its engines"),
        ((*OTHER, "qwen3-32b-h100x2", "--prefill", "1"), "is another model than"),
        (
            (*OTHER, "llama-3.1-70b-h100x4", "--prefill", "1"),
            "no whole number of engines to decode",
        ),
    ],
)
def test_mistakes_get_a_sentence(arguments: tuple[str, ...], words: str) -> None:
    code, told = typed(*arguments)
    assert code == 2, told
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
    assert code == 2, told
    assert "all arrive at once" in told


def test_units_of_an_slo() -> None:
    slo = read_slo("1.5s, 80ms")
    assert (slo.ttft_s, slo.tpot_s) == (1.5, pytest.approx(0.08))


def test_several_routers(trace: Path) -> None:
    code, told = typed(str(trace), "--gpus", "2", "--routers", "3", "--slo", "10s,1s")
    assert code == 0, told
    assert "3 routers before them" in " ".join(told.split())
    assert "300 in 30 s" in told
    code, told = typed(str(trace), "--routers", "0")
    assert code == 2, told
    assert "--routers" in told
