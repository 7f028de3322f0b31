"""Tiny models and prompts for PPO, the same bytes under every version of torch and transformers."""

import hashlib
import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

PAD, EOS, VOCABULARY = 0, 2, 32


def _config(hidden_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
        num_labels=1,
    )


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int) -> None:
    """Writes weights that depend on seed, name and shape alone: no library's initialisation, no global state."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed} {name.removeprefix('model.')}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def make_policy(eos_logit: float = 2.0, seed: int = 0, hidden_size: int = 32) -> LlamaForCausalLM:
    """A tiny Llama whose EOS is common and whose pad token is out of reach.

    The first feature is near constant at the output, so that its output weights act as a bias.
    """
    model = LlamaForCausalLM(_config(hidden_size))
    fill(model, seed)
    model.model.embed_tokens.weight[:, 0] = 1.0  # about sqrt(32) = 5.7 after the final norm
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[PAD, 0] = -10.0
    model.lm_head.weight[EOS, 0] = eos_logit / 5.0
    return model.eval()


@torch.no_grad()
def make_reward_model(policy: LlamaForCausalLM, seed: int = 7) -> LlamaForSequenceClassification:
    """A reward model on the policy's own backbone."""
    model = LlamaForSequenceClassification(_config(policy.config.hidden_size))
    model.model.load_state_dict(policy.model.state_dict())
    fill(model.score, seed)
    model.score.weight.mul_(10 / math.sqrt(policy.config.hidden_size))
    return model.eval()


def make_prompts(count: int = 40, seed: int = 3) -> list[list[int]]:
    """Prompts of 3 to 8 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
