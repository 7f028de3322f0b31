"""Runs TRL 1.12.0's own PPOTrainer on the tiny models and writes what it saw and said to tests/rl/stock_ppo.json.

TRL has dropped the trainer since, so this runs in an environment of its own (as `make bench-ppo` makes it):

    PYTHON_OF_TRL_1_12 tests/support/stock_ppo.py

tests/rl/test_stock_parity.py holds our rewards, advantages, losses and passes equal to it.
"""

import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.support.tiny_ppo import EOS, PAD, VOCABULARY, make_policy, make_prompts, make_reward_model  # noqa: E402

DEFAULTS = {
    "per_device_train_batch_size": 8,
    "total_episodes": 24,
    "num_ppo_epochs": 2,
    "num_mini_batches": 1,
    "response_length": 12,
    "stop_token": "eos",
    "missing_eos_penalty": 1.0,
    "learning_rate": 1e-3,
    "local_rollout_forward_batch_size": 8,
    "num_sample_generations": 0,
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "seed": 5,
    "disable_tqdm": True,
    "logging_steps": 1,
}
CASES = {
    "plain": {},
    "k3, whitened rewards": {"kl_estimator": "k3", "whiten_rewards": True},
    "discounted": {"num_ppo_epochs": 3, "gamma": 0.9, "lam": 0.8, "kl_coef": 0.5, "cliprange": 0.05},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), padding_side="left"
    )
    tokenizer.pad_token, tokenizer.eos_token = f"w{PAD}", f"w{EOS}"
    return tokenizer


def run(options: dict) -> list[dict]:
    """Three updates of the stock trainer: prompts, responses as sampled, and every metric it logged."""
    from trl.experimental import ppo
    from trl.experimental.ppo import ppo_trainer

    rollouts = []
    generation = ppo_trainer.batch_generation

    def recorded(model, queries, *args, **kwargs):
        query_responses, logits = generation(model, queries, *args, **kwargs)
        width = queries.shape[1]
        prompts = [[token for token in row if token != PAD] for row in queries.tolist()]
        rollouts.append({"prompts": prompts, "responses": query_responses[:, width:].tolist()})
        return query_responses, logits

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(ppo_trainer, "batch_generation", recorded):
        args = ppo.PPOConfig(output_dir=folder, **DEFAULTS | options)
        set_seed(args.seed)
        policy = make_policy()
        trainer = ppo.PPOTrainer(
            args=args,
            processing_class=make_tokenizer(),
            model=policy,
            ref_model=make_policy(),
            reward_model=make_reward_model(make_policy()),
            value_model=make_reward_model(make_policy()),
            train_dataset=Dataset.from_dict({"input_ids": make_prompts()}),
            eval_dataset=Dataset.from_dict({"input_ids": make_prompts(6, seed=9)}),
        )
        trainer.train()
    log = [{name: value for name, value in row.items() if name != "eps"} for row in trainer.state.log_history]
    return [rollout | {"metrics": metrics} for rollout, metrics in zip(rollouts, log, strict=True)]


def main() -> None:
    import transformers
    import trl

    torch.set_num_threads(1)
    result = {
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "defaults": DEFAULTS,
        "cases": {name: {"options": options, "updates": run(options)} for name, options in CASES.items()},
    }
    path = Path(__file__).resolve().parents[1] / "rl/stock_ppo.json"
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    ended = [EOS in r for case in result["cases"].values() for u in case["updates"] for r in u["responses"]]
    print(f"wrote {path.name}: {sum(ended)} of {len(ended)} answers ended")


if __name__ == "__main__":
    main()
