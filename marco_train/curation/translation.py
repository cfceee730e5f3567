"""Translation both ways from mined pairs: the best of each language, asked for in many ways.

    pairs -> language -> heuristics -> checks -> quality
          -> exact -> near -> similarity -> best -> prompts

Section 4.1 of Marco-MoE: web-mined pairs of NLLB, heuristics of Gopher and FineWeb on the English
side, the similarity of an embedding model, the best 10,000 of each language.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from marco_train.config.curation import CARD_LANGUAGES, TranslationConfig
from marco_train.curation.decontamination import decontaminated
from marco_train.curation.duplicates import ExactDuplicates, NearDuplicates, normal
from marco_train.curation.embedding import Similarity
from marco_train.curation.frame import (
    Cost,
    Counted,
    Dropped,
    Origin,
    Outcome,
    PerRow,
    Pipeline,
    Row,
    RowStep,
    Shard,
    Shards,
    Step,
    StepCounts,
    Transform,
)
from marco_train.curation.heuristics import (
    ENGLISH_RULES,
    PAIR_RULES,
    Pair,
    Rule,
    Text,
    chosen_rules,
)
from marco_train.curation.nllb import CUT, NLLB
from marco_train.curation.quality import Quality
from marco_train.curation.scripts import share_of_script
from marco_train.curation.selection import OVER_SHARE, Best
from marco_train.curation.templates import digest_of_templates, templates_of
from marco_train.errors import InputError, require
from marco_train.evaluation.languages import Identifier

LEAST_LID = 0.5
"""Of NLLB's own columns, where nothing else tells the language."""
LEAST_OF_SCRIPT = 0.5
BY_COLUMNS = "sides judged by NLLB's own column and the script"
# What other models call languages of the card, beside the codes that FLORES has for them.
OTHER_CODES = {
    "zh": {"cmn", "zho", "zh"},
    "ar": {"arb", "ara", "ar"},
    "ms": {"zsm", "msa", "ms"},
    "az": {"azj", "aze", "az"},
    "ne": {"npi", "nep", "ne"},
}


def script_of(code: str) -> str:
    """The script of a language of the card."""
    return CARD_LANGUAGES[code][0].partition("_")[2]


class Tells(Protocol):
    """Tells languages; None where it cannot."""

    def matches(self, text: str, code: str) -> bool | None:
        """Whether a text is in a language."""


class FastText:
    """A fastText model, as GlotLID, whose labels are `__label__deu_Latn` or `__label__de`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @classmethod
    def load(cls, file: str) -> "FastText":
        """Load a model.

        Raises:
            InputError: There is none, or the package is missing.
        """
        try:
            from fasttext import load_model
        except ImportError as error:
            raise InputError(
                "language_model needs the package fasttext-predict-v2: pip install "
                "'marco-train[curation]'"
            ) from error
        require(Path(file).is_file(), f"language_model: there is no file {file!r}")
        try:
            return cls(load_model(file))
        except (ValueError, RuntimeError) as error:
            raise InputError(f"language_model {file!r} is no fastText model: {error}") from error

    def matches(self, text: str, code: str) -> bool | None:
        """Whether the likeliest language of a text is this one; its script is not looked at."""
        (label, *_), _ = self._model.predict(" ".join(text.split()))
        told = label.removeprefix("__label__").partition("_")[0]
        flores = CARD_LANGUAGES[code][0].partition("_")[0]
        return told in OTHER_CODES.get(code, {code, flores})


@dataclass(frozen=True)
class Languages(PerRow):
    """Drops pairs with a side in another language than it should be."""

    model: str | None
    """File of a fastText model. None: lingua."""
    name: str = "language"

    def identity(self) -> Any:
        """Return the model's name and size."""
        file = Path(self.model) if self.model else None
        return [file.name, file.stat().st_size] if file and file.is_file() else self.model

    def plan(self, rows: float) -> Cost:
        """Estimate its time."""
        return Cost(rows, seconds=rows / 1_500)

    @contextmanager
    def opened(self, before: Shards, scratch: Path) -> Iterator[Transform]:
        """Load the identifier.

        Raises:
            InputError: It cannot be loaded.
        """
        if self.model is None:
            identifier: Tells = Identifier([], "a curation of translations")
        else:
            identifier = FastText.load(self.model)

        def transform(shard: Shard) -> Iterator[Outcome]:
            for row in shard.rows:
                yield from judge_languages(row, identifier)

        yield transform


def judge_languages(row: Row, identifier: Tells) -> Iterator[Outcome]:
    """Judge both sides of a pair; where the identifier cannot, by NLLB's columns and the script."""
    language = row["language"]
    sides = (
        ("english", "en", "English is in another language"),
        ("other", language, "the other side is in another language"),
    )
    for side, code, reason in sides:
        told = identifier.matches(row[side], code)
        if told is None:
            yield Counted(BY_COLUMNS, 1, language)
            in_script = share_of_script(row[side], script_of(code)) >= LEAST_OF_SCRIPT
            told = in_script and row[f"{side}_lid"] >= LEAST_LID
        if not told:
            yield Dropped(row, reason)
            return
    yield row


def heuristics(rules: Sequence[Rule[Text]]) -> RowStep:
    """Drop pairs whose English breaks a rule."""

    def apply(row: Row) -> Outcome:
        text = Text(row["english"])
        broken = next((rule.name for rule in rules if not rule.passes(text)), "")
        return Dropped(row, broken) if broken else row

    about = [(rule.name, rule.bound) for rule in rules]
    return RowStep("heuristics", apply, about, rows_per_second=10_000)


def checks(rules: Sequence[Rule[Pair]]) -> RowStep:
    """Drop pairs whose sides do not fit each other or their scripts."""

    def apply(row: Row) -> Outcome:
        pair = Pair(row["english"], row["other"], script_of(row["language"]))
        broken = next((rule.name for rule in rules if not rule.passes(pair)), "")
        return Dropped(row, broken) if broken else row

    about = [(rule.name, rule.bound) for rule in rules]
    return RowStep("checks", apply, about, rows_per_second=10_000)


def prompts(languages: Sequence[str], seed: int) -> RowStep:
    """Make of each pair two conversations, one each way; the template is drawn by the pair's id."""
    digests = {code: digest_of_templates(code) for code in ("en", *languages)}

    def apply(row: Row) -> Iterator[Outcome]:
        language = row["language"]
        for from_english in (True, False):
            direction = f"en-{language}" if from_english else f"{language}-en"
            drawn = _number_of(f"{seed} {row['id']} {direction}")
            in_english = drawn % 2 == 0
            templates = templates_of("en" if in_english else language, language)
            number = drawn // 2 % templates.count
            given, wanted = ("english", "other") if from_english else ("other", "english")
            asked = templates.fill(number, row[given], from_english=from_english)
            yield row | {
                "messages": [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": row[wanted]},
                ],
                "direction": direction,
                "template": f"{'en' if in_english else language}/{number}",
                "category": "translation",
            }

    return RowStep("prompts", apply, [seed, digests], made_of_each=2)


def _number_of(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def pipeline(cfg: TranslationConfig) -> Pipeline:
    """Put the steps together; nothing is read yet but the beginnings of the files.

    Raises:
        InputError: The input lacks a language, or a rule is unknown.
    """
    english_rules, pair_rules = chosen_rules(cfg.rules, cfg.thresholds)
    embeds = cfg.embedding.model is not None
    score: Callable[[Row], float] = lambda row: row["similarity" if embeds else "laser"]  # noqa: E731
    quality = replace(cfg.quality, language=False)  # that was judged before
    steps: list[Step] = [
        Languages(cfg.language_model),
        heuristics(english_rules),
        checks(pair_rules),
        Quality(quality, _sides, "both sides"),
        ExactDuplicates(lambda row: f"{normal(row['english'])}\n{normal(row['other'])}", "pairs"),
    ]
    if cfg.near_duplicates is not None:
        steps.append(
            NearDuplicates(lambda row: normal(row["english"]), "English", cfg.near_duplicates)
        )
    if embeds:
        steps.append(Similarity(cfg.embedding, lambda row: (row["english"], row["other"])))
    steps += [
        Best(
            score,
            "similarity" if embeds else "laser",
            cfg.rows_per_language,
            cfg.max_domain_share,
            len(cfg.languages),
        ),
        prompts(cfg.languages, cfg.seed),
        *decontaminated(cfg),
    ]
    kinds = {"id": "string", "direction": "string", "template": "string", "category": "string"}
    scores = {"laser": "double", "english_lid": "double", "other_lid": "double"}
    return Pipeline(
        kind=cfg.kind.value,
        source=NLLB.of(Path(cfg.input), cfg.languages, cfg.max_pairs),
        steps=steps,
        origins=[
            Origin(
                "NLLB, mined pairs (https://huggingface.co/datasets/allenai/nllb)",
                cfg.source_revision,
                "ODC-BY, and the terms of the pages that were mined",
            )
        ],
        columns=kinds
        | {"domain": "string"}
        | scores
        | ({"similarity": "double"} if embeds else {}),
        weaknesses=lambda counts: _weaknesses(cfg, counts),
        prompts={
            f"templates of {code}": digest_of_templates(code) for code in ("en", *cfg.languages)
        },
        details=[*_rules_in_words(cfg)],
    )


def _sides(row: Row) -> list[tuple[str, str]]:
    return [(row["english"], "en"), (row["other"], row["language"])]


def _rules_in_words(cfg: TranslationConfig) -> Iterator[str]:
    """All rules with their bounds and sources, for the card."""
    rules: tuple[Rule[Any], ...] = (*ENGLISH_RULES, *PAIR_RULES)
    for rule in rules:
        switch = "on" if cfg.rules.get(rule.name, rule.is_on) else "off"
        bound = cfg.thresholds.get(rule.name, rule.bound)
        side = "at least" if rule.is_least else "at most"
        yield f"{rule.name} ({switch}): {rule.what}, {side} {bound:g}; {rule.source}"


def _weaknesses(cfg: TranslationConfig, counts: Sequence[StepCounts]) -> Iterator[str]:
    by_name = {each.name: each for each in counts}
    yield "The pairs are mined from the web and were not read by anybody; some are machine-made."
    if cfg.embedding.model is None:
        yield "There was no embedding.model: LASER's score, which comes with NLLB, ranks the pairs."
    if cfg.language_model is None:
        identifier = Identifier([], "a curation of translations")
        unknown = [code for code in cfg.languages if not identifier.knows(code)]
        if unknown:
            yield (
                f"The identifier of languages does not know {', '.join(unknown)}: NLLB's own "
                "columns and the script judge them."
            )
    judged = by_name["language"].whole.counted[BY_COLUMNS]
    if judged:
        yield (
            f"{judged:,} sides, short ones or of such languages, were judged by NLLB's own column "
            f"(at least {LEAST_LID}) and by their script."
        )
    cut = [code for code, tally in by_name["pairs"].languages.items() if tally.dropped[CUT]]
    if cut:
        yield f"The files of {', '.join(cut)} are cut short: what is missing was never seen."
    read_in_part = [
        code for code, tally in by_name["pairs"].languages.items() if tally.rows_in == cfg.max_pairs
    ]
    if read_in_part:
        yield (
            f"Of {', '.join(read_in_part)} the first {cfg.max_pairs:,} lines were read, which NLLB "
            "sorts by LASER's score, and no others."
        )
    best = by_name["best"]
    few = {
        code: best.of(code).rows_out
        for code in cfg.languages
        if best.of(code).rows_out < cfg.rows_per_language
    }
    if few:
        named = ", ".join(f"{code} {count:,}" for code, count in few.items())
        yield f"Of some languages fewer than {cfg.rows_per_language:,} pairs remain: {named}."
    over = best.whole.counted[OVER_SHARE]
    if over:
        yield (
            f"{over:,} pairs are of domains over their share of {cfg.max_domain_share:.0%}: the "
            "others were too few."
        )
    yield "Nearly equal English is told within a language, and may stand in several languages."
