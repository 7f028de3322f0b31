"""The generated answer: does the final model find its training data more likely, and how sure is that?"""

from collections.abc import Mapping

from stages.lib.analysis.names import RANKER_LABELS
from stages.lib.analysis.stats import Interval
from stages.lib.analysis.wording import NO_FINDING, estimate, finding, percent

Estimates = Mapping[str, Interval]


def answer(estimates: Mapping[str, Estimates], counts: Mapping[str, int], confidence: float) -> str:
    """Markdown paragraphs, **bold** being their only markup.

    Args:
        estimates: of base, dpo, ppo, reward_model and rankers, each named as in metrics.json.
        counts: train_pairs, heldout_pairs, unseen_texts; met_pairs, of which the first were drawn.
    """
    opening = (
        "**Does the final model find its training data more likely?** Measured on "
        f"{counts['train_pairs']} of the {counts['met_pairs']} pairs that DPO was trained on, "
        f"{counts['heldout_pairs']} held-out pairs whose prompts were never trained on, and "
        f"{counts['unseen_texts']} unseen texts of another kind. Log-probs are in nats per token; brackets hold "
        f"{100 * confidence:g} % intervals that resample prompts."
    )
    base, dpo, ppo = estimates["base"], estimates["dpo"], estimates["ppo"]
    rankings = _rankings(dpo, estimates["reward_model"], estimates["rankers"], counts["heldout_pairs"])
    paragraphs = [
        opening,
        f"**DPO.** {_memorising(base, dpo)} {_displacement(dpo)}",
        f"**PPO.** PPO trains on the prompts alone and sees none of these answers. {_memorising(base, ppo)}",
        f"**Is that more than style?** {rankings}",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _memorising(base: Estimates, model: Estimates) -> str:
    change, did = model["change_train_chosen"], model["did"]
    auc, auc_change = model["auc_heldout"], model["auc_change"]
    moved = finding(change, 0, "more likely than under the base", "less likely than under the base")
    memorised = finding(
        did, 0, "training raised its own texts above others like them", "training's own texts gained less"
    )
    told = finding(auc, 0.5, "training texts are the likelier ones", "training texts are the less likely ones")
    told_by_change = finding(auc_change, 0.5, "training texts gained more", "training texts gained less")
    return (
        f"Training's chosen answers: {moved} ({estimate(change, 3, signed=True)}). Held-out chosen answers changed by "
        f"{estimate(model['change_heldout_chosen'], 3, signed=True)} and unseen texts by "
        f"{estimate(model['change_unseen'], 3, signed=True)}. "
        f"The difference in differences, training less held-out, is {estimate(did, 3, signed=True)}: {memorised}. "
        f"A training answer is likelier than a held-out one with probability (AUC) {estimate(auc)}, "
        f"{estimate(base['auc_heldout'])} under the base: {told}; by the change alone {estimate(auc_change)}: "
        f"{told_by_change}. Against the unseen texts, which are another kind to begin with, the AUC is "
        f"{estimate(model['auc_unseen'])}, {estimate(base['auc_unseen'])} under the base."
    )


def _displacement(dpo: Estimates) -> str:
    return (
        f"The chosen answer itself became less likely in {percent(dpo['displaced_train'])} of training pairs and "
        f"{percent(dpo['displaced_heldout'])} of held-out pairs. DPO allows that (likelihood displacement): it "
        "needs only the distance to the rejected answer to grow."
    )


def _rankings(dpo: Estimates, reward_model: Estimates, rankers: Estimates, pairs: int) -> str:
    name, best = max(rankers.items(), key=lambda item: item[1].mean)
    accuracies = dpo["rewards/accuracies"], reward_model["accuracy"]
    if best.high is None or not all(interval.has_ends for interval in accuracies):
        lesson = NO_FINDING
    elif best.mean >= max(interval.mean for interval in accuracies):
        lesson = "at least as good, so these accuracies do not show that more than style was learnt"
    elif best.high >= min(interval.mean for interval in accuracies):
        lesson = "so close that these accuracies hardly show that more than style was learnt"
    else:
        lesson = "clearly less"
    lengths = finding(dpo["length_correlation"], 0, "longer answers score higher", "longer answers score lower")
    return (
        f"Of {pairs} held-out pairs DPO's implicit reward ranks {percent(accuracies[0])} right and the reward "
        f"model {percent(accuracies[1])}. The best single feature, {RANKER_LABELS[name]}, reaches "
        f"{percent(best)}: {lesson}. Implicit reward and reward-model score order "
        f"{percent(dpo['score_agreement'])} of the pairs alike. The implicit reward's rank correlation with "
        f"length is {estimate(dpo['length_correlation'], 2, signed=True)}: {lengths}."
    )
