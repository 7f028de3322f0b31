"""The judge: a preference model that took no part in training.

Its read-out is another than the reward model's: the mean hidden state of the base at a middle layer over the
answer's tokens, prompt given. Whether an answer ended is not part of it: the EOS and what follows is left out.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.lib.run.artefacts import atomic_path, read_json, write_json
from stages.lib.run.errors import UserError


@dataclass(frozen=True)
class Judge:
    """A linear preference model: P(A over B) = sigmoid(score of A - score of B).

    layer:       decoder layers below the read-out; 0 would be the embeddings
    strength:    C of the logistic regression, the inverse of its L2 penalty
    mean, scale: (H,) of the features it was fitted on; a score is 0 at the mean
    weight:      (H,) on standardised features
    """

    layer: int
    strength: float
    mean: Tensor
    scale: Tensor
    weight: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """(N, H) features of the judge's layer, one of `answer_means`, to (N,) scores, float32."""
        return (features - self.mean) / self.scale @ self.weight


def save_judge(judge: Judge, folder: Path) -> None:
    """judge.safetensors (weight, mean, scale) and judge.json (layer, strength)."""
    tensors = {name: getattr(judge, name).contiguous() for name in ("weight", "mean", "scale")}
    with atomic_path(folder / "judge.safetensors") as partial:
        save_file(tensors, partial)
    write_json(folder / "judge.json", {"layer": judge.layer, "strength": judge.strength})


def load_judge(folder: Path) -> Judge:
    """The judge in `folder`.

    Raises:
        UserError: it is not there.
    """
    if not (folder / "judge.safetensors").exists():
        raise UserError(f"{folder}: no judge there; run: dvc repro train_judge")
    settings, of = read_json(folder / "judge.json"), load_file(folder / "judge.safetensors")
    return Judge(settings["layer"], settings["strength"], of["mean"], of["scale"], of["weight"])


def fit_judge(differences: np.ndarray, strength: float, weights: np.ndarray) -> np.ndarray:
    """Logistic regression on preferred less other features, without an intercept: (H,) weights.

    Args:
        differences: (N, H) standardised features of the better text less those of the worse.
        strength: C, the inverse of the L2 penalty.
        weights: (N,) of the pairs.
    """
    from sklearn.linear_model import LogisticRegression

    both = np.concatenate((differences, -differences))  # it needs two classes; by symmetry nothing else changes
    labels = np.repeat((1, 0), len(differences))
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=2000)
    return model.fit(both, labels, sample_weight=np.tile(weights, 2)).coef_[0]
