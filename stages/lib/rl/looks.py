"""A look at a policy in training: what it answers to a few prompts that nothing is trained on or reported from.

Training is watched, and a policy chosen, on the judge's prompts; held-out prompts only report.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from stages.lib.data.repetition import rep_n
from stages.lib.model.logps import TokenLogps, read_answers
from stages.lib.model.memory import MemoryDial
from stages.lib.rl.rewards import sum_by_answer
from stages.lib.rl.rollout import Rollout
from stages.lib.run.artefacts import write_parquet

COLUMNS = ("step", "episode", "prompt_id", "response_ids", "ended", "logp", "ref_logp", "score")
BABBLE = 0.15  # rep-4 above the start's by so much is a loop


def habits(responses: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """How a policy answers, in three means: rep_4, ended (share) and tokens."""
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return {
        "rep_4": float(np.mean([rep_n(text) for text in texts])),
        "ended": float(np.mean([response[-1] == tokenizer.eos_token_id for response in responses])),
        "tokens": float(np.mean([len(response) for response in responses])),
    }


def babbles(now: dict[str, float], start: dict[str, float]) -> str | None:
    """A warning in words where the policy has begun to loop or to say next to nothing; else None."""
    if now["rep_4"] > start["rep_4"] + BABBLE:
        return f"repeats itself: rep-4 {now['rep_4']:.2f}, at the start {start['rep_4']:.2f}"
    if now["tokens"] < 0.1 * start["tokens"]:
        return f"says next to nothing: {now['tokens']:.0f} tokens an answer, at the start {start['tokens']:.0f}"
    return None


@dataclass
class Course:
    """The answers of every look, for the stages that measure them; plain lists, as a checkpoint holds them."""

    prompt_ids: list[int]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, step: int, episode: int, rollout: Rollout) -> None:
        """The answers of one look, in the order of `prompt_ids`, and what the frozen side says of them."""
        count = len(self.prompt_ids)
        lengths = rollout.lengths
        rows = {
            "step": [step] * count,
            "episode": [episode] * count,
            "prompt_id": self.prompt_ids,
            "response_ids": rollout.responses,
            "ended": rollout.ended.tolist(),
            "logp": sum_by_answer(rollout.logps, lengths).tolist(),
            "ref_logp": sum_by_answer(rollout.ref_logps, lengths).tolist()
            if len(rollout.ref_logps)
            else [None] * count,
            "score": rollout.raw_scores.tolist() or [None] * count,
        }
        for name, values in rows.items():
            self.columns.setdefault(name, []).extend(values)

    def compare_with(
        self, reference: TokenLogps, prompts: list[list[int]], precision: str, dial: MemoryDial
    ) -> None:
        """Fills in the reference's log-probs of all answers.

        Args:
            reference: at the temperature that the answers were sampled at.
            prompts: token ids, in the order of `prompt_ids`.
            dial: tokens of a forward pass.
        """
        responses = self.columns.get("response_ids", [])
        asked = prompts * (len(responses) // len(prompts))
        if responses:
            work = reference, asked, responses
            label = "course under the reference"
            logps, _ = dial.run(read_answers, *work, precision=precision, progress=label)
            lengths = torch.tensor([len(response) for response in responses])
            self.columns["ref_logp"] = sum_by_answer(logps, lengths).tolist()

    def write(self, path: Path) -> None:
        """One row per look and prompt: step, episode, prompt_id, response_ids, ended, logp, ref_logp, score.

        Log-probs are sums over the answer at the sampling temperature, in nats.
        """
        types = {"response_ids": pa.list_(pa.int32()), "logp": pa.float32()}
        types |= {"ref_logp": pa.float32(), "score": pa.float32()}
        types |= {"step": pa.int64(), "episode": pa.int64(), "prompt_id": pa.int64(), "ended": pa.bool_()}
        write_parquet(path, {name: pa.array(self.columns.get(name, []), types[name]) for name in COLUMNS})
