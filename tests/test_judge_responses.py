"""A judge over HTTP on a loopback server whose taste is known; off, it does nothing at all."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from ruamel.yaml import YAML

from stages.judge_responses import Params, main
from stages.lib.model import chat_endpoint
from stages.lib.run.artefacts import write_parquet
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, load_params
from tests.conftest import REPO
from tests.support.chat_server import KEY, MODEL, SNAPSHOT, ChatServer

BASE = Base(seed=42, precision="auto")
OFF = load_params("judge_responses", Params, REPO)
ON = OFF.replace(model=MODEL, prompts=None, retries=1, timeout=5.0)
PROMPTS = {0: "How are you?", 1: "Any plans?", 2: "Is it late?", 7: "Tea or coffee?"}  # the last to measure on
GOOD = {  # by model, the prompts whose answer is good
    "base": {0},
    "dpo": {0, 1, 2},
    "ppo": {2},
}


@pytest.fixture
def root(tmp_path) -> Path:
    """What sample_responses and tokenize_pairs leave: sampled and greedy answers, "good" or "bad"."""
    (tmp_path / "params.yaml").write_bytes((REPO / "params.yaml").read_bytes())
    rows = []
    for model, good in GOOD.items():
        for prompt_id in PROMPTS:
            text = f"{'good' if prompt_id in good else 'bad'} answer of {model} to {prompt_id}"
            rows.append((model, "sampled", prompt_id, text, [5] * (4 if model == "base" else 6)))
        rows.append((model, "greedy", 0, "greedy", [5]))
    names = ("model", "decoding", "prompt_id", "text", "response_ids")
    write_parquet(tmp_path / "data/answers.parquet", dict(zip(names, zip(*rows, strict=True), strict=True)))
    for split, ids in (("heldout", (0, 1, 2)), ("eval", (7,))):
        columns = {"prompt_id": list(ids), "prompt": [PROMPTS[i] for i in ids], "input_ids": [[1]] * len(ids)}
        write_parquet(tmp_path / f"data/tokenized/prompts_{split}.parquet", columns)
    return tmp_path


def answers_in(request: dict) -> list[str]:
    """The two answers that a request asks about, in order."""
    text = request["messages"][1]["content"]
    return [part.split("\n")[1] for part in text.split("[The answer of assistant ")[1:]]


def taste(request: dict) -> str:
    """Good beats bad; two of a kind are a tie."""
    first, second = (answer.startswith("good") for answer in answers_in(request))
    return f"Because. [[{'C' if first == second else 'A' if first else 'B'}]]"


@pytest.fixture
def server(monkeypatch):
    with ChatServer(taste) as running:
        for name, value in running.env().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(chat_endpoint, "FIRST_WAIT", 0.01)
        yield running


def metrics(root: Path) -> dict:
    return json.loads((root / "reports/judge_responses/metrics.json").read_text())


def comparisons(root: Path) -> pd.DataFrame:
    return pd.read_csv(root / "reports/judge_responses/comparisons.csv")


def no_file_has_the_key(root: Path) -> bool:
    return not [path for path in root.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_it_is_off_by_default_and_needs_neither_data_nor_network_nor_key(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_BASE_URL", "no address")
    assert OFF.model is None
    main(BASE, OFF, tmp_path)
    assert metrics(tmp_path) == {"on": False}
    assert comparisons(tmp_path).empty
    assert not (tmp_path / "data").exists()


def test_the_script_loads_no_torch():
    code = "import sys, stages.judge_responses; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_every_pair_is_asked_in_both_orders(server, root):
    main(BASE, ON, root)
    asked = {(*answers_in(request),) for _, request in server.requests}
    assert len(server.requests) == len(asked) == 4 * 2 * 2
    assert asked == {(second, first) for first, second in asked}
    assert all("answer of base" in first + second for first, second in asked)
    assert not any("greedy" in first for first, _ in asked)
    for _, request in server.requests:
        assert request["model"] == MODEL and request["temperature"] == 0.0
        (prompt,) = [i for i in PROMPTS if PROMPTS[i] in request["messages"][1]["content"]]
        assert all(answer.endswith(f"to {prompt}") for answer in answers_in(request))


def test_figures_worked_by_hand(server, root):
    main(BASE, ON, root)
    found = metrics(root)
    assert found["on"] and found["model"] == MODEL and found["answered_by"] == [SNAPSHOT]
    assert found["prompts"] == 4 and found["confidence"] == 0.95
    # DPO: good at 0, 1, 2 and the base at 0 alone: tie, win, win, tie
    assert found["dpo"]["win_rate"] == 0.75
    assert [found["dpo"][name] for name in ("wins", "ties", "losses")] == [4, 4, 0]  # replies
    # PPO: good at 2 alone: loss, tie, win, tie
    assert found["ppo"]["win_rate"] == 0.5
    assert [found["ppo"][name] for name in ("wins", "ties", "losses")] == [2, 4, 2]
    for model in ("dpo", "ppo"):
        assert found[model]["counted_prompts"] == 4 and found[model]["unparsed_replies"] == 0
        assert found[model]["prefers_first"] == 0.5 and found[model]["consistent"] == 1
        assert found[model]["win_rate_low"] < found[model]["win_rate"] < found[model]["win_rate_high"]
    table = comparisons(root)
    assert table["won"].tolist() == [0.5, 0.5, 1, 1, 1, 1, 0.5, 0.5] + [0, 0, 0.5, 0.5, 1, 1, 0.5, 0.5]
    assert table["first"].tolist() == ["dpo", "base"] * 4 + ["ppo", "base"] * 4
    assert all((root / f"data/judge_cache/{name}.json").exists() for name in table["reply"])


def test_a_reply_without_a_verdict_is_counted_and_its_prompt_left_out(server, root, capsys):
    def unsure(request: dict) -> str | None:
        first, _ = answers_in(request)
        return "I cannot choose." if first == "bad answer of base to 1" else taste(request)

    server.reply = unsure
    main(BASE, ON, root)
    found = metrics(root)
    assert found["dpo"]["unparsed_replies"] == found["ppo"]["unparsed_replies"] == 1
    assert found["dpo"]["counted_prompts"] == 3 and found["dpo"]["win_rate"] == pytest.approx(2 / 3, rel=1e-5)
    assert found["dpo"]["wins"] == 3  # the other order's verdict is among the replies, not in the rate
    assert comparisons(root)["won"].isna().sum() == 2
    assert "2 of 16 replies have no verdict" in capsys.readouterr().out


def test_a_judge_of_position_alone_gives_no_model_an_edge(server, root):
    server.reply = lambda request: "[[A]]"
    main(BASE, ON, root)
    for model in ("dpo", "ppo"):
        found = metrics(root)[model]
        assert found["win_rate"] == 0.5 and found["prefers_first"] == 1 and found["consistent"] == 0


def test_a_judge_without_any_verdict_is_an_error_that_says_where_to_look(server, root):
    server.reply = lambda request: "Both are lovely."
    with pytest.raises(UserError, match="none of 4 prompts of dpo has a verdict.*8 of 8.*another judge_responses"):
        main(BASE, ON, root)
    assert len(comparisons(root)) == 16
    assert not (root / "reports/judge_responses/metrics.json").exists()


def test_a_second_run_asks_nothing_needs_no_key_and_writes_the_same(server, root, monkeypatch):
    facts = main(BASE, ON, root)
    before = {path: path.read_bytes() for path in (root / "reports").rglob("*") if path.is_file()}
    monkeypatch.delenv("OPENAI_API_KEY")
    again = main(BASE, ON.replace(parallel=1, retries=0, timeout=1.0), root)
    assert (facts["requests"], again["requests"], len(server.requests)) == (16, 0, 16)
    assert {path: path.read_bytes() for path in (root / "reports").rglob("*") if path.is_file()} == before


def test_what_a_cut_off_run_was_told_is_not_asked_again(server, root):
    server.reply = lambda request: 1 / 0 if len(server.requests) > 5 else taste(request)  # cut off after five
    with pytest.raises(UserError, match="the replies so far are kept"):
        main(BASE, ON.replace(parallel=1, retries=0), root)
    kept = len(list((root / "data/judge_cache").glob("*.json")))
    assert kept == 5
    server.reply, before = taste, len(server.requests)
    main(BASE, ON, root)
    assert len(server.requests) - before == 16 - kept
    assert metrics(root)["dpo"]["win_rate"] == 0.75


def test_more_prompts_are_asked_about_without_those_that_were(server, root):
    main(BASE, ON.replace(prompts=1), root)
    assert len(server.requests) == 4 and metrics(root)["prompts"] == 1
    main(BASE, ON, root)
    assert len(server.requests) == 16


def test_no_temperature_is_sent_where_it_is_null(server, root):
    main(BASE, ON.replace(temperature=None), root)
    assert not any("temperature" in request for _, request in server.requests)


def test_the_key_is_in_no_file_of_a_run(server, root):
    main(BASE, ON, root)
    assert len(list((root / "data/judge_cache").iterdir())) == 16
    assert no_file_has_the_key(root)


def test_an_answer_without_a_prompt_is_named(server, root):
    columns = {"prompt_id": pa.array([], pa.int64()), "prompt": pa.array([], pa.string())}
    write_parquet(root / "data/tokenized/prompts_eval.parquet", columns)
    with pytest.raises(UserError, match="data/answers.parquet: prompt 7 .*dvc repro -f sample_responses"):
        main(BASE, ON, root)
    assert not server.requests


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"OPENAI_API_KEY": ""}, "OPENAI_API_KEY is not set"),
        ({"OPENAI_API_KEY": "sk-" + "wrong" * 5}, "answered 401: it does not take the key"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}, "no connection: start the server"),
    ],
)
def test_the_script_ends_in_one_line_without_the_key(server, root, change, message):
    """As dvc runs it: exit status 1, no traceback, nothing of the key on the screen or in a file."""
    yaml = YAML()
    params = yaml.load((root / "params.yaml").read_text())
    params["judge_responses"] |= {"model": MODEL, "retries": 0}
    with open(root / "params.yaml", "w") as file:
        yaml.dump(params, file)
    environment = server.env() | {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO)} | change
    command = [sys.executable, "-m", "stages.judge_responses"]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    said = result.stdout + result.stderr
    assert result.returncode == 1 and message in said and "Traceback" not in said
    assert environment["OPENAI_API_KEY"] not in said or not environment["OPENAI_API_KEY"]
    assert KEY not in said and no_file_has_the_key(root)
