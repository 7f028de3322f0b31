"""Completion log-probs: the definition against independent oracles, the fast path against the definition."""

import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import stages.lib.model.logps as logps_module
from stages.lib.model.attention import TiedGradient, use_packed_attention
from stages.lib.model.logps import (
    CompletionLogps,
    TokenLogps,
    completion_logps,
    get_log_prob,
    token_logps,
    token_logps_and_entropies,
)
from stages.lib.model.packing import pack, pad, pad_collate_fn
from stages.lib.rl.critics import ValueHead
from stages.lib.run.errors import UserError
from tests.conftest import REPO, ShapesMade


def random_ids(generator, *lengths, vocab=512):
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


def textbook_logps(model, prompts, completions):
    """(N,) by the notebook's way: padded on both sides of the boundary, full logits, get_log_prob."""
    rows = [
        {"prompt_input_ids": p, "chosen_input_ids": c, "rejected_input_ids": c}
        for p, c in zip(prompts, completions, strict=True)
    ]
    batch = pad_collate_fn(rows, pad_token_id=0)
    ids = torch.cat([batch["prompt_input_ids"], batch["chosen_input_ids"]], dim=1)
    attention = torch.cat([batch["prompt_attn_mask"], batch["chosen_attn_mask"]], dim=1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    mask = torch.cat([torch.zeros_like(batch["prompt_attn_mask"]), batch["chosen_attn_mask"]], dim=1)
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits
    return get_log_prob(logits, ids, mask)


def test_get_log_prob_worked_example():
    # vocabulary {0, 1}; logits (0, ln 3) give p(1) = 3/4. Prompt token, then 1, 0, then padding:
    # log 3/4 + log 1/4 = log 3/16 = -1.673976
    logits = torch.tensor([0.0, 3.0]).log().clamp(min=0).expand(1, 4, 2)
    labels, mask = torch.tensor([[0, 1, 0, 0]]), torch.tensor([[0, 1, 1, 0]])
    assert get_log_prob(logits, labels, mask).item() == pytest.approx(-1.673976, abs=1e-6)


def test_get_log_prob_equals_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    mask = (torch.rand(3, 7, generator=generator) < 0.6).long()
    targets = labels[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    expected = -cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none").sum(1)
    torch.testing.assert_close(get_log_prob(logits, labels, mask), expected, rtol=0, atol=1e-5)


def test_probabilities_of_all_completions_sum_to_one():
    # all 4^3 completions of a 4-token vocabulary; logits depend on the prefix through a fixed random table
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for completion in itertools.product(range(4), repeat=3):
        labels = torch.tensor([[2, *completion]])
        total += get_log_prob(table[labels], labels, torch.tensor([[0, 1, 1, 1]])).exp().item()
    assert total == pytest.approx(1.0, abs=1e-5)


def test_get_log_prob_of_bf16_logits_sums_in_fp32():
    logits = torch.randn(1, 400, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels, mask = torch.zeros(1, 400, dtype=torch.int64), torch.ones(1, 400, dtype=torch.int64)
    exact = get_log_prob(logits.double(), labels, mask)
    out = get_log_prob(logits, labels, mask)
    assert out.dtype == torch.float32
    assert out.item() == pytest.approx(exact.item(), rel=1e-5)


def test_nonsense_under_the_mask_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(1, 6, 9, generator=generator), torch.randint(0, 9, (1, 6), generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 0, 0]])
    before = get_log_prob(logits, labels, mask)
    logits[:, 4:] = float("nan")  # positions that predict padding
    labels[:, 4:] = 7
    assert torch.equal(get_log_prob(logits, labels, mask), before)


@pytest.mark.parametrize(("labels", "mask"), [((2, 6), (2, 5)), ((2, 5), (2, 6)), ((3, 6), (3, 6))])
def test_get_log_prob_refuses_shapes_that_differ(labels, mask):
    with pytest.raises(ValueError, match="agree"):
        get_log_prob(torch.zeros(2, 6, 4), torch.zeros(labels, dtype=torch.int64), torch.zeros(mask))


@pytest.mark.parametrize("slice_elements", [1, 7, 64, 2**22])
@pytest.mark.parametrize(("rows", "width", "vocab"), [(1, 3, 5), (13, 8, 101), (64, 16, 257)])
def test_token_logps_equal_log_softmax_with_gradients(monkeypatch, slice_elements, rows, width, vocab):
    monkeypatch.setattr(logps_module, "SLICE_ELEMENTS", slice_elements)
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, requires_grad=True)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator)

    log_softmax = (hidden @ weight.T).log_softmax(-1)
    expected = log_softmax.gather(1, labels[:, None]).squeeze(1)
    expected_entropy = torch.distributions.Categorical(logits=log_softmax).entropy()
    expected_grads = torch.autograd.grad(expected, (hidden, weight), upstream)

    actual, entropy = token_logps_and_entropies(hidden, weight, labels)
    grads = torch.autograd.grad(actual, (hidden, weight), upstream)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(token_logps(hidden, weight, labels), actual)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_token_logps_survive_huge_logits():
    hidden, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0], [0.5]])
    logps, entropy = token_logps_and_entropies(hidden, weight, torch.tensor([1]))
    assert logps.item() == -2000.0 and entropy.item() == 0.0


def test_a_tied_weight_gets_one_gradient_of_its_size_and_a_pad_in_a_text_none(tiny_model, monkeypatch):
    """The embedding adds its rows to the output layer's gradient, in place: torch would copy it for a sparse one."""
    left: list[int | None] = []

    def take(self: TiedGradient, weight: torch.Tensor) -> torch.Tensor:
        left.append(None if self.of_output is None else self.of_output.data_ptr())
        return taken(self, weight)

    taken = TiedGradient.take
    monkeypatch.setattr(TiedGradient, "take", take)
    pad = tiny_model.config.pad_token_id
    prompts, completions = [[5, pad, 6], [7, 8]], [[9, 2], [5, 5, 2]]
    policy = CompletionLogps(tiny_model)
    with use_packed_attention(tiny_model):
        policy(pack(prompts, completions, True)).sum().backward()
    weight = tiny_model.get_input_embeddings().weight
    assert left == [weight.grad.data_ptr()]
    found = weight.grad
    weight.grad = None
    total = 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion])
        mask = torch.tensor([[0] * len(prompt) + [1] * len(completion)])
        total = total + get_log_prob(tiny_model(input_ids=ids).logits, ids, mask).sum()
    total.backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_packed_logps_equal_the_textbook_with_gradients(tiny_model, share_prefixes):
    generator = torch.Generator().manual_seed(3)
    prompts = random_ids(generator, 5, 1, 17)
    prompts = [[7, 8, 9, *prompt] for prompt in [*prompts, prompts[0]]]  # a beginning in common, and equal ones
    completions = random_ids(generator, 1, 9, 40, 2)  # a one-token completion among them
    expected = textbook_logps(tiny_model, prompts, completions)
    expected.sum().backward()
    expected_grads = {name: p.grad.clone() for name, p in tiny_model.named_parameters()}
    tiny_model.zero_grad()

    module = CompletionLogps(tiny_model)
    with use_packed_attention(tiny_model):
        actual = module(pack(prompts, completions, share_prefixes))
    actual.sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in tiny_model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_grads[name], rtol=1e-4, atol=1e-5)


def test_a_rows_log_prob_does_not_depend_on_its_batch_mates(tiny_model):
    generator = torch.Generator().manual_seed(4)
    prompts, completions = random_ids(generator, 8, 3, 12), random_ids(generator, 6, 20, 11)
    module = CompletionLogps(tiny_model)
    with torch.no_grad(), use_packed_attention(tiny_model):
        together = module(pack(prompts, completions))
        other_mates = module(pack([prompts[0], *random_ids(generator, 40)], [completions[0], [5] * 30]))
        alone = torch.cat([module(pack([p], [c])) for p, c in zip(prompts, completions, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_mates[:1], alone[:1], rtol=1e-5, atol=1e-5)


MODULES = {
    "log-probs": (CompletionLogps, LlamaForCausalLM),
    "log-probs and entropies": (partial(TokenLogps, temperature=1.0), LlamaForCausalLM),
    "values": (ValueHead, LlamaForSequenceClassification),
}


def check_gradients(of: str) -> None:
    """Of many answers to a prompt, on two threads: eleven backward passes agree to the bit."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    wrapper, architecture = MODULES[of]
    module = wrapper(architecture(LlamaConfig(vocab_size=64, pad_token_id=0, num_labels=1, **sizes)))
    generator = torch.Generator().manual_seed(0)
    prompts = random_ids(generator, *[4] * 40, vocab=64) * 8
    batch = pack(prompts, random_ids(generator, *[3] * len(prompts), vocab=64), share_prefixes=True)

    def gradients() -> list[torch.Tensor]:
        module.zero_grad()
        with use_packed_attention(module.model):
            output = module(batch)
        values = output[0] if isinstance(output, tuple) else output
        (values * torch.linspace(0.1, 1, len(values))).sum().backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    first = gradients()
    for _ in range(10):
        assert all(map(torch.equal, gradients(), first))


def test_many_answers_to_a_prompt_give_the_same_gradient_to_the_bit_every_time():
    """`x[index]` adds on a CPU in the order in which threads come: rows of three answers and more then round anew.

    In a process of its own: threads once started here would be missing where another test forks.
    """
    script = "from tests.model import test_logps; [*map(test_logps.check_gradients, test_logps.MODULES)]"
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=True)


@pytest.mark.parametrize("micro_batch_tokens", [1, 33, 64, 10_000])
def test_completion_logps_keep_the_order_whatever_the_budget(tiny_model, micro_batch_tokens):
    generator = torch.Generator().manual_seed(5)
    prompts = random_ids(generator, 4, 20, 2, 9)
    prompts.append(prompts[1])
    completions = random_ids(generator, 7, 1, 30, 3, 3)
    with torch.no_grad():
        expected = textbook_logps(tiny_model, prompts, completions)
    actual = completion_logps(tiny_model, prompts, completions, micro_batch_tokens, "fp32")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert tiny_model.config._attn_implementation == "sdpa"  # given back as it was


def test_no_tensor_of_length_times_vocabulary_is_made(tiny_model, monkeypatch):
    # the textbook's logits would be (1, 65, 512): nothing as large may appear, forward or backward
    monkeypatch.setattr(logps_module, "SLICE_ELEMENTS", 60 * 32)
    module = CompletionLogps(tiny_model)
    with use_packed_attention(tiny_model), ShapesMade() as shapes:
        module(pack([[5] * 5], [[6] * 60])).sum().backward()
    assert max(shape.numel() for shape in shapes if shape[:1] != (512,)) < 60 * 512  # (512, 32): the weight


def test_output_layers_with_a_bias_are_refused(tiny_model):
    tiny_model.lm_head = torch.nn.Linear(32, 512, bias=True)
    with pytest.raises(UserError, match="logits"):
        CompletionLogps(tiny_model)


def test_padding_with_nonsense_leaves_the_textbook_result_identical(tiny_model):
    # the other half of the contract: what pad_collate_fn pads with never reaches a log-prob
    prompts, completions = [[5, 6, 7], [8]], [[9], [10, 11, 12]]
    with torch.no_grad():
        expected = textbook_logps(tiny_model, prompts, completions)
        ids = pad([torch.tensor(p + c) for p, c in zip(prompts, completions, strict=True)], 499)
        mask = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]])
        logits = tiny_model(input_ids=ids).logits  # right padding: causality hides it
        torch.testing.assert_close(get_log_prob(logits, ids, mask), expected, rtol=1e-5, atol=1e-5)
