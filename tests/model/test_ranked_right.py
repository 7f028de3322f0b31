import numpy as np
import pandas as pd
import pytest
import torch

from stages.lib.analysis.rankings import accuracy
from stages.lib.model.ranked_right import ranked_right, shares_by_kind, told_by_kind
from stages.lib.rl.dpo import dpo_loss
from stages.train_judge import figures
from stages.train_reward import heldout_figures

BETTER, WORSE = [2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 1.0, 5.0]  # right, a tie, wrong, a tie: 1 + 1/2 + 0 + 1/2 of 4


@pytest.mark.parametrize("of", [np.array, torch.tensor])
def test_a_tie_is_worth_a_coin(of):
    assert ranked_right(of(BETTER), of(WORSE)).tolist() == [1.0, 0.5, 0.0, 0.5]
    assert ranked_right(of([float("nan")]), of([1.0])).tolist() == [0.0]


def test_every_accuracy_of_the_project_has_the_one_tie_rule():
    better, worse, zeros = torch.tensor(BETTER), torch.tensor(WORSE), torch.zeros(4)
    pairs = pd.DataFrame({"chosen_x": BETTER, "rejected_x": WORSE, "prompt_id": range(4)})
    assert dpo_loss(better, worse, zeros, zeros)[1].item() == 0.5
    assert heldout_figures(better, worse)["accuracy"] == 0.5
    assert figures(np.array(BETTER) - np.array(WORSE), np.array(["pair"] * 4))["accuracy"] == 0.5
    assert accuracy(pairs, "x", 0.95).mean == 0.5


def test_where_the_textbook_counts_a_tie_as_wrong_the_difference_is_half_the_ties():
    # TRL 1.16: (chosen_rewards > rejected_rewards).float().mean()
    better, worse = torch.tensor(BETTER), torch.tensor(WORSE)
    trl, ties = (better > worse).float().mean(), (better == worse).float().mean()
    assert ranked_right(better, worse).mean() == trl + ties / 2


def test_shares_stand_by_kind_in_the_order_in_which_kinds_come():
    kinds = ["loop", "cut", "loop", "cut"]
    assert list(shares_by_kind(np.array(BETTER), np.array(WORSE), kinds).items()) == [("loop", 0.5), ("cut", 0.5)]
    shares = shares_by_kind(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 3.0]), ["b", "b", "a"])
    assert list(shares.items()) == [("b", 0.75), ("a", 0.0)]
    assert shares_by_kind(torch.tensor([]), torch.tensor([]), []) == {}


def test_a_kind_that_is_preferred_is_warned_of_and_no_other():
    told = list(told_by_kind("judge", {"loop": 0.97, "spliced": 0.5, "cut": 0.25}))
    assert told == [
        "the judge prefers the better side of the held-out pairs made by each kind of corruption: "
        "loop 97%, spliced 50%, cut 25%",
        "warning: the judge prefers the worse side of the held-out pairs made by 'cut' in 75% of cases",
    ]
    assert list(told_by_kind("judge", {})) == []
