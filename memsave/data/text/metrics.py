"""BLEU and ROUGE-L of generated texts, each with several references.

    BLEU    = BP exp(mean over n = 1..4 of log p_n)     of the whole corpus, 0 to 100 (Papineni et al. 2002)
    ROUGE-L = 2 P R / (P + R), P = LCS / |prediction|, R = LCS / |reference|     a mean, 0 to 1 (Lin 2004)

BLEU is computed by sacrebleu with its defaults: 13a tokens, case-sensitive, n-grams clipped by the best reference, the
brevity penalty BP from the closest reference length. ROUGE-L is computed by rouge-score without stemming, on lower-case
letters and digits, as the best over an example's references. Both libraries are imported when scores are computed.
"""

from collections.abc import Sequence
from typing import Any


def text_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu` (0 to 100) and `rouge_l` (0 to 1) of predictions[i] against all references[i]."""
    _check(predictions, references)
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    most = max(map(len, references))
    # sacrebleu takes the i-th references of all examples as one stream, with None for examples that have fewer
    streams: list[list[Any]] = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    bleu = sacrebleu.corpus_bleu(list(predictions), streams).score
    scorer = RougeScorer(["rougeL"])
    best = [scorer.score_multi(texts, text)["rougeL"].fmeasure for text, texts in zip(predictions, references)]
    return {"bleu": float(bleu), "rouge_l": float(sum(best) / len(best))}


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions:
        raise ValueError("text_scores() got 0 predictions: pass at least 1.")
    if len(predictions) != len(references):
        counts = f"{len(predictions)} predictions and {len(references)} lists of references"
        raise ValueError(f"text_scores() got {counts}: pass one list of references for each prediction.")
    for index, texts in enumerate(references):
        if isinstance(texts, str):  # a string is also a sequence, of one-letter references
            raise ValueError(f"The references of example {index} are one string: pass a list of strings.")
        if not texts:
            raise ValueError(f"Example {index} has 0 references: give it at least 1 or leave it out.")
