"""Decoding against transformers' own generate, and the promise that batch mates do not matter."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stages.lib.model import generate as generation
from stages.lib.model.generate import generate, in_precision, sample_token
from stages.lib.model.loading import freeze
from stages.lib.run.errors import UserError
from tests.conftest import ShapesMade
from tests.support.fake_gpu import OnGpu, on_gpu

CPU = torch.device("cpu")
PROMPTS = [[1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63, 64, 65, 66], [1, 70, 71], [1, 80, 81, 82, 83]]


def run(model, tokenizer, prompts=PROMPTS, new=12, **options):
    return generate(model, tokenizer, prompts, new, CPU, "fp32", **options)


@pytest.fixture
def lively_model(tiny_model):
    """The tiny model with larger weights, so that its choices are not near ties."""
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.mul_(4)
    return tiny_model


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("beginning", [[], [9, 8, 7]])
def test_greedy_is_transformers_greedy_whatever_the_batch(lively_model, tokenizer, batch_size, beginning):
    expected = []
    prompts = [beginning + prompt for prompt in PROMPTS]
    for prompt in prompts:
        output = lively_model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=[tokenizer.pad_token_id],
        )
        expected.append(output[0, len(prompt) :].tolist())
    assert run(lively_model, tokenizer, prompts, batch_size=batch_size) == expected


def test_where_memory_runs_out_fewer_are_answered_at_a_time(lively_model, tokenizer, monkeypatch, capsys):
    expected = run(lively_model, tokenizer, temperature=0.7)
    choose, rows = generation._next_tokens, []

    def short(logits, uniform, *args):
        rows.append(len(logits))
        if len(logits) > 2 and len(rows) > 3:  # not at the first token: what was answered is answered anew
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return choose(logits, uniform, *args)

    monkeypatch.setattr(generation, "_next_tokens", short)
    assert run(lively_model, tokenizer, temperature=0.7) == expected
    assert rows[:5] == [5, 5, 5, 5, 2] and "goes on with 2 answers at a time" in capsys.readouterr().out


def test_what_all_prompts_begin_with_is_read_once(lively_model, tokenizer):
    read = []
    lively_model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: read.append(args[0].numel())
    )
    run(lively_model, tokenizer, [[*range(20, 40), 1, 2, 3], [*range(20, 40), 4, 5, 6, 7]], new=2)
    assert read == [20, 2 * 4, 2]


def test_the_output_weights_are_not_copied_for_each_row(tiny_model, tokenizer):
    """Frozen weights and the slice `hidden[:, -1:]`: torch would multiply row by row, with as many copies."""
    with ShapesMade() as shapes:
        run(freeze(tiny_model), tokenizer, new=2)
    assert max(shape.numel() for shape in shapes) == tiny_model.lm_head.weight.numel()


def test_a_batch_shrinks_by_whole_blocks_of_rows(lively_model, tokenizer):
    rows = []
    lively_model.get_input_embeddings().register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    answers = run(lively_model, tokenizer, [[1, 40 + i] for i in range(9)], new=[8, 1, 2, 3, 4, 5, 6, 7, 8])
    assert [len(answer) for answer in answers] == [8, 1, 2, 3, 4, 5, 6, 7, 8]
    # 9 8 7 6 5 4 3 2 rows are left to answer, after the prefix
    assert rows == [1, 9, 8, 8, 8, 8, 4, 4, 4]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_samples_do_not_depend_on_batch_mates(lively_model, tokenizer, top_p):
    options = {"temperature": 1.5, "top_p": top_p, "seed": 3}
    alone = run(lively_model, tokenizer, batch_size=1, **options)
    together = run(lively_model, tokenizer, batch_size=16, **options)
    assert alone == together
    assert run(lively_model, tokenizer, **(options | {"seed": 4})) != alone


def test_eos_ends_an_answer_and_is_part_of_it(lively_model, tokenizer):
    """EOS made likely: answers end at different steps, each in exactly one EOS, the others go on."""
    bias = torch.zeros(512)
    bias[tokenizer.eos_token_id] = 4.0
    lively_model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    answers = run(lively_model, tokenizer, prompts=PROMPTS * 8, new=40, temperature=3.0)
    ended = [answer for answer in answers if answer[-1] == tokenizer.eos_token_id]
    assert len({len(answer) for answer in ended}) > 3
    for answer in answers:
        assert tokenizer.eos_token_id not in answer[:-1]
        assert len(answer) == 40 or answer[-1] == tokenizer.eos_token_id


def test_the_pad_token_is_never_generated(lively_model, tokenizer):
    bias = torch.zeros(512)
    bias[tokenizer.pad_token_id] = 100.0
    lively_model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}):
        assert all(tokenizer.pad_token_id not in answer for answer in run(lively_model, tokenizer, **options))


def test_each_prompt_may_have_its_own_budget(lively_model, tokenizer):
    full = run(lively_model, tokenizer, new=12)
    budgets = [1, 12, 5, 3, 7]
    cut = run(lively_model, tokenizer, new=budgets)
    assert cut == [answer[:budget] for answer, budget in zip(full, budgets, strict=True)]


def test_each_prompt_may_have_its_own_temperature(lively_model, tokenizer):
    greedy, warm, hot = (run(lively_model, tokenizer, temperature=heat) for heat in (None, 0.7, 1.5))
    mixed = run(lively_model, tokenizer, temperature=[None, 0.7, 0.7, None, 1.5])
    assert mixed == [greedy[0], warm[1], warm[2], greedy[3], hot[4]]
    assert len({tuple(answers[4]) for answers in (greedy, warm, hot)}) == 3


def test_the_model_given_is_left_as_it_was(tiny_model, tokenizer):
    tiny_model.train()
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    generate(tiny_model, tokenizer, PROMPTS, 4, CPU, "bf16")
    assert tiny_model.training
    for name, value in tiny_model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])
    copied = in_precision(tiny_model, "bf16")
    assert copied.lm_head.weight is copied.model.embed_tokens.weight  # still tied
    assert copied.model.rotary_emb.inv_freq.dtype == torch.float32  # in bf16 it would lose the positions
    assert in_precision(tiny_model, "fp32") is tiny_model


def test_sample_token_follows_the_distribution():
    """Shares of 20,000 draws lie within five standard errors of the softmax."""
    logits = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -1.0])
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    tokens = sample_token(logits.expand(20_000, 5), uniform, temperature=2.0, top_p=1.0)
    expected = F.softmax(logits / 2.0, dim=-1)
    shares = torch.bincount(tokens, minlength=5) / 20_000
    assert (shares - expected).abs().max() < 5 * 0.5 / 20_000**0.5
    assert shares[1] == 0


def float64_inverse_transform(logits, uniform):
    """Numpy's searchsorted in numpy's cumulative sum."""
    cumulative = np.cumsum(torch.softmax(logits, -1).double().numpy(), -1)
    targets = uniform.double().numpy() * cumulative[:, -1]
    return [int(np.searchsorted(row, target, "right")) for row, target in zip(cumulative, targets, strict=True)]


@pytest.mark.parametrize("size", [1, 5, 255, 256, 257, 5000, 49_152])
def test_sample_token_is_the_float64_inverse_transform(size):
    generator = torch.Generator().manual_seed(size)
    for spread in (0.0, 1.0, 30.0):
        logits = torch.randn(32, size, generator=generator) * spread
        uniform = torch.rand(32, generator=generator)
        assert sample_token(logits, uniform, 1.0, 1.0).tolist() == float64_inverse_transform(logits, uniform)


@pytest.mark.parametrize("allowed", [[0], [300], [999], [0, 999], [255, 256], [256, 511, 512], [3, 4, 700]])
def test_what_has_no_probability_is_never_drawn(allowed):
    """Whatever the uniform number, its extremes included, and wherever blocks begin and end."""
    logits = torch.full((1000,), -torch.inf)
    logits[allowed] = torch.linspace(0, -40, len(allowed))
    extremes = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])
    uniform = torch.cat([extremes, torch.rand(500, generator=torch.Generator().manual_seed(0))])
    for top_p in (1.0, 0.9):
        tokens = sample_token(logits.expand(len(uniform), -1), uniform, 1.0, top_p)
        assert set(tokens.tolist()) <= set(allowed)


def test_the_largest_uniform_number_selects_the_last_token_of_probability():
    generator = torch.Generator().manual_seed(1)
    for size in (300, 1000, 49_152):
        logits = torch.randn(16, size, generator=generator)
        logits[:, -7:] = -torch.inf
        largest = torch.full((16,), 1 - 2**-53, dtype=torch.float64)
        assert (sample_token(logits, largest, 1.0, 1.0) < size - 7).all()


def test_shares_over_several_blocks_pass_a_chi_square_test():
    """600 tokens lie in three blocks; 60,000 draws; fixed seed, so the p-value is too."""
    logits = torch.randn(600, generator=torch.Generator().manual_seed(2))
    uniform = torch.rand(60_000, generator=torch.Generator().manual_seed(3))
    counts = torch.bincount(sample_token(logits.expand(60_000, -1), uniform, 0.7, 1.0), minlength=600)
    expected = torch.softmax(logits.double() / 0.7, -1) * 60_000
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert abs(statistic - 599) < 4 * (2 * 599) ** 0.5  # mean and variance of chi-square: 599, 2 * 599


def test_nucleus_worked_example():
    # sorted 0.5, 0.3, 0.15, 0.05; top_p 0.7 keeps the first two, in shares 0.625 and 0.375
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().expand(4, 4)
    uniform = torch.tensor([0.0, 0.62, 0.63, 0.9999999])
    assert sample_token(logits, uniform, 1.0, 0.7).tolist() == [1, 1, 3, 3]


def test_a_flat_distribution_widens_the_search_for_the_nucleus():
    uniform = torch.tensor([0.0, 0.5, 0.999999])
    tokens = sample_token(torch.zeros(3, 5000), uniform, 1.0, 0.9)
    assert len(set(tokens.tolist())) == 3


@pytest.mark.parametrize(
    "bad",
    [
        {"prompts": [[1], []]},
        {"new": 0},
        {"new": [1]},
        {"temperature": 0.0},
        {"temperature": [0.7]},
        {"temperature": 1.0, "top_p": 0.0},
    ],
)
def test_bad_arguments_are_refused(tiny_model, tokenizer, bad):
    with pytest.raises(ValueError):
        run(tiny_model, tokenizer, **bad)


def test_no_prompts_no_answers(tiny_model, tokenizer):
    assert run(tiny_model, tokenizer, prompts=[]) == []


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        ({}, torch.nan),
        ({"temperature": 1.0}, torch.nan),
        ({"temperature": 1.0}, torch.inf),
        ({"temperature": 1.0, "top_p": 0.9}, torch.nan),
    ],
)
def test_logits_that_are_no_numbers_are_an_error_and_no_token(lively_model, tokenizer, options, bad):
    def spoil(module, args, logits):
        logits[-1, -1, 7] = bad  # one entry of one row

    lively_model.lm_head.register_forward_hook(spoil)
    with pytest.raises(UserError, match="logits are not numbers"):
        run(lively_model, tokenizer, **options)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on a card that is waited for: prompts are read whole, tokens looked at every eight."""
    for decision in ("is_read_at_once", "shares_prefixes", "is_plain_llama"):
        monkeypatch.setattr(generation, decision, lambda _: False)


MIXED = {"temperature": [None, 0.7, 1.5, 0.7, None], "top_p": 0.9}


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5}, MIXED], ids=["greedy", "sampled", "mixed"])
def test_looking_every_few_tokens_changes_no_answer(lively_model, tokenizer, request, options):
    """EOS likely, in every step somewhere; budgets on both sides of the looks."""
    bias = torch.zeros(512)
    bias[tokenizer.eos_token_id] = 4.0
    lively_model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    prompts = [[1, 40 + i, 3 * i] for i in range(40)]
    new = [[1, 7, 8, 9, 16, 17, 40, 40][i % 8] for i in range(40)]
    if options is MIXED:
        options = options | {"temperature": options["temperature"] * 8}
    at_once = run(lively_model, tokenizer, prompts, new=new, **options)
    request.getfixturevalue("on_a_gpu")
    assert run(lively_model, tokenizer, prompts, new=new, **options) == at_once
    ended = [len(answer) for answer in at_once if answer[-1] == tokenizer.eos_token_id]
    assert len(set(ended)) > 3 and max(ended) > 8 and len(ended) < 40


def test_rows_leave_where_the_host_looks(lively_model, tokenizer, on_a_gpu):
    rows = []
    lively_model.get_input_embeddings().register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    answers = run(lively_model, tokenizer, [[1, 40 + i] for i in range(9)], new=[20, 1, 2, 3, 4, 5, 6, 9, 20])
    assert [len(answer) for answer in answers] == [20, 1, 2, 3, 4, 5, 6, 9, 20]
    assert rows == [9] * 8 + [4] * 12


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, MIXED], ids=["greedy", "sampled", "mixed"])
def test_a_token_costs_a_gpu_no_wait(lively_model, tokenizer, monkeypatch, on_a_gpu, options):
    """Of all tensors that are made on a device and what is computed from them."""
    copied, plain = [], torch.tensor

    def tensor(values, *args, device=None, **how):
        copied.append(values)
        return on_gpu(plain(values, *args, **how)) if device is not None else plain(values, *args, **how)

    monkeypatch.setattr(torch, "tensor", tensor)
    no_end = torch.zeros(512)
    no_end[tokenizer.eos_token_id] = -torch.inf
    lively_model.lm_head.register_forward_hook(lambda module, args, logits: logits + no_end)
    counts = {}
    for new in (9, 24):
        copied.clear()
        OnGpu.waits.clear()
        run(lively_model, tokenizer, PROMPTS, new=new, **options)
        counts[new] = len(copied), dict(OnGpu.waits)
    # looks after 8 and 9 tokens, and after 8, 16 and 24; what a batch begins with is alike
    assert [waits.pop("tolist") for _, waits in counts.values()] == [2, 3]
    assert counts[9] == counts[24]


def test_logits_that_are_no_numbers_are_seen_at_the_next_look(lively_model, tokenizer, on_a_gpu):
    steps = []

    def spoil(module, args, logits):
        steps.append(1)
        if len(steps) == 3:
            logits[-1, -1, 7] = torch.nan

    lively_model.lm_head.register_forward_hook(spoil)
    for options in ({}, {"temperature": 1.0}):
        steps.clear()
        with pytest.raises(UserError, match="logits are not numbers"):
            run(lively_model, tokenizer, **options)
        assert len(steps) == 8
