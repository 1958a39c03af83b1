import math

import pytest

from memsave.data.text.metrics import text_scores


def test_identical_texts_have_the_maximum_score():
    texts = ["Blue Spice is a pub near the river.", "It opens at 7:30."]
    assert text_scores(texts, [[text] for text in texts]) == pytest.approx({"bleu": 100, "rouge_l": 1})


def test_texts_without_a_common_word_score_zero():
    assert text_scores(["a b c d e"], [["v w x y z"]]) == {"bleu": 0, "rouge_l": 0}


def test_scores_of_one_changed_word_by_hand():
    scores = text_scores(["a b c d e"], [["a b c d f"]])
    assert scores["bleu"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert scores["rouge_l"] == pytest.approx(4 / 5)


def test_short_texts_get_the_brevity_penalty():
    scores = text_scores(["a b c d"], [["a b c d e"]])
    assert scores["bleu"] == pytest.approx(100 * math.exp(1 - 5 / 4))
    assert scores["rouge_l"] == pytest.approx(2 * 1 * 0.8 / (1 + 0.8))


def test_bleu_counts_matches_with_any_reference_and_rouge_takes_the_best():
    scores = text_scores(["a b c d e f g h"], [["a b c d w x y z", "p q r e f g h s"]])
    assert scores["bleu"] == pytest.approx(100 * (8 / 8 * 6 / 7 * 4 / 6 * 2 / 5) ** 0.25)
    assert scores["rouge_l"] == pytest.approx(0.5)
    assert text_scores(["a b"], [["x y", "a b", "a y"]])["rouge_l"] == pytest.approx(1)


def test_missing_references_are_not_counted_as_empty_texts():
    scores = text_scores(["a b c d", "e f g h"], [["a b c d", "a b c x"], ["e f g h i j k l m n"]])
    assert scores["bleu"] == pytest.approx(100 * math.exp(1 - (4 + 10) / (4 + 4)))
    assert scores["rouge_l"] == pytest.approx((1 + 2 * 0.4 / 1.4) / 2)


def test_bleu_is_of_the_corpus_and_rouge_a_mean_over_examples():
    scores = text_scores(["a b c d e", "v w x y z"], [["a b c d e"], ["l m n o p"]])
    assert scores["bleu"] == pytest.approx(100 * (5 / 10 * 4 / 8 * 3 / 6 * 2 / 4) ** 0.25)
    assert scores["rouge_l"] == pytest.approx(0.5)


def test_an_empty_prediction_scores_zero():
    assert text_scores([""], [["a b c d"]]) == {"bleu": 0, "rouge_l": 0}


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "got 0 predictions: pass at least 1"),
        (["a"], [["a"], ["b"]], "got 1 predictions and 2 lists of references: pass one list"),
        (["a", "b"], [["a"], []], "Example 1 has 0 references: give it at least 1"),
        (["a"], ["a"], "references of example 0 are one string: pass a list"),
    ],
)
def test_unusable_arguments_are_reported(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        text_scores(predictions, references)
