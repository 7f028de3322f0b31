"""PPO's options: TRL's, and one for each departure from TRL 1.12.0's trainer, with its reason."""

from dataclasses import dataclass, field

from trl.experimental import ppo as trl_ppo


@dataclass
class PPOConfig(trl_ppo.PPOConfig):
    """TRL's PPOConfig, with a named option for every departure from its trainer.

    `bf16` and `fp16` really set the precision (autocast over fp32 weights; frozen models and the sampler hold
    their matrices in it); with neither set all is fp32. `max_grad_norm` clips, for policy and value apart, so
    that a wild value gradient does not shrink the policy's step; 0 does not clip, as in stock.
    """

    micro_batch_tokens: int = field(
        default=4096,
        metadata={
            "help": "Memory dial: tokens per forward and backward pass. 0: per_device_train_batch_size rows, "
            "as in stock."
        },
    )
    stock_sampling: bool = field(
        default=False,
        metadata={
            "help": "Sample as stock does: fp32 weights, the global random state, the pad token allowed (a policy "
            "that draws it cuts its answer short without an EOS), (batch, length, vocabulary) scores kept."
        },
    )
    score_unfinished_at_eos: bool = field(
        default=True,
        metadata={
            "help": "Close an unfinished answer with EOS before scoring: the head was trained at EOS and nowhere "
            "else. Stock reads it at whatever token came last."
        },
    )
    score_on_last_token: bool = field(
        default=True,
        metadata={
            "help": "Pay the score on the answer's last token. Stock pays it one position later where the answer "
            "ended early, and on the last token where it did not: two discounts for one event."
        },
    )
    seeded_permutation: bool = field(
        default=True,
        metadata={"help": "Shuffle mini-batches from the seed; stock draws from NumPy's global state, unseeded."},
    )
    token_means: bool = field(
        default=True,
        metadata={
            "help": "Losses and statistics are means over the tokens of a mini-batch, however it is split. Stock "
            "takes the mean of micro-batch means, and dilutes approxkl, ratio and entropy with padding."
        },
    )
    whiten_advantages: bool = field(
        default=True,
        metadata={
            "help": "Advantages to mean 0 and variance 1 (as in stock). Without, a reward that says nothing moves "
            "nothing: whitening blows the value model's error up to unit size."
        },
    )
    score_norm_episodes: int = field(
        default=0,
        metadata={
            "help": "Answers of the reference whose scores set mean 0 and variance 1 for the run "
            "(arXiv:1909.08593, section 2.1); kl_coef and missing_eos_penalty are then in standard deviations. "
            "0: raw scores."
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={
            "help": "Nats per answer: adapts kl_coef towards this KL (arXiv:1909.08593, section 2.2). None: fixed."
        },
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Leaves the policy alone for the rest of an update once approxkl exceeds it (the early "
            "stopping of OpenAI's Spinning Up)."
        },
    )
    value_warmup_updates: int = field(
        default=0,
        metadata={
            "help": "Updates that train the value model only: the reward head knows scores, not expected ones."
        },
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the value model; None: learning_rate, as in stock."}
    )
    max_kl: float | None = field(
        default=None,
        metadata={"help": "Nats per answer above which the policy counts as collapsed. None: no bound."},
    )
    min_entropy: float | None = field(
        default=None,
        metadata={"help": "Nats per token below which the policy counts as collapsed. None: no bound."},
    )
    eval_every: int = field(
        default=0,
        metadata={
            "help": "Updates between answers to eval_dataset; the policy with the best mean score there is kept. "
            "0: never."
        },
    )


#: the options that reproduce TRL 1.12.0 (policy/entropy_avg apart where answers end early: see the test)
STOCK = {
    "micro_batch_tokens": 0,
    "stock_sampling": True,
    "score_unfinished_at_eos": False,
    "score_on_last_token": False,
    "seeded_permutation": False,
    "token_means": False,
    "whiten_advantages": True,
    "max_grad_norm": 0.0,
}
