"""Rows that ask what another row asks, or nearly, and a share of what all of them ask."""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from marco_train.data.formats import CONTENT_COLUMNS, Format, Reading
from marco_train.data.sources import Rows
from marco_train.data.turns import RowError
from marco_train.distributed import is_main
from marco_train.errors import InputError

SHINGLE = 5  # characters that are compared together, in any language
NUM_HASHES = 128  # of a prompt: similarities are known to about 0.05
SEED = 42


def distinct_rows(rows: Rows, form: Format, near: float | None) -> Sequence[int]:
    """The first row of each distinct prompt; a row at fault repeats none.

    A prompt is all that stands before the answer, the turns of an earlier one included.

    Args:
        rows: Of a dataset.
        form: How they are read.
        near: The similarity from which prompts count as one. None: only equal ones do.
    """
    from tqdm import tqdm

    columns = CONTENT_COLUMNS | set(form.columns.values())
    is_new = None if near is None else _Similar(near)
    seen: set[bytes] = set()
    kept = array("q")
    shown = tqdm(rows.walk(columns), "prompts", len(rows), delay=3, disable=not is_main())
    for row, found in enumerate(shown):
        if isinstance(found, RowError):
            kept.append(row)
            continue
        # Most repetitions are of whole rows, which need not be read to be known.
        whole = digest_of_text(repr(found))
        if whole in seen:
            continue
        try:
            asked = _asked(form.read(found))
        except RowError:
            kept.append(row)
            continue
        prompt = digest_of_text(asked)
        if prompt not in seen and (is_new is None or is_new.add(row, asked)):
            kept.append(row)
        seen |= {whole, prompt}
    return kept


def share_of_prompts(rows: Rows, form: Format, share: float) -> Sequence[int]:
    """The rows of a share of the prompts: of those whose digests are the least.

    Rows of one prompt are all among them or none is, and a row at fault is not.

    Args:
        rows: Of a dataset.
        form: How they are read.
        share: Of the distinct prompts; one at least, and never all.
    """
    from tqdm import tqdm

    columns = CONTENT_COLUMNS | set(form.columns.values())
    by_prompt: dict[bytes, list[int]] = {}
    shown = tqdm(rows.walk(columns), "prompts", len(rows), delay=3, disable=not is_main())
    for row, found in enumerate(shown):
        if isinstance(found, RowError):
            continue
        try:
            by_prompt.setdefault(digest_of_text(_asked(form.read(found))), []).append(row)
        except RowError:
            continue
    count = min(max(1, round(share * len(by_prompt))), len(by_prompt) - 1)
    chosen = sorted(by_prompt)[: max(0, count)]
    return array("q", sorted(row for prompt in chosen for row in by_prompt[prompt]))


def _asked(reading: Reading) -> str:
    """All that stands before the answer; of a row without turns, all of it."""
    end = len(reading.messages)
    while end and reading.messages[end - 1].role == "assistant":
        end -= 1
    if not reading.messages:
        return reading.text or repr(reading.input_ids)
    turns = [
        f"{m.role}\n{m.content}" + (f"\n{m.tool_calls!r}" if m.tool_calls else "")
        for m in reading.messages[:end]
    ]
    return "\n\n".join([*turns, *map(repr, reading.tools)])


def digest_of_text(text: str) -> bytes:
    """Digest a text, which may hold halves of surrogate pairs."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class _Similar:
    """Prompts so far, told by their MinHashes: https://github.com/beowolx/rensa."""

    def __init__(self, similarity: float) -> None:
        try:
            import rensa
        except ImportError as error:
            raise InputError(
                "data.sources.*.near_duplicates needs the package rensa: pip install "
                "'marco-train[curation]'"
            ) from error
        self._hash = rensa.RMinHash
        self._known = rensa.RMinHashDeduplicator(similarity, NUM_HASHES, True)

    def add(self, row: int, asked: str) -> bool:
        """Add a prompt; says whether none before it was like it."""
        text = " ".join(asked.casefold().split())
        hashes = self._hash(NUM_HASHES, SEED)
        hashes.update([text[at : at + SHINGLE] for at in range(max(1, len(text) - SHINGLE + 1))])
        return bool(self._known.add(str(row), hashes))
