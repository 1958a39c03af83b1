"""Scores from the confusion matrix, held against scikit-learn and against a bootstrap of the examples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsave.data.text.label_metrics import confusion_matrix, label_scores

metrics = pytest.importorskip("sklearn.metrics")
pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(pairs)
def test_scores_are_those_of_scikit_learn(found):
    labels, predictions = map(list, zip(*found))
    confusion = confusion_matrix(labels, predictions, count=4)
    known = list(range(4))
    np.testing.assert_array_equal(confusion, metrics.confusion_matrix(labels, predictions, labels=known))
    scores = label_scores(confusion)
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predictions))
    macro = metrics.f1_score(labels, predictions, labels=known, average="macro", zero_division=0)
    assert scores["f1"] == pytest.approx(macro)
    assert scores["mcc"] == pytest.approx(metrics.matthews_corrcoef(labels, predictions), abs=1e-12)
    one = metrics.f1_score(labels, predictions, labels=[2], average="macro", zero_division=0)
    assert label_scores(confusion, positive=2)["f1"] == pytest.approx(one)


def test_intervals_are_those_of_resampled_examples():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 300)
    predictions = np.where(generator.random(300) < 0.8, labels, 1 - labels)
    scores = label_scores(confusion_matrix(labels, predictions, count=2), positive=1)
    chosen = generator.integers(0, 300, (2000, 300))
    right = (labels[chosen] & predictions[chosen]).sum(1)
    resampled = 2 * right / (labels[chosen] + predictions[chosen]).sum(1)
    low, high = np.percentile(resampled, (2.5, 97.5))
    assert scores["f1_low"] == pytest.approx(low, abs=0.01)
    assert scores["f1_high"] == pytest.approx(high, abs=0.01)
    assert scores["accuracy_low"] < scores["accuracy"] < scores["accuracy_high"]


def test_one_predicted_label_gives_no_correlation():
    scores = label_scores(confusion_matrix([0, 1, 1], [1, 1, 1], count=2), positive=0)
    assert scores["mcc"] == scores["f1"] == 0
