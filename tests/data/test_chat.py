import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.lib.data.chat import (
    ChatError,
    apply_chat_template,
    closed_by_eos,
    completion_ids,
    generation_header_ids,
    seen_text,
    special_token_pattern,
    text_ids,
    to_implicit_prompt_preferences,
    tokenize_row,
    truncate,
)

PAIR = {"prompt": "Hi?", "chosen": "Hey!", "rejected": "Good day."}
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
PROMPT = SYSTEM + "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"


def test_implicit_prompt_preferences():
    assert to_implicit_prompt_preferences(PAIR | {"topic": "x"}) == {
        "chosen": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hey!"}],
        "rejected": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Good day."}],
    }


def test_rendering_worked_by_hand(tokenizer):
    rendered = apply_chat_template(to_implicit_prompt_preferences(PAIR), tokenizer)
    assert rendered == {"prompt": PROMPT, "chosen": "Hey!<|im_end|>\n", "rejected": "Good day.<|im_end|>\n"}


def test_a_row_of_three_plain_strings_is_rendered_as_its_messages_are(tokenizer, embedded_pairs):
    assert apply_chat_template(PAIR, tokenizer)["prompt"] == PROMPT
    for row in embedded_pairs:  # with its topic, as the data set has it
        assert apply_chat_template(row, tokenizer) == apply_chat_template(
            to_implicit_prompt_preferences(row), tokenizer
        )


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_texts_beside_messages_are_refused(tokenizer, name):
    messages = {column: [{"role": "user", "content": text}] for column, text in PAIR.items()}
    with pytest.raises(ChatError, match="row 7: 'prompt', 'chosen' and 'rejected' must be all texts"):
        apply_chat_template(messages | {name: PAIR[name], "where": "row 7"}, tokenizer)
    with pytest.raises(ChatError, match="all texts"):
        apply_chat_template({"chosen": "a", "rejected": "b"}, tokenizer)


def test_prompt_and_chosen_are_the_rendered_conversation(tokenizer):
    example = to_implicit_prompt_preferences(PAIR)
    rendered = apply_chat_template(example, tokenizer)
    for side in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(example[side], tokenize=False)
        assert rendered["prompt"] + rendered[side] == whole


def test_an_explicit_prompt_and_several_turns(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hey"},
        {"role": "user", "content": "How are you?"},
    ]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("Fine!", "I am an AI."))
    explicit = {"prompt": turns, "chosen": chosen, "rejected": rejected}
    implicit = {"chosen": turns + chosen, "rejected": turns + rejected}
    assert apply_chat_template(explicit, tokenizer) == apply_chat_template(implicit, tokenizer)
    assert apply_chat_template(explicit, tokenizer)["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_equals_trl(tokenizer):
    from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt

    example = to_implicit_prompt_preferences(PAIR)
    theirs = maybe_apply_chat_template(maybe_extract_prompt(example), tokenizer)
    assert apply_chat_template(example, tokenizer) == theirs


def test_a_template_with_another_beginning_names_the_row(tokenizer, monkeypatch):
    # puts the number of messages first, so the conversation does not start with the prompt
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }}{{ messages[0]['content'] }}")
    with pytest.raises(ChatError, match="row 17: the chat template does not render"):
        apply_chat_template(to_implicit_prompt_preferences(PAIR) | {"where": "row 17"}, tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no users here') }}")
    with pytest.raises(ChatError, match="example: .*no users here"):
        apply_chat_template(to_implicit_prompt_preferences(PAIR), tokenizer)


@pytest.mark.parametrize(
    "example",
    [
        {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]},
        to_implicit_prompt_preferences(PAIR | {"rejected": "Hey!"}),
    ],
)
def test_without_a_shared_prompt_or_a_difference(tokenizer, example):
    with pytest.raises(ChatError, match="must share a prompt and then differ"):
        apply_chat_template(example, tokenizer)


def test_truncation_sides_worked_by_hand(tokenizer):
    rendered = apply_chat_template(to_implicit_prompt_preferences(PAIR), tokenizer)
    whole = tokenize_row(rendered, tokenizer, None, None)
    assert tokenizer.decode(whole["prompt_input_ids"]) == PROMPT
    cut = tokenize_row(rendered, tokenizer, max_prompt_length=5, max_completion_length=2)
    assert cut["prompt_input_ids"] == whole["prompt_input_ids"][-5:]
    assert cut["chosen_input_ids"] == whole["chosen_input_ids"][:2]
    assert cut["rejected_input_ids"] == whole["rejected_input_ids"][:2]
    header = generation_header_ids(tokenizer)
    assert tokenizer.decode(header) == "<|im_start|>assistant\n"
    assert cut["prompt_input_ids"][-len(header) :] == header or len(header) > 5
    with pytest.raises(ValueError, match="max_prompt_length"):
        tokenize_row(rendered, tokenizer, max_prompt_length=0)


def test_no_special_token_is_added_or_doubled(tokenizer):
    # a tokenizer that puts its BOS before every text, as Llama's does
    import copy

    from tokenizers.processors import TemplateProcessing

    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert adding("a")["input_ids"][0] == tokenizer.bos_token_id
    rendered = apply_chat_template(to_implicit_prompt_preferences(PAIR), adding)
    ids = tokenize_row(rendered, adding)
    assert ids == tokenize_row(rendered, tokenizer)
    assert ids["prompt_input_ids"].count(tokenizer.bos_token_id) == 3  # system, user, assistant
    assert ids["chosen_input_ids"].count(tokenizer.eos_token_id) == 1


def test_max_length_cuts_the_completion_never_the_prompt():
    ids = {"prompt_input_ids": [1, 2, 3, 4], "a": [5, 6, 7], "b": [8]}
    assert truncate(ids, 3, None, 5) == {"prompt_input_ids": [2, 3, 4], "a": [5, 6], "b": [8]}
    assert truncate(ids, 9, None, 10) == ids
    assert truncate(ids, 3, 1, 5) == {"prompt_input_ids": [2, 3, 4], "a": [5], "b": [8]}
    assert truncate(ids, None, None, None) == ids
    with pytest.raises(ValueError, match="no room"):
        truncate(ids, 3, None, 3)


@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    completion=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    max_prompt=st.integers(1, 10),
    max_completion=st.none() | st.integers(1, 10),
    extra=st.integers(1, 10),
)
def test_truncation_properties(prompt, completion, max_prompt, max_completion, extra):
    max_length = max_prompt + extra
    cut = truncate({"prompt_input_ids": prompt, "c": completion}, max_prompt, max_completion, max_length)
    kept_prompt, kept = cut["prompt_input_ids"], cut["c"]
    assert prompt[len(prompt) - len(kept_prompt) :] == kept_prompt and len(kept_prompt) == min(
        len(prompt), max_prompt
    )
    assert completion[: len(kept)] == kept and kept
    assert len(kept_prompt) + len(kept) <= max_length
    if len(kept) < len(completion):  # not a token less than the limits allow
        assert len(kept) == max_completion or len(kept_prompt) + len(kept) == max_length


def test_closed_by_eos_worked_by_hand():
    assert closed_by_eos([1, 7], [5, 6, 2, 198], eos_token_id=2) == [1, 7, 5, 6, 2]
    assert closed_by_eos([1, 7], [5, 6, 9], eos_token_id=2) == [1, 7, 5, 6, 2]  # cut: the last id gives way
    assert closed_by_eos([1, 2], [5], eos_token_id=2) == [1, 2, 2]


def test_special_token_pattern_finds_added_tokens_too(tokenizer):
    pattern = special_token_pattern(tokenizer)
    for text in ("a<|im_end|>", "<|im_start|>system\n", "x <|endoftext|> y"):
        assert pattern.search(text)
        assert set(text_ids(text, tokenizer)) & {0, 1, 2}
    for text in ("im_end", "<|im_end|", "<| im_end |>", "|>", ""):
        assert not pattern.search(text)
        assert not set(text_ids(text, tokenizer)) & {0, 1, 2}


@given(text=st.text() | st.text("<|im_endsart>|", max_size=30))
def test_what_the_pattern_lets_pass_holds_no_special_id(tokenizer, text):
    has_special = bool(set(text_ids(text, tokenizer)) & {0, 1, 2})
    assert bool(special_token_pattern(tokenizer).search(text)) == has_special


def metaspace(tokenizer, embedded_pairs, prepend_scheme):
    """A tokenizer of SentencePiece's kind: words begin with '▁', and so does a text by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    bpe.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    texts = [text for row in embedded_pairs for text in (row["prompt"], row["chosen"], row["rejected"])]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted({letter for text in [*texts, PROMPT] for letter in text})
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = tokenizer.chat_template
    return fast


@pytest.mark.parametrize("prepend_scheme", ["always", "first"])
def test_a_completion_begins_as_the_model_would_begin_it(tokenizer, embedded_pairs, prepend_scheme):
    spaced = metaspace(tokenizer, embedded_pairs, prepend_scheme)
    for row in embedded_pairs[:50]:
        rendered = apply_chat_template(row, spaced)
        ids = tokenize_row(rendered, spaced, None)
        for side in ("chosen", "rejected"):
            together = text_ids(rendered["prompt"] + rendered[side], spaced)
            assert ids["prompt_input_ids"] + ids[f"{side}_input_ids"] == together
            assert not spaced.convert_ids_to_tokens(ids[f"{side}_input_ids"][0]).startswith("▁")
            assert spaced.convert_ids_to_tokens(text_ids(rendered[side], spaced)[0]).startswith("▁")  # alone


def test_byte_level_completions_are_as_they_were(tokenizer, embedded_pairs):
    for row in embedded_pairs[:50]:
        rendered = apply_chat_template(row, tokenizer)
        for side in ("chosen", "rejected"):
            alone = text_ids(rendered[side], tokenizer)
            assert completion_ids(rendered["prompt"], rendered[side], tokenizer) == alone


def test_a_border_within_a_token_gives_what_each_side_says_by_itself():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=bpe.pre_tokenizer.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(["\n\n", "a"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert fast.tokenize("a\n\nb") == ["a", "ĊĊ", "b"]
    ids = completion_ids("a\n", "\nb", fast)
    assert fast.convert_ids_to_tokens(ids) == ["Ċ", "b"]


def test_a_completion_that_cannot_be_cut_off_is_refused(tokenizer, embedded_pairs):
    spaced = metaspace(tokenizer, embedded_pairs, "always")
    assert spaced.tokenize("the") == ["▁the"]  # one token, in which the border would lie
    with pytest.raises(ChatError, match="the completion 'he' otherwise alone than after its prompt"):
        completion_ids("t", "he", spaced)


def test_added_tokens_that_are_plain_spaces_are_text(tokenizer):
    import copy

    spaced = copy.deepcopy(tokenizer)
    spaced.add_tokens([AddedToken("  ", normalized=False), AddedToken("\n\n"), AddedToken("<think>")])
    pattern = special_token_pattern(spaced)
    assert not pattern.search("two  spaces\n\nand a paragraph")
    assert pattern.search("<think>") and pattern.search("<|im_end|>")


def test_a_cut_answer_is_its_text_as_far_as_it_goes(tokenizer):
    text = "One two three 🙂 four."
    whole = tokenize_row(apply_chat_template(PAIR | {"chosen": text}, tokenizer), tokenizer)["chosen_input_ids"]
    assert seen_text(text, whole, tokenizer) == text
    for length in range(1, len(whole)):
        seen = seen_text(text, whole[:length], tokenizer)
        assert text.startswith(seen) and (seen == text) == (text in tokenizer.decode(whole[:length]))


SYSTEM_PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]


def test_what_a_template_leaves_out_is_said(tokenizer, monkeypatch):
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    example = {"prompt": SYSTEM_PROMPT, "chosen": [{"role": "assistant", "content": "a"}]}
    example |= {"rejected": [{"role": "assistant", "content": "b"}], "where": "row 5"}
    with pytest.raises(ChatError, match="row 5: the chat template leaves out the tool 'look_up'"):
        apply_chat_template(example | {"tools": [tool]}, tokenizer)
    with_tools = tokenizer.chat_template + "{{ '' }}"
    monkeypatch.setattr(tokenizer, "chat_template", "{% if tools %}{{ tools | tojson }}{% endif %}" + with_tools)
    assert "look_up" in apply_chat_template(example | {"tools": [tool]}, tokenizer)["prompt"]
    users_only = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role + ':' + m.content }}{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(
        tokenizer, "chat_template", users_only + "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(ChatError, match=r"row 5: the chat template leaves out the text of message 1 \(system\)"):
        apply_chat_template(example, tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system here') }}")
    with pytest.raises(ChatError, match="no system here .the prompt has a system message"):
        apply_chat_template(example, tokenizer)
