"""One measured run of a side of bench_generate, ours or transformers', in a process of its own."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from bench.bench_dpo import read_pairs
from bench.measure import REPO
from bench.worker import answer, now, peak_mb
from stages.lib.model.generate import generate, in_precision
from stages.lib.model.loading import load_causal_lm, load_tokenizer, pick_device

TEMPERATURE = 0.7


@torch.no_grad()
def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of `spec["side"]` for each number of rows, after a short batch to warm up."""
    os.environ["DEVICE"] = spec["device"]
    device, precision = pick_device(), spec["precision"]
    tokenizer = load_tokenizer(Path(spec["base"]))
    tokenizer.eos_token = tokenizer.pad_token  # which is never sampled: no answer ends
    model = in_precision(load_causal_lm(Path(spec["base"]), device), precision)
    model.generation_config.eos_token_id = None  # transformers takes the model's where the caller's is None
    rows = read_pairs(REPO / "data/pairs_embedded.jsonl", max(spec["rows"]))
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        for row in rows
    ]

    def ours(prompts: list[list[int]], tokens: int) -> int:
        options = {"temperature": TEMPERATURE, "batch_size": len(prompts)}
        return sum(map(len, generate(model, tokenizer, prompts, tokens, device, precision, **options)))

    def theirs(prompts: list[list[int]], tokens: int) -> int:
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
        pad = tokenizer.pad_token_id
        sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            **sampling, max_new_tokens=tokens, pad_token_id=pad, eos_token_id=None, suppress_tokens=[pad]
        )
        made = model.generate(**inputs, generation_config=config)
        return made[:, inputs["input_ids"].shape[1] :].numel()

    decode = ours if spec["side"] == "ours" else theirs
    decode(prompts[:2], 4)
    seconds = {}
    for count in spec["rows"]:
        started = now(device)
        made = decode(prompts[:count], spec["tokens"])
        seconds[count] = now(device) - started
        if made != count * spec["tokens"]:
            raise AssertionError(f"{spec['side']}: {made} tokens instead of {count * spec['tokens']}")
    return {"seconds": seconds, "peak_memory_mb": peak_mb(device)}


if __name__ == "__main__":
    answer(measure)
