"""BLEU of translations by sacrebleu, with the tokenizer of each language.

Legend: N sentences, S = 10 statistics of a sentence: matches and n-grams of orders 1 to 4, and the
lengths of translation and reference.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marco_train.errors import InputError

TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
"""Of languages that are not written in words with spaces; others are cut by 13a."""
FLORES200 = "flores200"
"""Pieces of words of all languages, whose model sacrebleu looks for below its own directory."""
ORDERS = 4


def tokenizer_of(language: str) -> str:
    """Sacrebleu's tokenizer for a language."""
    return TOKENIZERS.get(language, "13a")


def has_flores200() -> bool:
    """Whether the model of FLORES-200's pieces is where sacrebleu looks for it."""
    from importlib.util import find_spec
    from pathlib import Path

    if find_spec("sacrebleu") is None:
        return False
    from sacrebleu.utils import SACREBLEU_DIR

    return (Path(SACREBLEU_DIR) / "models" / "flores200sacrebleuspm").is_file()


def statistics(
    tokenizer: str, references: Sequence[str], texts: Sequence[str]
) -> NDArray[np.int64]:
    """What BLEU counts in each sentence, [N, S]; sums of rows are those of a corpus."""
    metric = _metric(tokenizer)
    found = metric._extract_corpus_statistics(list(texts), [list(references)])
    # Lengths come first there.
    return np.array(found, dtype=np.int64).reshape(len(texts), 2 + 2 * ORDERS)


def score_of(sums: Sequence[int]) -> float:
    """BLEU of a corpus from 0 to 100, from the sums of its statistics, [S]."""
    from sacrebleu.metrics import BLEU

    values = [int(value) for value in sums]
    found = BLEU.compute_bleu(
        correct=values[2 : 2 + ORDERS],
        total=values[2 + ORDERS :],
        sys_len=values[0],
        ref_len=values[1],
        smooth_method="exp",
    )
    return float(found.score)


def signature(tokenizer: str) -> str:
    """Sacrebleu's signature, by which others can repeat the score."""
    metric = _metric(tokenizer)
    metric.corpus_score(["a"], [["a"]])  # which counts the references
    return str(metric.get_signature())


@cache
def _metric(tokenizer: str) -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise InputError(
            "translations need the package sacrebleu: pip install 'marco-train[benchmark]'"
        ) from error
    return BLEU(tokenize=tokenizer)
