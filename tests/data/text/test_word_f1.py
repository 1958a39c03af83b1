import pytest

from memsave.data.text.word_f1 import word_f1


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("I have the dogs.", "i have two dogs !", 2 * 1.0 * 0.75 / 1.75),
        ("A dog, an owl", "dog owl", 1.0),  # articles and punctuation do not count
        ("dog dog dog", "dog dog", 2 * (2 / 3) * 1.0 / (2 / 3 + 1.0)),  # a word counts as often as both have it
        ("cat", "dog", 0.0),
        ("", "dog", 0.0),
        ("the", "a", 0.0),
    ],
)
def test_the_score_of_one_pair(prediction, reference, expected):
    assert word_f1([(prediction, reference)]) == pytest.approx(expected)


def test_the_score_is_a_mean():
    assert word_f1([("dog", "dog"), ("cat", "dog")]) == 0.5
    assert word_f1([]) == 0.0
