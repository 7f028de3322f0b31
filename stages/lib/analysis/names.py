"""Models, rankers and corruptions by the names that report, cards, pictures and messages give them."""

MODELS = {"base": "Base", "dpo": "DPO", "ppo": "PPO"}
RANKER_LABELS = {
    "question_marks": "question marks",
    "exclamation_marks": "exclamation marks",
    "emoji": "emoji",
    "apostrophes": "apostrophes",
    "length_in_words": "length in words",
    "no_ai_phrase": "no “as an AI” phrase",
    "base_log_prob": "log-prob under base",
    "dpo": "DPO's implicit reward",
    "ppo": "PPO's implicit reward",
    "reward_model": "reward model",
}
CORRUPTION_LABELS = {  # of a copy, by its kind
    "loop": "a few words looped to the end",
    "emoji": "strewn with emoji",
    "exclaim": "strewn with exclamation and question marks",
    "cut": "broken off in mid-sentence",
    "brief": "the first sentences alone",
    "shuffle": "words in random order",
    "repeat": "a sentence said over and over",
    "echo": "the prompt given back",
    "other_prompt": "a good answer to another prompt",
    "doubled": "words doubled",
    "reversed": "sentences in reverse order",
    "letters": "letters missing",
    "refrain": "a refrain after every few words",
    "spliced": "the second half from another prompt’s answer",
    "short_both": "first sentences of the rejected answer, against those of the preferred one",
}
