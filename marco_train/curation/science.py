"""Answers to scientific questions: several of each, of which one that is confirmed is kept.

    prompts -> samples -> by a verifier, by the source's own answer, or by most samples -> quality

Marco-MoE (arXiv 2604.25578), section 4.1, has the prompts of nvidia/Nemotron-Cascade-2-SFT-Data
(`science`) answered anew.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from marco_train.config.curation import ScienceConfig
from marco_train.config.data import SourceConfig
from marco_train.content import look
from marco_train.curation.choices import turns
from marco_train.curation.decontamination import decontaminated
from marco_train.curation.duplicates import ExactDuplicates
from marco_train.curation.frame import (
    Cost,
    Counted,
    Dropped,
    Origin,
    Outcome,
    Pipeline,
    Row,
    RowStep,
    Step,
    StepCounts,
    language_of,
)
from marco_train.curation.llm import Answer, Ask, AskStep
from marco_train.curation.quality import Quality
from marco_train.curation.selection import Best
from marco_train.data.chat import without_thinking
from marco_train.data.conversations import BadRow, Source
from marco_train.evaluation.benchmark.extraction import HASHES, SAID_LINE, boxed, plain_number
from marco_train.evaluation.verifiers import check_verifier, comparable, verify
from marco_train.types import Conversation

ROWS_PER_SECOND = 10_000
NUMERIC = re.compile(r"[-+−]?[\d.,٫٬\s\u00a0\u202f']*\d")
UNCONFIRMED = "nothing"


@dataclass(frozen=True)
class Prompts:
    """The questions of a data set, in any of the shapes that data is read in."""

    cfg: SourceConfig
    language: str
    """Of rows that name none."""
    name: str = "prompts"

    def identity(self) -> Any:
        """Return what is read, and how."""
        return [self.cfg.path, look(self.cfg.path), self.cfg.subset, self.cfg.split, self.language]

    def plan(self) -> Cost:
        """Count the rows."""
        rows = len(self._opened())
        return Cost(rows, seconds=rows / ROWS_PER_SECOND)

    def read(self, skip: int) -> Iterator[Row | Dropped]:
        """Read the prompt of each row, with the answer that the source gives."""
        source = self._opened()
        for place in range(skip, len(source)):
            yield self._row(source[place], place)

    def _opened(self) -> Source:
        return Source("input", self.cfg)

    def _row(self, found: Any, place: int) -> Row | Dropped:
        id_ = f"{Path(self.cfg.path).name}:{place}"
        if isinstance(found, BadRow):
            return Dropped({"id": id_}, f"row at fault: {found.kind}")
        if not isinstance(found, Conversation) or not found.asked:
            return Dropped({"id": id_}, "no question")
        asked = [{"role": m.role, "content": m.content} for m in found.asked]
        if asked[-1]["role"] != "user" or any(m["role"] == "tool" for m in asked):
            return Dropped({"id": id_}, "no question of a user at its end")
        answer = found.messages[-1] if len(found.messages) > len(found.asked) else None
        reference = without_thinking(answer.content).strip() if answer else ""
        if found.verifier and not _is_taken(reference, found.verifier):
            return Dropped({"id": id_}, "its verifier does not take the source's own answer")
        return {
            "id": id_,
            "language": found.language or self.language,
            "domain": "",
            "asked": asked,
            "reference": reference,
            "verifier": dict(found.verifier),
        }


def _is_taken(reference: str, verifier: Mapping[str, Any]) -> bool:
    try:
        check_verifier(verifier)
        return verify(
            final_answer(reference) or reference, final_answer(reference) or reference, verifier
        )
    except (ValueError, LookupError, TypeError):  # what strangers write as a verifier
        return False


def pipeline(cfg: ScienceConfig) -> Pipeline:
    """Lay out the pipeline."""
    source = Prompts(
        SourceConfig(path=cfg.input, subset=cfg.subset, split=cfg.split), cfg.languages[0]
    )
    languages = frozenset(cfg.languages)
    steps: list[Step] = [
        RowStep("languages", lambda row: _of_languages(row, languages), sorted(languages)),
        ExactDuplicates(lambda row: str(row["asked"]), "prompts"),
        Best(
            _draw, f"digest with {cfg.seed}", cfg.prompts_per_language, 1.0, len(languages), "drawn"
        ),
        AskStep(
            "sampled",
            cfg.llm,
            Path(cfg.output_dir) / "llm",
            lambda row: [Ask("as asked", row["asked"], sample=n) for n in range(cfg.num_samples)],
            lambda row, answers: _confirmed(row, answers, cfg),
            about=[cfg.num_samples, cfg.min_agreement, cfg.only_confirmed],
            calls_per_row=cfg.num_samples,
            completion_tokens_per_call=1_000,
        ),
        Quality(cfg.quality),
    ]
    steps += decontaminated(cfg)
    return Pipeline(
        kind=cfg.kind.value,
        source=source,
        steps=steps,
        origins=[Origin(cfg.input, cfg.source_revision, "as of the input")],
        columns={
            "id": "string",
            "category": "string",
            "confirmed_by": "string",
            "num_agreeing": "int64",
            "num_samples": "int64",
        },
        weaknesses=_weaknesses,
    )


def _of_languages(row: Row, languages: frozenset[str]) -> Outcome:
    return row if language_of(row) in languages else Dropped(row, "of another language")


def _draw(row: Row) -> float:
    """A number that has nothing to do with what a prompt says, the same at every launch."""
    return int.from_bytes(blake2b(str(row["asked"]).encode("utf-8", "replace")).digest()[:6], "big")


def _confirmed(row: Row, answers: Sequence[Answer], cfg: ScienceConfig) -> Iterator[Outcome]:
    """Keep one of the responses that are right, as far as it can be told."""
    texts = [answer.text for answer in answers if answer.is_usable]
    if not texts:
        problems = Counter(answer.problem for answer in answers)
        yield Dropped(row, f"no response: {problems.most_common(1)[0][0]}")
        return
    by, right = confirmed(texts, row["reference"], row["verifier"], cfg.min_agreement)
    yield Counted(f"confirmed by {by}", 1, language_of(row))
    if not right:
        yield Dropped(row, f"no response confirmed by {by}")
    elif by == UNCONFIRMED and cfg.only_confirmed:
        yield Dropped(row, "not confirmed")
    else:
        *before, question = row["asked"]
        yield row | {
            "category": "science",
            "messages": [*before, *turns(question["content"], right[0])],
            "confirmed_by": by,
            "num_agreeing": len(right),
            "num_samples": len(texts),
        }


def confirmed(
    texts: Sequence[str], reference: str, verifier: Mapping[str, Any], min_agreement: float
) -> tuple[str, list[str]]:
    """Find the responses that are right, the one to keep first, and say by what they are.

    Args:
        texts: Responses.
        reference: The source's own answer; empty where there is none.
        verifier: As rows of data name one; empty where there is none.
        min_agreement: Share of the responses that have to have one final answer.

    Returns:
        `verifier`, `source`, `agreement` or `nothing`, where no response ends in an answer that can
        be compared; of these the first is the one most like the others.
    """
    finals = [final_answer(text) for text in texts]
    if verifier:
        said = [final or text for final, text in zip(finals, texts, strict=True)]
        key = final_answer(reference) or reference
        return "verifier", [
            text for text, each in zip(texts, said, strict=True) if verify(each, key, verifier)
        ]
    wanted = final_answer(reference)
    if wanted is not None:
        return "source", [text for text, each in zip(texts, finals, strict=True) if each == wanted]
    given = Counter(final for final in finals if final is not None)
    if 2 * given.total() < len(texts) or not given:
        return UNCONFIRMED, _most_alike_first(texts)
    most, votes = given.most_common(1)[0]
    is_agreed = votes >= max(2, min_agreement * len(texts)) or len(texts) == 1
    same = [text for text, each in zip(texts, finals, strict=True) if each == most]
    return "agreement", same if is_agreed else []


def final_answer(text: str) -> str | None:
    """The answer that a text ends in, in a form in which equal ones are equal; None: none."""
    said = comparable(without_thinking(text))
    lines = [match for pattern in (HASHES, SAID_LINE) for match in pattern.findall(said)[-1:]]
    box = boxed(said)
    if box is None and not lines:
        return None
    bare = (lines[0] if box is None else box).strip().strip("*$`.。 ()").strip()
    if NUMERIC.fullmatch(bare):
        return plain_number(bare)
    return " ".join(bare.casefold().split()) or None


def _most_alike_first(texts: Sequence[str]) -> list[str]:
    """Order texts by how many words they share with the others."""
    words = [set(text.casefold().split()) for text in texts]

    def likeness(place: int) -> float:
        return sum(len(words[place] & w) / max(1, len(words[place] | w)) for w in words)

    return [texts[place] for place in sorted(range(len(texts)), key=lambda p: -likeness(p))]


def _weaknesses(counts: Sequence[StepCounts]) -> list[str]:
    by = {
        name.removeprefix("confirmed by "): count
        for each in counts
        for name, count in each.whole.counted.items()
        if name.startswith("confirmed by ")
    }
    listed = ", ".join(f"{name} {count:,}" for name, count in sorted(by.items())) or "none"
    return [
        f"Prompts by what their responses were held against: {listed}. Samples of one model may "
        "agree on a wrong answer, and where nothing confirms one it may be wrong.",
    ]
