"""The dial: a number stays, `auto` follows the device, and what does not fit is tried with half as much."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.lib.model import memory
from stages.lib.model.memory import MemoryDial, memory_dial, reading_dial, tokens_that_fit

OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def fits(most: int, error: Exception = OUT):
    """Work that gives its micro_batch_tokens, and raises where they are more."""

    def work(name: str, micro_batch_tokens: int, times: int) -> str:
        if micro_batch_tokens > most:
            raise error
        return name * times + str(micro_batch_tokens)

    return work


def test_what_does_not_fit_is_tried_with_half_and_later_calls_begin_there(capsys):
    dial, undone = MemoryDial(4096, "train_dpo"), []
    assert dial.run(fits(1000), "a", times=2, undo=lambda: undone.append("a step")) == "aa512"
    assert undone == ["a step"] * 3
    assert capsys.readouterr().out.splitlines()[-1] == (
        "train_dpo: memory ran out: goes on with micro-batches of 512 tokens"
    )
    assert dial.run(fits(1000), "b", times=1) == "b512" and not capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_python_and_cpus_run_out_of_memory_too(error):
    assert MemoryDial(1000).run(fits(500, error), "a", times=1) == "a500"


def test_where_less_cannot_help_the_error_stays(monkeypatch):
    with pytest.raises(torch.OutOfMemoryError):
        MemoryDial(4096).run(fits(0), "a", times=1)
    with pytest.raises(RuntimeError, match="shapes"):
        MemoryDial(4096).run(fits(0, RuntimeError("shapes")), "a", times=1)
    monkeypatch.setenv("WORLD_SIZE", "2")  # the other process would wait in a collective operation
    with pytest.raises(torch.OutOfMemoryError):
        MemoryDial(4096).run(fits(1000), "a", times=1)


def test_a_number_stays_and_auto_is_the_measured_best_on_a_cpu(tiny_model):
    for asked, tokens in ((77, 77), ("auto", 1536)):
        assert memory_dial(asked, 1536, tiny_model, "train_dpo", training=True).tokens == tokens
    assert (reading_dial("auto"), reading_dial(77), reading_dial(9000)) == ("auto", 4096, 9000)


def test_auto_on_a_card_follows_its_memory(tiny_model, monkeypatch):
    with torch.device("meta"):
        smollm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49_152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            )
        )
    # 4 bytes x 2,112 features: x 12 for the one layer at work, x 6 x 30 layers kept in training; and for 134,515,008
    # parameters a gradient and two moments. 70 % of what a T4 has free:
    assert tokens_that_fit(14e9, smollm, training=False) == int(0.7 * 14e9 / 101_376) == 96_669
    assert tokens_that_fit(14e9, smollm, training=True) == int(0.7 * (14e9 - 1_614_180_096) / 1_622_016) == 5_345
    assert (
        tokens_that_fit(140e9, smollm, training=True) == int(0.7 * (140e9 - 1_614_180_096) / 1_622_016) == 59_722
    )
    parts = int(0.7 * (14e9 - 1_614_180_096 / 4) / 1_622_016)  # sharded over four cards
    assert tokens_that_fit(14e9, smollm, training=True, parts=4) == parts == 5_867
    assert tokens_that_fit(1e9, smollm, training=True) == 256 and tokens_that_fit(1e12, smollm, False) == 2**17
    smollm.requires_grad_(False)
    monkeypatch.setattr(memory, "free_memory", lambda device: 14e9)
    assert memory_dial("auto", 8192, smollm, "reference_logps").tokens == 96_669


def test_what_torch_keeps_for_itself_counts_as_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5_000, 16_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000)
    assert memory.free_memory(torch.device("cuda")) == 7_000
    assert memory.free_memory(torch.device("cpu")) is None
