"""Fixtures without network or GPU: a tiny ChatML tokenizer and a tiny random Llama that agree with each other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stages.lib.data import sizes

# the same examples every run, and no time limit on one: a busy machine is no failure
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

REPO = Path(__file__).resolve().parent.parent
PLANTED_TOKEN = "hf_" + "PlantedByTheTests"  # in the environment of the smoke run, and to be in none of its files

#: sizes of the tiny models; the vocabulary is the tiny tokenizer's
TINY: dict[str, Any] = dict(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)

# SmolLM2's template: a default system message, and every turn ends in <|im_end|> and a newline
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

#: they read the smoke run, which is made once
SMOKE_FILES = ("tests/test_pipeline.py", "tests/test_security.py", "tests/test_workflow.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`pytest -n`: what a file has made stays in its process, and the files that read the smoke run are in one."""
    from xdist.scheduler import LoadFileScheduling  # not there where the tests run without it

    class FilesTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "smoke" if file in SMOKE_FILES else file

    return FilesTogether(config, log)


@pytest.fixture(autouse=True)
def _process_as_at_its_start():
    torch.set_num_threads(1)  # tiny models gain nothing from more, and tests may run beside other work
    torch.set_flush_denormal(False)  # pick_device turns it on; hypothesis needs the smallest floats
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps the first precision of a process


class ShapesMade(TorchDispatchMode):
    """Collects the shapes of all tensors that operations in the block give, forward and backward."""

    def __enter__(self) -> set[torch.Size]:
        self.shapes: set[torch.Size] = set()
        super().__enter__()
        return self.shapes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        parts = out if isinstance(out, tuple | list) else [out]
        self.shapes.update(part.shape for part in parts if isinstance(part, torch.Tensor))
        return out


@pytest.fixture
def few_pairs_do_for_the_judge(monkeypatch):
    """For sets of a handful of pairs: tokenize_pairs and train_judge ask for no more than one."""
    monkeypatch.setattr(sizes, "JUDGE_PAIRS", 1)
    monkeypatch.setattr(sizes, "JUDGE_PROMPTS", 1)


@pytest.fixture(scope="session")
def embedded_pairs() -> list[dict]:
    """The embedded data set's rows: topic, prompt, chosen, rejected."""
    lines = (REPO / "data/pairs_embedded.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def tokenizer(embedded_pairs) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens with SmolLM2's special tokens (ids 0, 1, 2) and template; pad is not EOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([row["chosen"] for row in embedded_pairs[:100]], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    return fast


@pytest.fixture
def tiny_model(tokenizer) -> LlamaForCausalLM:
    """A random Llama shaped like SmolLM (2 layers, 4 heads over 2 KV heads, tied embeddings), fp32, eval."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **TINY,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_base(tiny_model, tokenizer, tmp_path) -> Path:
    """A project root whose models/base holds the tiny model and tokenizer, as fetch_base would leave it."""
    tiny_model.save_pretrained(tmp_path / "models/base")
    tokenizer.save_pretrained(tmp_path / "models/base")
    return tmp_path


def dvc(root: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs `dvc ARGUMENTS` in `root` as a user with the environment activated would."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "dvc", *arguments]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if check and result.returncode != 0:
        raise AssertionError(
            f"dvc {' '.join(arguments)} failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        )
    return result


def copy_of_project(target: Path) -> Path:
    """The project as it stands, tracked and new files alike, as a Git repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (REPO / name).is_file():  # a file deleted but not yet committed is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, target / name)
    for command in (
        ["init", "-q", "-b", "main"],
        ["add", "-A"],
        ["commit", "-q", "-m", "The project as it stands"],
    ):
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *identity, *command], cwd=target, check=True)
    for name, value in (("user.name", "Test"), ("user.email", "test@example.org")):
        subprocess.run(["git", "config", name, value], cwd=target, check=True)
    return target


@pytest.fixture(scope="session")
def smoke_project(tmp_path_factory) -> Path:
    """A fresh clone in which the smoke recipe has run through real DVC, as the README says to run it."""
    root = copy_of_project(tmp_path_factory.mktemp("smoke"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_TOKEN", PLANTED_TOKEN)
        dvc(root, "exp", "run", *(root / "recipes/smoke.txt").read_text().split())
    return root
