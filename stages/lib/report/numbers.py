"""The report's key numbers: each with its interval, beside what it has to beat."""

import numpy as np

from stages.lib.analysis.names import CORRUPTION_LABELS, MODELS, RANKER_LABELS
from stages.lib.analysis.stats import Interval, share_interval
from stages.lib.analysis.wording import ends, finding, number
from stages.lib.report.files import ReportFiles
from stages.lib.report.page import Estimate, Forest, Scale, Table, Tile, percentages
from stages.lib.run.errors import UserError

SHARE = Scale(0, 1, reference=0.5)
CHANGE = Scale(-1, 1, reference=0, digits=3, signed=True)
SCORE_CHANGE = Scale(-1, 1, reference=0, signed=True)


def tiles(files: ReportFiles) -> list[Tile]:
    """Whether it worked, at a glance."""
    dpo = analysed(files, "dpo", "rewards/accuracies")
    reward_model = analysed(files, "reward_model", "accuracy")
    best = max(baselines(files), key=lambda estimate: estimate.interval.mean)
    did, ppo_did = (analysed(files, model, "did") for model in ("dpo", "ppo"))
    gain, kl = scored(files, "ppo", "score", change=True), scored(files, "ppo", "kl")
    before, after = (scored(files, model, "score").mean for model in ("base", "ppo"))
    more, less = "training texts gained more", "training texts gained less"
    return [
        Tile(
            "Held-out pairs that DPO ranks right",
            percentages(dpo.mean),
            ends(dpo, 0, scale=100),
            f"Reward model {percentages(reward_model)}. With no training at all, {best.label}: "
            f"{percentages(best.interval)}.",
        ),
        Tile(
            "Memorised by DPO (nats per token)",
            number(did.mean, 3, signed=True),
            CHANGE.ends(did),
            f"Gain of training texts less that of held-out ones: {finding(did, 0, more, less)}. "
            f"PPO: {CHANGE.show(ppo_did)}, {finding(ppo_did, 0, more, less)}.",
        ),
        Tile(
            "Score gained by PPO",
            number(gain.mean, signed=True),
            SCORE_CHANGE.ends(gain),
            f"From the base's {number(before)} to {number(after)}, at a KL of {number(kl.mean)} nats per answer: "
            f"{finding(gain, 0, 'answers score higher', 'answers score lower')}.",
        ),
    ]


def forests(files: ReportFiles) -> list[Forest]:
    """All key numbers, in groups that share a scale."""
    pairs = files.metric("fetch_pairs", "heldout_pairs")
    return [
        Forest(
            "Which of two answers is preferred?",
            f"Share of the {pairs:,} held-out pairs ranked right; 0.5 is guessing. Hollow: untrained rankers, "
            "most of which count one feature. A trained one that does no better may have learnt style alone.",
            [
                Estimate("DPO’s implicit reward", analysed(files, "dpo", "rewards/accuracies")),
                Estimate("PPO’s implicit reward", analysed(files, "ppo", "rewards/accuracies")),
                Estimate("Reward model", analysed(files, "reward_model", "accuracy")),
                *baselines(files),
            ],
            SHARE,
        ),
        Forest(
            "Are training texts likelier than others?",
            "Probability (AUC) that a random training text is likelier, per token, than a random text of the "
            "other group; 0.5 is no difference. What the base shows was there before any training.",
            [
                Estimate(f"{label}: training over {other}", analysed(files, model, key))
                for key, other in (("auc_heldout", "held-out"), ("auc_unseen", "unseen"))
                for model, label in MODELS.items()
            ],
            SHARE,
        ),
        Forest.fitted(
            "What did training change?",
            "Change of log-prob per token from the base, in nats. Only a difference of differences clear of 0 "
            "means that texts were memorised rather than a style learnt.",
            [
                Estimate(f"{MODELS[model]}: {label}", analysed(files, model, key), note)
                for model in ("dpo", "ppo")
                for key, label, note in (
                    ("change_train_chosen", "training texts", ""),
                    ("change_heldout_chosen", "held-out texts", ""),
                    ("change_unseen", "unseen texts of another kind", ""),
                    ("did", "training less held-out", "the difference of differences"),
                )
            ],
            reference=0,
            digits=3,
            signed=True,
        ),
        Forest(
            "Did DPO make the preferred answers less likely?",
            "Share of pairs whose chosen answer lost log-prob (likelihood displacement).",
            [
                Estimate("Training pairs", analysed(files, "dpo", "displaced_train")),
                Estimate("Held-out pairs", analysed(files, "dpo", "displaced_heldout")),
            ],
            Scale(0, 1, reference=None),
        ),
        Forest(
            "Are the answers better than the base’s?",
            "How often the judge, which took no part in training, prefers the model's sampled answer to the base's; "
            "0.5 is no preference.",
            [
                Estimate(f"{MODELS[model]}{label}", scored(files, model, measure))
                for model in ("dpo", "ppo")
                for measure, label in (("win_rate", ""), ("win_rate_lc", ", at equal length"))
            ],
            SHARE,
        ),
        Forest.fitted(
            "Did the score rise?",
            "Reward-model score less that of the base's answers to the same prompts. PPO optimises this very "
            "score, so read it with the judge above and the samples below.",
            [Estimate(MODELS[model], scored(files, model, "score", change=True)) for model in ("dpo", "ppo")],
            reference=0,
            signed=True,
        ),
    ]


def baselines(files: ReportFiles) -> list[Estimate]:
    """Pair accuracy of every untrained ranker, best first."""
    values = files.metric("analyze_logps", "rankers")
    names = [name for name in values if not name.endswith(("_low", "_high"))]
    return [
        Estimate(RANKER_LABELS.get(str(name), str(name)), analysed(files, "rankers", name), kind="baseline")
        for name in sorted(names, key=lambda name: -values[name])
    ]


def corruptions(files: ReportFiles, confidence: float) -> Table:
    """How often reward model and judge prefer a held-out answer to its corrupted copy, by kind of corruption.

    Without rows where no copy could be made. An asterisk marks a kind that the model in question never met.
    """
    met = (
        set(files.metric("corrupt_answers", "train")) if files.metric("train_reward", "hard_negatives") else set()
    )
    never_met = files.metric("train_judge", "kinds_never_met")
    rows = []
    for kind, (reward_model, judge) in resisted(files, confidence).items():
        cells = percentages(reward_model) + "*" * (kind not in met), percentages(judge) + "*" * (kind in never_met)
        rows.append(
            [CORRUPTION_LABELS[kind], f"{files.metric('corrupt_answers', 'heldout', kind, 'made'):,}", *cells]
        )
    return Table(["The worse of the two answers", "Pairs", "Reward model", "Judge"], rows)


def corruptions_in_words(files: ReportFiles, confidence: float) -> str:
    """Which corruptions reward model and judge do not see through: those where the interval is not above one half."""
    found = resisted(files, confidence)
    sentences = []
    for place, name in enumerate(("reward model", "judge")):
        kinds = {CORRUPTION_LABELS[kind]: shares[place] for kind, shares in found.items()}
        unsure = {label: share for label, share in kinds.items() if share.covers(0.5)}
        fooled = {label: share for label, share in kinds.items() if share.mean < 0.5 and label not in unsure}
        for labels, words in (
            (fooled, f"The {name} prefers these to the better answer"),
            (unsure, f"The {name} does not clearly prefer the better answer to these"),
        ):
            if labels:
                told = (f"{label} ({percentages(share)})" for label, share in labels.items())
                sentences.append(f"{words}: {'; '.join(told)}.")
        if not fooled and not unsure:
            sentences.append(f"The {name} clearly prefers the better answer to every kind.")
    return " ".join(sentences)


def resisted(files: ReportFiles, confidence: float) -> dict[str, tuple[Interval, Interval]]:
    """By kind of corruption: the shares of pairs in which reward model and judge score the better answer higher.

    The reports hold a share by kind, not by prompt. The intervals are as wide as if all pairs of a prompt agreed.
    """
    pairs, prompts = (files.metric("fetch_pairs", f"heldout_{what}") for what in ("pairs", "prompts"))
    found = {}
    for kind in files.metric("train_reward", "by_kind"):
        made = files.metric("corrupt_answers", "heldout", kind, "made")
        trials = max(1, round(made * prompts / pairs))
        shares = (files.metric(stage, "by_kind", kind) for stage in ("train_reward", "train_judge"))
        reward_model, judge = (share_interval(np.full(trials, share), None, confidence) for share in shares)
        found[kind] = reward_model, judge
    return found


def analysed(files: ReportFiles, *keys: str) -> Interval:
    """An estimate of analyze_logps."""
    return files.interval("analyze_logps", *keys)


def scored(files: ReportFiles, model: str, measure: str, change: bool = False) -> Interval:
    """A measure of a model's sampled answers, or its change from the base's."""
    found = files.scored(model, measure, change=change)
    if found is None:
        where = "reports/score_responses/scorecard.csv"
        raise UserError(f"{where}: no {measure} of {model}; run `dvc repro -f score_responses`")
    return found
