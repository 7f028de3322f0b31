"""Log-probabilities of completions: the textbook function, and one that never makes the logits.

`get_log_prob` takes (B, T, V) logits and is the definition. `CompletionLogps` computes the same numbers from
packed sequences: the output layer runs on completion positions only, over slices of the vocabulary, and its
backward pass recomputes them, so that memory does not grow with batch x length x vocabulary. torch's own
`linear_cross_entropy` does that for the log-prob alone; PPO wants the entropy of the same slices beside it, and
one function serves both trainings.
"""

from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from stages.lib.model.attention import TiedGradient, hidden_states, lean_embedding, use_packed_attention
from stages.lib.model.loading import autocast
from stages.lib.model.packing import PackedBatch, packed_groups, read_tokens, rows_at
from stages.lib.run.errors import UserError

GPU_SLICE_ELEMENTS = 2**25  # 128 MB: fewer, larger products; a card's cache would hold neither
SLICE_ELEMENTS = 2**22  # logits held at a time: 16 MB in fp32, small enough for a CPU's last-level cache


def get_log_prob(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each completion given its prompt.

    log pi(y|x) = sum_t log pi(y_t | x, y_<t). A sum, not a mean: the DPO loss
    compares whole completions (arXiv:2305.18290, Eq. 7).

    Args:
        logits: (B, T, V); position t predicts token t + 1. The shift happens here.
        labels: (B, T) prompt and completion token ids, padded.
        mask: (B, T) 1 on completion tokens, end of turn included; 0 elsewhere.

    Returns:
        (B,) float32, in nats, never positive.

    Raises:
        ValueError: logits, labels and mask differ in batch size or length.
    """
    if logits.shape[:2] != labels.shape or labels.shape != mask.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)} and mask {tuple(mask.shape)} "
            "must agree in batch size and length"
        )
    per_token_logps = torch.gather(
        logits[:, :-1].float().log_softmax(-1), dim=2, index=labels[:, 1:, None]
    ).squeeze(2)
    return torch.where(mask[:, 1:].bool(), per_token_logps, 0.0).sum(-1)


class _TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[label], in slices of the vocabulary, recomputed in backward.

    Inside a Function's forward and backward autocast casts nothing that has its dtype already.

    Slices of the vocabulary rather than of rows: each row of the weight's gradient is then written once. A slice
    of a float32 weight is rounded to the dtype of `hidden` where it is used, rather than all of it beforehand.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, with_entropies: bool, tied: TiedGradient | None
    ):
        maximum = hidden.new_full((len(hidden),), torch.finfo(torch.float32).min, dtype=torch.float32)
        total = torch.zeros_like(maximum)  # sum of exp(logit - maximum)
        weighted = torch.zeros_like(maximum)  # sum of exp(logit - maximum) * (logit - maximum)
        for part in weight.split(_slice_rows(hidden)):
            logits = (hidden @ part.to(hidden.dtype).T).float()
            previous, maximum = maximum, torch.maximum(maximum, logits.amax(-1))
            logits -= maximum[:, None]
            rescale = torch.exp(previous - maximum)
            exp = torch.exp(logits)
            if with_entropies:
                weighted = rescale * (weighted + total * (previous - maximum)) + (exp * logits).sum(-1)
            total = rescale * total + exp.sum(-1)
        log_normalizer = maximum + total.log()
        ctx.save_for_backward(hidden, weight, labels, log_normalizer)
        ctx.tied = tied
        entropies = total.log() - weighted / total if with_entropies else None
        if with_entropies:
            ctx.mark_non_differentiable(entropies)
        # each row's own logit, from the same product in the same precision
        of_labels = weight[labels].to(hidden.dtype)
        label_logits = (hidden[:, None, :] @ of_labels[:, :, None]).float().flatten()
        return label_logits - log_normalizer, entropies

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, labels, log_normalizer = ctx.saved_tensors
        step = _slice_rows(hidden)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # not of a frozen layer
        for start in range(0, len(weight), step):
            part = weight[start : start + step].to(hidden.dtype)
            # d logp / d logits = one-hot(label) - softmax(logits)
            grad_logits = (hidden @ part.T).float().sub_(log_normalizer[:, None]).exp_().neg_()
            here = (
                labels - start
            )  # the label's column, where it lies in this slice: no index that the host must know
            inside = (here >= 0) & (here < len(part))
            grad_logits.scatter_add_(1, here.clamp(0, len(part) - 1)[:, None], inside[:, None].float())
            grad_logits = (grad_logits.mul_(grad[:, None])).to(hidden.dtype)
            grad_hidden += grad_logits @ part
            if grad_weight is not None:
                grad_weight[start : start + step] = grad_logits.T @ hidden
        if ctx.tied is not None:
            ctx.tied.of_output, grad_weight = grad_weight, None
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def _slice_rows(hidden: Tensor) -> int:
    elements = GPU_SLICE_ELEMENTS if hidden.is_cuda else SLICE_ELEMENTS
    return max(1, elements // max(1, len(hidden)))


def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor, tied: TiedGradient | None = None) -> Tensor:
    """Log-probability of each label, equal to `log_softmax(hidden @ weight.T)` gathered at the labels.

    Without the (N, V) logits. Products run in autocast's dtype where it is on; sums in float32 always.

    Args:
        hidden: (N, H) last hidden states at the positions that predict the labels.
        weight: (V, H) of the output layer.
        labels: (N,) token ids.
        tied: takes the weight's gradient, for an embedding that passes it on (`lean_embedding`).

    Returns:
        (N,) log-probabilities, float32, in nats.
    """
    return _TokenLogps.apply(_in_autocast_dtype(hidden), weight, labels, False, tied)[0]


def token_logps_and_entropies(
    hidden: Tensor, weight: Tensor, labels: Tensor, tied: TiedGradient | None = None
) -> tuple[Tensor, Tensor]:
    """`token_logps`, and the entropy of each row's distribution: (N,) each, float32, nats.

    The entropies carry no gradient.
    """
    return _TokenLogps.apply(_in_autocast_dtype(hidden), weight, labels, True, tied)


def _in_autocast_dtype(tensor: Tensor) -> Tensor:
    device_type = tensor.device.type
    autocast = torch.is_autocast_enabled(device_type)
    return tensor.to(torch.get_autocast_dtype(device_type)) if autocast else tensor


class CompletionLogps(nn.Module):
    """A causal language model as a function from packed sequences to their completions' log-probs.

    A module, so that DistributedDataParallel and FSDP can wrap the whole computation.
    """

    def __init__(self, model: PreTrainedModel):
        """
        Raises:
            UserError: the model's logits are not its last hidden state times the output weights (a bias,
                a soft cap or a scale lies between), so the log-probs would be of another distribution.
        """
        super().__init__()
        self.model = model
        _check_output_layer(model)

    def forward(self, batch: PackedBatch) -> Tensor:
        """(S,) summed completion log-probs of the S packed sequences, float32, in nats.

        Raises:
            RuntimeError: `use_packed_attention` is not switched on.
        """
        with lean_embedding(self.model) as tied:
            hidden = hidden_states(self.model.get_decoder(), batch)
        weight = output_weight(self.model)
        logps = token_logps(rows_at(hidden, batch.completion_index), weight, batch.labels, tied)
        return logps.new_zeros(batch.num_completions).index_add(0, batch.label_sequence, logps)


class TokenLogps(nn.Module):
    """A causal language model as a function from packed sequences to each response token's log-prob and entropy.

    Both are of the distribution that is sampled from: logits divided by the temperature.
    """

    def __init__(self, model: PreTrainedModel, temperature: float):
        """
        Raises:
            UserError: the model's logits are not its last hidden state times the output weights.
        """
        super().__init__()
        self.model = model
        self.temperature = temperature
        _check_output_layer(model)

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """(N,) log-probs and (N,) entropies, these without gradient; float32, nats, in the order of the labels."""
        with lean_embedding(self.model) as tied:
            hidden = hidden_states(self.model.get_decoder(), batch)
        return self.of_hidden(rows_at(hidden, batch.completion_index), batch.labels, tied)

    def of_hidden(self, hidden: Tensor, labels: Tensor, tied: TiedGradient | None = None) -> tuple[Tensor, Tensor]:
        """The same from (N, H) last hidden states before the (N,) labels; `tied` as `token_logps` takes it."""
        weight = output_weight(self.model)
        return token_logps_and_entropies(hidden / self.temperature, weight, labels, tied)


@torch.no_grad()
def read_answers(
    policy: TokenLogps,
    prompts: list[list[int]],
    responses: list[list[int]],
    micro_batch_tokens: int,
    precision: str,
    progress: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the tokens of B responses, without gradient.

    Returns:
        (N,) and (N,) float32 on the CPU: answer after answer, in the order given.
    """
    device = policy.model.device
    tokens = sum(map(len, prompts)) + sum(map(len, responses))
    bar = tqdm(total=tokens, desc=progress, unit="tok", unit_scale=True, disable=progress is None)

    def read(_: list[int], batch: PackedBatch) -> tuple[Tensor, Tensor]:
        return policy(batch)

    with use_packed_attention(policy.model), autocast(device, precision), bar:
        logps, entropies = read_tokens(read, prompts, responses, micro_batch_tokens, device, bar)
    return logps, entropies


def output_weight(model: PreTrainedModel) -> Tensor:
    """(V, H) of the model's output layer."""
    return cast(nn.Linear, model.get_output_embeddings()).weight


@torch.no_grad()
def _check_output_layer(model: PreTrainedModel) -> None:
    ids = torch.arange(4, device=model.device)[None]
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    expected = model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(hidden @ output_weight(model).T, expected, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"{type(model).__name__}: its logits are not hidden states times output weights "
            "(bias, soft cap or scale); choose another base model"
        )


@torch.no_grad()
def completion_logps(
    model: PreTrainedModel,
    prompts: list[list[int]],
    completions: list[list[int]],
    micro_batch_tokens: int,
    precision: str,
    progress: str | None = None,
) -> Tensor:
    """Summed log-probs of many completions, without gradient, in micro-batches of at most so many tokens.

    Args:
        model: on the device where the work shall happen; put in eval mode here.
        prompts, completions: N lists of token ids each.
        micro_batch_tokens: a memory dial; in fp32 it changes the result by rounding only (below 1e-5 relative).
        precision: 'bf16', 'fp16' or 'fp32'.
        progress: a label for a progress bar over tokens, or None for none.

    Returns:
        (N,) float32 on the CPU, in nats, in the order given.
    """
    model.eval()
    logps = torch.empty(len(prompts))
    module = CompletionLogps(model)
    tokens = sum(map(len, prompts)) + sum(map(len, completions))
    bar = tqdm(total=tokens, desc=progress, unit="tok", unit_scale=True, disable=progress is None)
    with use_packed_attention(model), autocast(model.device, precision), bar:
        for group, batch in packed_groups(prompts, completions, micro_batch_tokens, model.device, bar):
            logps[group] = module(batch).cpu()
    return logps
