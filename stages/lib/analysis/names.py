"""Models and rankers by the names that report, cards, pictures and messages give them."""

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
