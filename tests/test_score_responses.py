"""The stage on tiny models: scores and judgements by the definitions, what it writes, and what a cut answer is."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

import stages.score_responses as stage
from stages.lib.model.answer_means import answer_means
from stages.lib.model.frozen_side import FrozenSide
from stages.lib.model.judge import Judge, save_judge
from stages.lib.model.loading import save_model
from stages.lib.model.reward import closed
from stages.lib.run.artefacts import read_parquet, write_json, write_parquet
from stages.lib.run.params import Base
from stages.score_responses import Params, main
from tests.conftest import REPO
from tests.support import short_of_memory
from tests.support.example_reports import example_tables

BASE = Base(seed=5, precision="fp32")
PARAMS = Params(micro_batch_tokens=512)
LIMIT = 6
PPO = {"policy": "base", "score_mean": 1.0, "score_std": 2.0, "missing_eos_penalty": 0.5, "kl_coef": 0.1}
PROMPTS = {"heldout": range(0, 5), "eval": range(5, 8), "judge": range(8, 11)}
WORDS = ["I wake up at seven", "Why not? I do!", "As an AI, I cannot", "Tea 🙂 tea 🙂", "no no no no no no no"]


@pytest.fixture(scope="module")
def root(tokenizer, tmp_path_factory):
    """A project root as the stages before leave it: tiny models, and answers written by hand."""
    from transformers import LlamaConfig

    root = tmp_path_factory.mktemp("root")
    shutil.copy(REPO / "params.yaml", root / "params.yaml")
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**sizes, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True)
    save_model(LlamaForCausalLM(config).eval(), tokenizer, root / "models/base")
    reward = LlamaForSequenceClassification(LlamaConfig(**config.to_dict() | {"num_labels": 1}))
    save_model(reward.eval(), tokenizer, root / "models/reward")
    judge = Judge(layer=1, strength=1.0, mean=torch.zeros(32), scale=torch.ones(32), weight=torch.randn(32))
    save_judge(judge, root / "models/judge")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = {i: ids(f"Question {i}?") for numbers in PROMPTS.values() for i in numbers}
    for split, numbers in PROMPTS.items():
        columns = {"prompt_id": list(numbers), "prompt": [f"Question {i}?" for i in numbers]}
        write_parquet(
            root / f"data/tokenized/prompts_{split}.parquet",
            columns | {"input_ids": [prompts[i] for i in numbers]},
        )

    def answer(number: int, prompt_id: int) -> dict:
        text = WORDS[(number + prompt_id) % len(WORDS)]
        response = [*ids(text), tokenizer.eos_token_id][:LIMIT]
        return {"prompt_id": prompt_id, "response_ids": response, "text": text, "ended": len(response) < LIMIT}

    rows = []
    for number, model in enumerate(("base", "dpo", "ppo")):
        asked = [("greedy", "heldout"), ("sampled", "heldout"), ("sampled", "eval")]
        for decoding, split in asked:
            for i in PROMPTS[split]:
                row = answer(number, i) | {"model": model, "decoding": decoding, "split": split}
                of_own = {"logp": -9.0 + number, "entropy": 1.0} if number else {"logp": None, "entropy": None}
                rows.append(row | of_own)
    write_parquet(root / "data/answers.parquet", {name: [row[name] for row in rows] for name in rows[0]})
    several = {"best of n": ((1, 3), 17), "opponent": ((*PROMPTS["heldout"], *PROMPTS["judge"]), 4)}
    rows = [answer(k, i) | {"use": use} for use, (asked, n) in several.items() for i in asked for k in range(n)]
    rows = [row | {"candidate": k % 17, "split": "any"} for k, row in enumerate(rows)]
    write_parquet(root / "data/base_answers.parquet", {name: [row[name] for row in rows] for name in rows[0]})
    for number, model in enumerate(("dpo", "ppo")):
        rows = [
            answer(step + number, i) | {"step": step, "episode": 8 * step, "logp": -9.0 + step, "ref_logp": -9.0}
            for step in (0, 2, 4)
            for i in PROMPTS["judge"]
        ]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "text"}
        score = [None if model == "dpo" else 0.0] * len(rows)
        write_parquet(root / f"data/courses/{model}.parquet", columns | {"score": score})
    pairs = {"prompt_id": [0, 1, 2, 3, 4, 4], "row": list(range(6))}
    chosen = [[*ids(text), tokenizer.eos_token_id, *ids("\n")] for text in ["I do", *WORDS[1:], "another"]]
    pairs |= {"prompt_input_ids": [prompts[i] for i in pairs["prompt_id"]], "chosen_input_ids": chosen}
    write_parquet(root / "data/tokenized/pairs_heldout.parquet", pairs | {"rejected_input_ids": chosen})
    write_json(root / "reports/sample_responses/metrics.json", {"max_new_tokens": LIMIT, "temperature": 0.7})
    write_json(root / "reports/train_ppo/metrics.json", PPO)
    path = root / "reports/train_reward/heldout_scores.csv"
    path.parent.mkdir(parents=True)
    pd.DataFrame(example_tables()["train_reward/heldout_scores.csv"]).to_csv(path, index=False)
    return root


@pytest.fixture(scope="module")
def scored(root):
    """The tables with score and judge that main passes on, and the facts it returns."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "score", lambda *args: seen.setdefault("found", score(*args)))
        seen["facts"] = main(BASE, PARAMS, root)
    return seen


score = stage.score


def report(root, name: str) -> bytes:
    return (root / "reports/score_responses" / name).read_bytes()


def test_scores_are_the_models_own_of_one_text_at_a_time(root, scored, tokenizer):
    """Read at the end of the turn; a cut answer is closed for the reward model."""
    (answers, *_), _ = scored["found"]
    prompts = dict(
        enumerate(tokenizer(f"Question {i}?", add_special_tokens=False)["input_ids"] for i in range(11))
    )
    reward = LlamaForSequenceClassification.from_pretrained(root / "models/reward").eval()
    base = LlamaForCausalLM.from_pretrained(root / "models/base").eval()
    judge = stage.load_judge(root / "models/judge")
    assert set(answers["model"]) == {"base", "dpo", "ppo", "chosen"}
    for row in answers.iloc[::5].itertuples():
        prompt, ids = prompts[row.prompt_id], row.response_ids
        ending = closed(ids, tokenizer)
        with torch.no_grad():
            hidden = reward.model(torch.tensor([prompt + ending])).last_hidden_state[0, -1]
            assert row.score == pytest.approx((reward.score.weight[0] @ hidden).item(), abs=1e-4)
        alone = judge.scores(answer_means(base, [prompt], [ids], [judge.layer], 512, "fp32")[0])
        assert row.judge == pytest.approx(alone.item(), abs=1e-4)
        with torch.no_grad():
            logits = base(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.7
        logp = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()
        assert row.base_logp == pytest.approx(logp, rel=1e-5)


def test_preferred_answers_are_cut_where_the_models_are_and_are_one_a_prompt(root, tokenizer):
    preferred = stage.preferred_answers(root, LIMIT)
    assert preferred["prompt_id"].tolist() == [0, 1, 2, 3, 4]
    assert (preferred["response_ids"].map(len) <= LIMIT).all()
    assert preferred["ended"].tolist() == [ids[-1] == tokenizer.eos_token_id for ids in preferred["response_ids"]]
    assert not preferred["ended"].all() and preferred["ended"].any()  # a template's line break ends no answer


def test_what_it_writes(root, scored, capsys):
    metrics = json.loads(report(root, "metrics.json"))
    card = pd.read_csv(root / "reports/score_responses/scorecard.csv")
    cells = card.set_index(["model", "decoding", "measure"])
    (answers, *_), _ = scored["found"]
    for model, logp in {"dpo": -8.0, "ppo": -7.0}.items():
        own = answers[(answers["model"] == model) & (answers["decoding"] == "sampled")]
        kl = logp - own["base_logp"].mean()
        assert cells.loc[(model, "sampled", "kl"), "mean"] == pytest.approx(kl, rel=1e-5)
        assert metrics[model]["kl"] == pytest.approx(kl, rel=1e-5)
    of_base = answers[answers["model"] == "base"]
    assert cells.loc[("base", "sampled", "kl"), "mean"] == 0  # its own log-probs are those of the same pass
    assert cells.loc[("base", "sampled", "entropy"), "mean"] == pytest.approx(
        of_base.loc[of_base["decoding"] == "sampled", "base_entropy"].mean(), rel=1e-5
    )
    verdicts = json.loads(report(root, "verdicts.json"))
    assert list(verdicts) == ["dpo", "ppo"]
    words = ("better", "no difference found", "worse", "broken")
    assert all(found["word"] in words and found["reasons"] for found in verdicts.values())
    points = pd.read_csv(root / "reports/score_responses/frontier.csv")
    assert points.groupby("series", sort=False).size().to_dict() == {
        "Base": 1,
        "DPO": 1,
        "PPO": 1,
        "DPO's course": 3,
        "PPO's course": 3,
        "best of n": 5,
    }
    assert points["kl"].tolist()[3:9] == [0, 2, 4, 0, 2, 4]
    assert points.loc[0, ["kl", "win_rate"]].tolist() == [0, 0.5]
    assert metrics["prompts"] == 8 and set(metrics["preferred"]) == {"tokens", "emoji", "ended"}
    assert metrics["ppo"]["verdict"] == verdicts["ppo"]["word"]
    for name in ("frontier.png", "scores.png"):
        assert report(root, name)[:4] == b"\x89PNG"
    assert scored["facts"]["tokens"] > 0


def test_the_verdicts_are_the_last_lines(root, capsys):
    main(BASE, PARAMS, root)
    verdicts = json.loads(report(root, "verdicts.json"))
    last = capsys.readouterr().out.strip().splitlines()[-2:]
    for line, label, found in zip(last, ("DPO", "PPO"), verdicts.values(), strict=True):
        assert line == f"{label}: {found['word']}: {'; '.join(found['reasons'])}"


def test_it_repeats(root, scored):
    before = {path.name: path.read_bytes() for path in (root / "reports/score_responses").iterdir()}
    main(BASE, PARAMS, root)
    assert {path.name: path.read_bytes() for path in (root / "reports/score_responses").iterdir()} == before


def test_out_of_memory_halves_the_dial_and_changes_no_result(root, scored, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(stage, "score", lambda *args: seen.setdefault("found", score(*args)))
    short_of_memory.install(monkeypatch)
    main(BASE, PARAMS.replace(micro_batch_tokens=4000), root)
    for one, other in zip(scored["found"][0], seen["found"][0], strict=True):
        pd.testing.assert_frame_equal(other, one, rtol=1e-3, atol=1e-3)
    assert "score_responses: memory ran out: goes on with micro-batches of" in capsys.readouterr().out


def test_one_confidence_for_every_interval(root, scored):
    """That of analyze_logps: a wider one widens the scorecard's intervals and the frontier's."""
    width = {}
    text = (root / "params.yaml").read_text()
    for confidence in (0.95, 0.5):
        (root / "params.yaml").write_text(text.replace("confidence: 0.95", f"confidence: {confidence}"))
        main(BASE, PARAMS, root)
        card = pd.read_csv(root / "reports/score_responses/scorecard.csv")
        points = pd.read_csv(root / "reports/score_responses/frontier.csv")
        width[confidence] = (
            (card["high"] - card["low"]).sum(),
            (points["win_rate_high"] - points["win_rate_low"]).sum(),
        )
    (root / "params.yaml").write_text(text)
    assert all(wide > 1.5 * narrow for wide, narrow in zip(width[0.95], width[0.5], strict=True))


def test_ppos_objective_worked_example():
    answers = pd.DataFrame(
        {
            "decoding": ["sampled", "sampled", "greedy", "data"],
            "score": [3.0, 1.0, 3.0, 3.0],
            "ended": [True, False, True, True],
            "logp": [-6.0, -5.0, -6.0, np.nan],
            "base_logp": [-8.0, -4.0, -8.0, np.nan],
        }
    )
    # (3 - 1) / 2 - 0.1 * 2 and (1 - 1) / 2 - 0.5 - 0.1 * -1
    found = stage.objective(answers, PPO).tolist()
    assert found[:2] == pytest.approx([0.8, -0.4]) and np.isnan(found[2:]).all()
    assert stage.objective(answers, PPO | {"policy": "dpo"}).isna().all()


def test_texts_are_read_once(root, monkeypatch):
    counts = []

    def spy(self, prompts, *args, **how):
        counts.append(len(prompts))
        return real(self, prompts, *args, **how)

    real = FrozenSide.opinions
    monkeypatch.setattr(FrozenSide, "opinions", spy)
    main(BASE, PARAMS, root)
    answers = pd.DataFrame(read_parquet(root / "data/answers.parquet"))
    assert counts[0] <= 11 * len(WORDS) < len(answers) + 2 * 17  # prompts times texts, however often each was said


def test_a_course_that_began_elsewhere_is_measured_from_the_base(root, scored, tmp_path, capsys):
    """PPO's `ref_logp` is of the DPO model where it started from that; the axis is the distance to the base."""
    shutil.copytree(root, tmp_path / "root")
    other = tmp_path / "root"
    write_json(other / "reports/train_ppo/metrics.json", PPO | {"policy": "dpo", "temperature": 0.7})
    main(BASE, PARAMS, other)
    points = pd.read_csv(other / "reports/score_responses/frontier.csv")
    course = points[points["series"] == "PPO's course"].set_index("step")["kl"]
    looks = pd.DataFrame(read_parquet(other / "data/courses/ppo.parquet"))
    prompts = read_parquet(other / "data/tokenized/prompts_judge.parquet")
    asked = dict(zip(prompts["prompt_id"], prompts["input_ids"], strict=True))
    base = LlamaForCausalLM.from_pretrained(other / "models/base").eval()
    for step, look in looks.groupby("step"):
        differences = []
        for row in look.itertuples():
            ids = list(row.response_ids)
            with torch.no_grad():
                logits = base(torch.tensor([asked[row.prompt_id] + ids])).logits[0, -len(ids) - 1 : -1] / 0.7
            differences.append(row.logp - logits.log_softmax(-1)[range(len(ids)), ids].sum().item())
        assert course[step] == pytest.approx(np.mean(differences), abs=1e-3)
    write_json(other / "reports/train_ppo/metrics.json", PPO | {"policy": "dpo", "temperature": 1.0})
    main(BASE, PARAMS, other)
    points = pd.read_csv(other / "reports/score_responses/frontier.csv")
    assert "PPO's course" not in set(points["series"]) and "DPO's course" in set(points["series"])
    assert "PPO's course is left out of the frontier: it was sampled at temperature 1.0" in capsys.readouterr().out
