"""Download what was published into an empty cache and hold it against the local models.

Reads   reports/publish_hub/receipt.json, models/hub    what was uploaded, from what
        the Hub                                         the commits that the receipt names
Writes  nothing; exits with 1 if anything differs

Run     python -m stages.check_hub       after a push; HF_TOKEN or `hf auth login` for private repositories

Every file must have the hash that the receipt names; DPO and PPO must answer "What's your morning routine
like?" greedily with the very tokens of the local models; the reward model must give the stored example (where none
could be shown: an answer of ours) the same scores as the local one, the chosen answer above the rejected.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from stages.lib.data.hub_source import hub_errors
from stages.lib.run.artefacts import read_json, sha256_of_file
from stages.lib.run.errors import UserError

QUESTION = "What's your morning routine like?"
NEW_TOKENS = 256
ANSWER = "I love to start with a walk. What about you?"


def main(root: Path = Path("."), new_tokens: int = NEW_TOKENS) -> None:
    path = root / "reports/publish_hub/receipt.json"
    receipt: dict[str, Any] = read_json(path) if path.is_file() else {"pushed": False}
    if not receipt["pushed"]:
        raise UserError(f"{path}: nothing was pushed; run `dvc exp run -S publish_hub.push=true` first")
    for name, repository in receipt["repositories"].items():
        local = root / "models/hub" / name
        repo_id, commit = f"{receipt['owner']}/{name}", receipt["commits"][name]
        with tempfile.TemporaryDirectory() as cache:  # empty: nothing is taken from an earlier download
            with hub_errors(repo_id, commit):
                downloaded = Path(snapshot_download(repo_id, revision=commit, cache_dir=cache))
            check_files(repo_id, downloaded, repository["sha256"])
            if repository["model"] == "models/reward":
                check_scores(repo_id, downloaded, local)
            else:
                check_answer(repo_id, downloaded, local, new_tokens)


def check_files(repo_id: str, downloaded: Path, expected: dict[str, str]) -> None:
    """Every published file is there and has the receipt's hash."""
    for path, sha256 in expected.items():
        file = downloaded / path
        if not file.is_file() or sha256_of_file(file) != sha256:
            raise UserError(f"{repo_id}: {path} is not what was published; push again")
    print(f"{repo_id}: {len(expected)} files as published")


def check_answer(repo_id: str, downloaded: Path, local: Path, new_tokens: int) -> None:
    """The downloaded policy says, token for token, what the local one says."""
    answers = [answer(folder, new_tokens) for folder in (downloaded, local)]
    if answers[0] != answers[1]:
        raise UserError(f"{repo_id}: answers differently from {local}")
    text = AutoTokenizer.from_pretrained(local).decode(answers[0], skip_special_tokens=True)
    print(f"{repo_id}: the same {len(answers[0])} tokens as {local}: {text[:200]!r}")


def check_scores(repo_id: str, downloaded: Path, local: Path) -> None:
    """The downloaded reward model scores the stored example like the local one, and the chosen answer higher."""
    path = downloaded / "example.json"
    example: dict[str, Any] = read_json(path) if path.is_file() else {"prompt": QUESTION, "chosen": ANSWER}
    prompt = example.get("messages") or [{"role": "user", "content": example["prompt"]}]
    asked = prompt, example.get("tools")
    answers = {side: example[side] for side in ("chosen", "rejected") if side in example}
    there, here = (
        {side: score(folder, *asked, text) for side, text in answers.items()} for folder in (downloaded, local)
    )
    if there != here:
        raise UserError(f"{repo_id}: scores {there} where {local} scores {here}")
    if "rejected" in there and there["chosen"] <= there["rejected"]:
        raise UserError(f"{repo_id}: of example.json's answers the rejected has the higher score: {there}")
    print(
        f"{repo_id}: the same scores as {local}: "
        + ", ".join(f"{side} {value:.3f}" for side, value in there.items())
    )


@torch.no_grad()
def answer(folder: Path, new_tokens: int) -> list[int]:
    """Token ids of the greedy answer to QUESTION, in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def score(folder: Path, prompt: list[dict], tools: list[dict] | None, completion: str) -> float:
    """The reward model's score of one answer, read at its end of turn, in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    messages = [*prompt, {"role": "assistant", "content": completion}]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False).rstrip("\n")
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    return model(**inputs).logits.item()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"check_hub: error: {error}")
