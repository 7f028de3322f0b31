"""Chat templates, token ids and truncation: from texts to what the models see."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from stages.lib.data.eos import up_to_eos
from stages.lib.data.messages import Messages, texts_in
from stages.lib.run.errors import UserError


class ChatError(UserError):
    """A conversation that the tokenizer's chat template cannot render as a prompt and its completion."""


def to_implicit_prompt_preferences(example: dict[str, Any]) -> dict[str, Messages]:
    """A plain pair as two conversations that share their user turn, TRL's implicit-prompt form.

    Args:
        example: 'prompt', 'chosen' and 'rejected' as text.

    Returns:
        'chosen' and 'rejected', each one user and one assistant message.
    """
    question = {"role": "user", "content": example["prompt"]}
    return {
        "chosen": [question, {"role": "assistant", "content": example["chosen"]}],
        "rejected": [question, {"role": "assistant", "content": example["rejected"]}],
    }


def apply_chat_template(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Renders a pair by the tokenizer's chat template, prompt and completions apart.

    prompt + chosen is exactly the rendered conversation, and so is prompt + rejected.

    Args:
        example: 'prompt', 'chosen' and 'rejected' as plain texts; or 'chosen' and 'rejected' as messages, the
            prompt being the turns they share at their start (`to_implicit_prompt_preferences`) or a list of
            messages of its own under 'prompt'. 'tools', if there are any, go to the template. A 'where', if
            there is one, names the example in errors.

    Returns:
        'prompt' with the generation header (SmolLM: '<|im_start|>assistant\\n'); 'chosen' and 'rejected',
        the assistant turn after it (SmolLM: ending in '<|im_end|>\\n').

    Raises:
        ChatError: texts and messages are mixed, the two share no prompt, or the template does not render the
            prompt as the conversation's beginning.
    """
    where = example.get("where", "example")
    texts = [isinstance(example.get(name), str) for name in ("prompt", "chosen", "rejected")]
    if all(texts):
        example = to_implicit_prompt_preferences(example)
    elif any(texts):
        raise ChatError(f"{where}: 'prompt', 'chosen' and 'rejected' must be all texts or all messages")
    chosen, rejected = example["chosen"], example["rejected"]
    prompt = example.get("prompt")
    if prompt is None:
        turns = min(len(chosen), len(rejected))
        shared = next((i for i in range(turns) if chosen[i] != rejected[i]), turns)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt or not chosen or not rejected:
        raise ChatError(f"{where}: 'chosen' and 'rejected' must share a prompt and then differ")
    tools = example.get("tools")
    prompt_text, chosen_text = render_completion(prompt, chosen, tokenizer, where, tools)
    _, rejected_text = render_completion(prompt, rejected, tokenizer, where, tools)
    return {"prompt": prompt_text, "chosen": chosen_text, "rejected": rejected_text}


def render_completion(
    prompt: Messages,
    completion: Messages,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    tools: list[Any] | None = None,
) -> tuple[str, str]:
    """The prompt with its generation header and the completion, which together are the rendered conversation.

    Raises:
        ChatError: the template fails, leaves something of the prompt out, or renders the conversation with another
            beginning; `where` names it.
    """
    prompt_text = render_prompt(prompt, tokenizer, where, tools)
    try:
        whole = tokenizer.apply_chat_template(prompt + completion, tools=tools, tokenize=False)
    except Exception as error:  # a template is a program and can raise anything
        raise ChatError(f"{where}: the chat template fails: {error}") from error
    if not whole.startswith(prompt_text):
        raise ChatError(
            f"{where}: the chat template does not render the conversation as the prompt with its generation "
            "header and then the completion; choose a base model with a plain template"
        )
    return prompt_text, whole[len(prompt_text) :]


def render_prompt(
    prompt: Messages, tokenizer: PreTrainedTokenizerBase, where: str, tools: list[Any] | None = None
) -> str:
    """The prompt with its generation header.

    Raises:
        ChatError: the template fails, or leaves a message or a tool out; `where` names the prompt.
    """
    try:
        text = tokenizer.apply_chat_template(prompt, tools=tools, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program and can raise anything
        raise ChatError(f"{where}: the chat template fails: {error}{_likely_cause(prompt, tools)}") from error
    if lost := _left_out(prompt, tools, text):
        raise ChatError(f"{where}: the chat template leaves out {lost}; choose a base model whose template has it")
    return text


def _left_out(prompt: Messages, tools: list[Any] | None, text: str) -> str | None:
    """What of the prompt a rendered text does not hold; templates may trim a text and escape a tool call's."""
    for number, message in enumerate(prompt, 1):
        if (message.get("content") or "").strip() not in text:
            return f"the text of message {number} ({message['role']})"
        for call in message.get("tool_calls", []):
            if any(name not in text for name in texts_in(call["function"]["name"])):
                return f"the tool call of message {number}"
    for tool in tools or []:
        name = tool.get("function", tool).get("name")
        if not isinstance(name, str) or name not in text:
            return f"the tool {str(name)[:40]!r}"
    return None


def _likely_cause(prompt: Messages, tools: list[Any] | None) -> str:
    """A hint at the part of a conversation that templates most often do not know."""
    if tools or any(message["role"] == "tool" or "tool_calls" in message for message in prompt):
        return " (the prompt has tool calls, which not every model's template renders)"
    if prompt[0]["role"] == "system":
        return " (the prompt has a system message, which not every model's template renders)"
    return ""


def tokenize_row(
    example: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None = 512,
    max_completion_length: int | None = None,
) -> dict[str, list[int]]:
    """Token ids of a rendered pair. The template wrote every special token: none is added or doubled.

    A long prompt keeps its last tokens, since the question and the generation header stand at its end; a long
    completion keeps its first.

    Args:
        example: 'prompt', 'chosen', 'rejected' as `apply_chat_template` returns them.
        max_prompt_length: tokens; None for no limit.
        max_completion_length: tokens; None for no limit.

    Returns:
        'prompt_input_ids', 'chosen_input_ids', 'rejected_input_ids'.

    Raises:
        ValueError: a limit below one.
        ChatError: the tokenizer writes a completion otherwise alone than after its prompt.
    """
    ids = {"prompt_input_ids": text_ids(example["prompt"], tokenizer)}
    for name in ("chosen", "rejected"):
        ids[f"{name}_input_ids"] = completion_ids(example["prompt"], example[name], tokenizer)
    return truncate(ids, max_prompt_length, max_completion_length)


def truncate(
    ids: dict[str, list[int]],
    max_prompt_length: int | None,
    max_completion_length: int | None,
    max_length: int | None = None,
) -> dict[str, list[int]]:
    """A prompt's last tokens and its completions' first ones, within the limits (None: no limit).

    Args:
        ids: 'prompt_input_ids' and any number of completions to it, which are cut each for itself.
        max_length: of prompt and completion together; what is too much comes off the completion's end.

    Raises:
        ValueError: a limit below one, or max_length not above max_prompt_length.
    """
    for name, limit in (("prompt", max_prompt_length), ("completion", max_completion_length)):
        if limit is not None and limit < 1:
            raise ValueError(f"max_{name}_length must be at least 1, not {limit}")
    prompt_ids = ids["prompt_input_ids"][-(max_prompt_length or 0) :]
    limit = max_completion_length
    if max_length is not None:
        if max_length <= (max_prompt_length or len(prompt_ids)):
            raise ValueError(f"max_length {max_length} leaves no room for a completion")
        limit = min(limit or max_length, max_length - len(prompt_ids))
    return {name: (prompt_ids if name == "prompt_input_ids" else values[:limit]) for name, values in ids.items()}


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The text's own token ids, without the special tokens a tokenizer may put around it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def completion_ids(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a completion where it stands: the model goes on from the prompt's own ids.

    Those that the two texts have together, after the prompt's. By themselves SentencePiece's tokenizers begin every
    text with a space, so that a completion would start with a token which the model never writes there. Where the
    border runs through a token (byte-level BPE joins two newlines), the completion's own, which say the same.

    Raises:
        ChatError: neither is the conversation.
    """
    prompt_ids, whole = text_ids(prompt, tokenizer), text_ids(prompt + completion, tokenizer)
    if whole[: len(prompt_ids)] == prompt_ids:
        return whole[len(prompt_ids) :]
    alone = text_ids(completion, tokenizer)
    if tokenizer.decode(prompt_ids + alone) != tokenizer.decode(whole):
        raise ChatError(
            f"the tokenizer writes the completion {completion[:40]!r} otherwise alone than after its prompt, and joins "
            "the border of the two; choose a base model with another tokenizer"
        )
    return alone


def closed_by_eos(prompt_ids: list[int], completion_ids: list[int], eos_token_id: int) -> list[int]:
    """The whole conversation up to its last EOS, as the reward model reads it; a cut one's last id becomes EOS.

    What the template writes after the EOS (SmolLM: a newline) goes: PPO's answers end at the EOS too, and a
    score is read at a sequence's last token.
    """
    turns = up_to_eos(completion_ids, eos_token_id, last=True)
    return prompt_ids + (turns if turns[-1:] == [eos_token_id] else [*turns[:-1], eos_token_id])


def seen_text(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """An answer's text as far as its ids, which a limit may have cut, go; itself where nothing was cut."""
    seen = tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")  # half a character at the cut
    return seen if len(seen) < len(text) and text.startswith(seen) else text


def generation_header_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that invite the answer, at the end of every prompt (SmolLM: '<|im_start|>assistant\\n')."""
    question = [{"role": "user", "content": "Hello"}]
    without = tokenizer.apply_chat_template(question, tokenize=False)
    with_header = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    return text_ids(with_header[len(without) :], tokenizer)


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches each special or added token's text: inside a message, `<|im_end|>` would end the turn.

    Not the runs of spaces and line breaks that some tokenizers (GPT-NeoX, Phi) have as added tokens: they are text.
    """
    tokens = {*tokenizer.all_special_tokens, *(token for token in tokenizer.get_added_vocab() if token.strip())}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
