import json

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.lib.data.chat import apply_chat_template, tokenize_row
from stages.lib.model.base_model import load_folder, load_gguf, set_special_tokens, split_digits
from stages.lib.run.errors import UserError

PAD = "<|endoftext|>"


@pytest.fixture
def folder(tiny_base):
    return tiny_base / "models/base"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_split_digits():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>"], show_progress=False)
    bpe.train_from_iterator(["12", "\n\n", "."] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert fast.tokenize("12") == ["12"] and fast.tokenize("\n\n1.") == ["Ċ", "Ċ", "1", "."]
    assert split_digits(fast).tokenize("12") == ["1", "2"]
    assert fast.tokenize("\n\n1.") == ["ĊĊ", "1", "."]


def test_load_folder_gives_the_saved_weights_in_fp32(folder, tiny_model):
    model, tokenizer = load_folder(folder, "tiny")
    assert tokenizer.is_fast
    for name, weight in tiny_model.state_dict().items():
        assert (model.state_dict()[name] == weight).all(), name
    half = tiny_model.half()
    half.save_pretrained(folder)
    assert {weight.dtype.itemsize for weight in load_folder(folder, "tiny")[0].parameters()} == {4}


def damaged(folder, how):
    weights = folder / "model.safetensors"
    if how == "no safetensors":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "weights missing":
        tensors = load_file(weights)
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors, weights, {"format": "pt"})
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "other shape":
        edit_json(folder / "config.json", hidden_size=64)
    elif how == "quantised":
        edit_json(
            folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
        )
    elif how == "own code":
        edit_json(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "code.Mine"})
    elif how == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "no tokenizer":
        (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no safetensors", "has no .*safetensors"),
        ("adapter", "is an adapter .*not a whole model"),
        ("weights missing", "1 weights are missing, model.layers.1.mlp.up_proj.weight"),
        ("cut off", "not a causal language model that can be loaded"),
        ("other shape", "not a causal language model that can be loaded"),
        ("quantised", "is quantised"),
        ("own code", "not a causal language model that can be loaded"),
        ("no config", "not a causal language model that can be loaded"),
        ("no tokenizer", "not a causal language model that can be loaded"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(folder, how, words):
    damaged(folder, how)
    with pytest.raises(UserError, match=f"lab/tiny: {words}"):
        load_folder(folder, "lab/tiny")


def test_special_tokens_are_set_everywhere(folder):
    model, tokenizer = load_folder(folder, "tiny")
    tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.temperature = 0.3
    set_special_tokens(model, tokenizer, PAD, "tiny")
    for owner in (tokenizer, model.config, model.generation_config):
        assert (owner.pad_token_id, owner.bos_token_id, owner.eos_token_id) == (0, 1, 2)
    assert model.generation_config.temperature is None


@pytest.mark.parametrize(
    ("change", "pad", "words"),
    [
        ({}, "<|im_end|>", "is the EOS"),
        (
            {},
            "[PAD]",
            "has no token '.PAD.'; .* such as <.endoftext.> .after -S: 'fetch_base.pad_token=\"<.endoftext.>\"'",
        ),
        ({}, "<|im_start|>", "chat template uses"),
        ({"chat_template": None}, PAD, "no chat template"),
        ({"eos_token": None}, PAD, "no EOS"),
        ({"chat_template": "{{ messages[0]['content'] }}"}, PAD, "does not end a turn with '<.im_end.>'"),
        ({"chat_template": "{{ raise_exception('x') }}"}, PAD, "chat template fails"),
    ],
)
def test_a_tokenizer_that_cannot_chat_is_refused(folder, change, pad, words):
    model, tokenizer = load_folder(folder, "tiny")
    for name, value in change.items():
        setattr(tokenizer, name, value)
    with pytest.raises(UserError, match=f"tiny: .*{words}"):
        set_special_tokens(model, tokenizer, pad, "tiny")


def test_more_tokens_than_embedding_rows(folder):
    model, tokenizer = load_folder(folder, "tiny")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(UserError, match="513 tokens, the embedding 512 rows"):
        set_special_tokens(model, tokenizer, "[PAD]", "tiny")


def test_not_a_gguf(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF then nothing")
    with pytest.raises(UserError, match="a.gguf: not a GGUF model"):
        load_gguf(tmp_path / "a.gguf")


# the parts of the published templates that matter here, in ChatML
LLAMA_3_2 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}"
    "{%- endif %}{%- endif %}{{- '<|im_start|>system\nToday Date: ' + date_string + '<|im_end|>\n' }}"
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim "
    "+ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN_3 = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- message.content.lstrip('\n') + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{%- endif %}"
)
PAIR = {"prompt": "Hi?", "chosen": "Hey!", "rejected": "Good day."}


def settled(folder, template):
    """The tokenizer with this template, after set_special_tokens, saved and loaded again."""
    model, tokenizer = load_folder(folder, "tiny")
    tokenizer.chat_template = template
    set_special_tokens(model, tokenizer, PAD, "tiny")
    tokenizer.save_pretrained(folder)
    return load_folder(folder, "tiny")[1]


@pytest.mark.parametrize("asked", ["'%d %b %Y'", '"%d %b %Y"'])
def test_a_prompt_has_the_same_ids_tomorrow(folder, monkeypatch, asked):
    import transformers.utils.chat_template_utils as utils

    tokenizer = settled(folder, LLAMA_3_2.replace("'%d %b %Y'", asked))

    class Tomorrow(utils.datetime):
        @classmethod
        def now(cls, *_):
            return cls(2031, 5, 6)

    monkeypatch.setattr(utils, "datetime", Tomorrow)
    rendered = apply_chat_template(PAIR, tokenizer)
    assert "Today Date: 26 Jul 2024<|im_end|>" in rendered["prompt"]
    assert rendered["chosen"] == "Hey!<|im_end|>\n"


def test_a_date_that_cannot_be_held_fast_is_refused(folder):
    with pytest.raises(UserError, match="tiny: its chat template writes today's date"):
        settled(folder, LLAMA_3_2.replace("'%d %b %Y'", "format_of_the_day"))


def test_a_model_that_can_think_answers_at_once(folder):
    tokenizer = settled(folder, QWEN_3)
    rendered = apply_chat_template(PAIR, tokenizer)
    assert rendered["prompt"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert rendered["chosen"] == "Hey!<|im_end|>\n" and rendered["rejected"] == "Good day.<|im_end|>\n"
    assert tokenizer.decode(tokenize_row(rendered, tokenizer)["chosen_input_ids"]) == "Hey!<|im_end|>\n"


def test_a_plain_template_stays_as_it_is(folder, tokenizer):
    assert settled(folder, tokenizer.chat_template).chat_template == tokenizer.chat_template
