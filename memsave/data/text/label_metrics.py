"""Accuracy, F1 and MCC of predicted labels, with bootstrap intervals, all from the confusion matrix.

    accuracy = sum_l C_ll / n                                       C_lk: examples of label l predicted as k
    F1_l     = 2 C_ll / (sum_k C_lk + sum_k C_kl)                   of one label, or the mean over the labels (macro)
    MCC      = (n sum_l C_ll - sum_l t_l p_l) / sqrt((n^2 - sum_l t_l^2) (n^2 - sum_l p_l^2))    (Gorodkin 2004)

with t_l = sum_k C_lk and p_l = sum_k C_kl. An undefined ratio 0 / 0 counts as 0. A bootstrap sample draws n examples
with replacement; its confusion matrix has the distribution Multinomial(n, C / n), and is drawn from it.
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES, INTERVAL = 2000, (2.5, 97.5)


def confusion_matrix(labels: Sequence[int], predictions: Sequence[int], *, count: int) -> np.ndarray:
    """(L, L): the number of examples of each label (row) and prediction (column)."""
    found = np.zeros((count, count), dtype=int)
    np.add.at(found, (np.asarray(labels, dtype=int), np.asarray(predictions, dtype=int)), 1)
    return found


def label_scores(confusion: np.ndarray, *, positive: int | None = None, seed: int = 0) -> dict[str, float]:
    """`accuracy`, `f1` and `mcc`, and the ends of their 95% bootstrap intervals, as in `accuracy_low`.

    Args:
        confusion: (L, L), see `confusion_matrix`.
        positive: the label of F1; None for the mean over all labels.
        seed: of the bootstrap.
    """
    n = confusion.sum()
    drawn = np.random.default_rng(seed).multinomial(n, confusion.ravel() / n, size=RESAMPLES)
    samples = _scores(drawn.reshape(RESAMPLES, *confusion.shape), positive)
    found: dict[str, float] = {}
    for name, score in _scores(confusion[None], positive).items():
        low, high = np.percentile(samples[name], INTERVAL)
        found |= {name: float(score[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def _scores(confusion: np.ndarray, positive: int | None) -> dict[str, np.ndarray]:
    """Each score (R,) of confusion matrices (R, L, L)."""
    counts = confusion.astype(float)
    right, true, predicted = np.diagonal(counts, axis1=1, axis2=2), counts.sum(2), counts.sum(1)  # (R, L)
    n = true.sum(1)
    f1 = _ratio(2 * right, true + predicted)
    covariance = n * right.sum(1) - (true * predicted).sum(1)
    spread = np.sqrt(n**2 - (true**2).sum(1)) * np.sqrt(n**2 - (predicted**2).sum(1))
    return {
        "accuracy": right.sum(1) / n,
        "f1": f1.mean(1) if positive is None else f1[:, positive],
        "mcc": _ratio(covariance, spread),
    }


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)
