"""Where an answer ends: at its EOS, or where a limit cut it."""


def up_to_eos(ids: list[int], eos_token_id: int, last: bool = False) -> list[int]:
    """The tokens up to the first EOS, it included; all of them where there is none.

    What a template writes after an EOS (SmolLM: a line break) is no part of the answer.

    Args:
        last: up to the last EOS instead, for completions of several turns.
    """
    if eos_token_id not in ids:
        return ids
    end = len(ids) - 1 - ids[::-1].index(eos_token_id) if last else ids.index(eos_token_id)
    return ids[: end + 1]
