"""Word F1 of a text against what a person wrote, the score of Persona-Chat.

    F1 = 2 P R / (P + R),  P = common / words of the prediction,  R = common / words of the reference

A word that occurs n times in one text and m times in the other has min(n, m) in common. As in ParlAI, words are in
lower case, without punctuation and without articles.
"""

import re
from collections import Counter
from collections.abc import Iterable

ARTICLES = {"a", "an", "the"}
PUNCTUATION = re.compile(r"""[!"#$%&()*+,\-./:;<=>?@\[\]\\^`{|}~_']""")


def word_f1(pairs: Iterable[tuple[str, str]]) -> float:
    """The mean F1 (0 to 1) of (prediction, reference) pairs; 0 without pairs."""
    each = [_f1(_words(prediction), _words(reference)) for prediction, reference in pairs]
    return sum(each) / len(each) if each else 0.0


def _words(text: str) -> Counter[str]:
    return Counter(word for word in PUNCTUATION.sub(" ", text.lower()).split() if word not in ARTICLES)


def _f1(prediction: Counter[str], reference: Counter[str]) -> float:
    common = (prediction & reference).total()
    return 2 * common / (prediction.total() + reference.total()) if common else 0.0
