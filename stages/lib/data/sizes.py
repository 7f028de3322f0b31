"""How little data a stage can work with: known before any training, where it can still be changed at no cost."""

from collections.abc import Sequence

JUDGE_PAIRS = 10
JUDGE_PROMPTS = 2  # it is chosen by cross-validation over prompts


def too_few_for_the_judge(prompt_ids: Sequence[int]) -> str | None:
    """Why train_judge cannot use its pairs, given the prompt of each, with a remedy; None if it can."""
    pairs, prompts = len(prompt_ids), len(set(prompt_ids))
    if pairs >= JUDGE_PAIRS and prompts >= JUDGE_PROMPTS:
        return None
    return (
        f"{pairs} pairs over {prompts} prompts are left for the judge, and train_judge needs at least "
        f"{JUDGE_PAIRS} over {JUDGE_PROMPTS}; raise fetch_pairs.judge_fraction or max_pairs, or give more pairs"
    )
