"""Questions on the culture of a language's countries, made of what Wikidata knows.

    entities -> topic, language -> popular -> facts in words -> description -> request -> answer
                                                                            -> question with choices

Marco-MoE (arXiv 2604.25578), section 4.1. Each text of the LLM is held against the facts.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from marco_train.config.curation import CARD_LANGUAGES, CultureConfig, LLMConfig
from marco_train.curation.choices import CHOICE, OPEN, Distractors, Lettered, turns
from marco_train.curation.decontamination import decontaminated
from marco_train.curation.duplicates import ExactDuplicates
from marco_train.curation.entities import Classified, Entities, Named, Popular
from marco_train.curation.facts import unsupported
from marco_train.curation.frame import Dropped, Origin, Outcome, Pipeline, Row, Step, StepCounts
from marco_train.curation.llm import Answer, Ask, AskStep, read_prompt
from marco_train.curation.quality import Quality

DESCRIBE, INSTRUCT, ANSWER, CHOOSE = "describe_v1", "instruct_v1", "answer_v1", "choose_v1"
# Who asks, so that requests differ.
ASKERS = (
    "a curious traveller",
    "a pupil who prepares a talk",
    "somebody who has just read the name in the news",
    "a parent whose child asked",
    "a foreigner who learns the language",
    "a journalist in a hurry",
    "somebody who wants a few sentences for a leaflet",
    "an older person who remembers it from long ago",
)


def object_of(*names: str) -> dict[str, Any]:
    """A JSON schema of an object with these texts, none of them empty."""
    return {
        "type": "object",
        "properties": {name: {"type": "string", "minLength": 1} for name in names},
        "required": list(names),
        "additionalProperties": False,
    }


def pipeline(cfg: CultureConfig) -> Pipeline:
    """Lay out the pipeline.

    Raises:
        InputError: The input has no file that it reads.
    """
    source = Entities.of(Path(cfg.input), cfg.languages, cfg.min_articles)
    num_languages = len(cfg.languages)
    steps: list[Step] = [
        Classified(cfg.languages, cfg.min_articles),
        Popular(cfg.entities_per_language, num_languages),
        Named(source, cfg.min_facts),
        *_asked(cfg.llm, Path(cfg.output_dir) / "llm", cfg),
        Lettered(cfg.seed),
        Quality(cfg.quality),
        ExactDuplicates(lambda row: str(row["messages"][0]["content"]), "requests"),
    ]
    steps += decontaminated(cfg)
    prompts = [read_prompt(name) for name in (DESCRIBE, INSTRUCT, ANSWER, CHOOSE)]
    return Pipeline(
        kind=cfg.kind.value,
        source=source,
        steps=steps,
        origins=[Origin("Wikidata (https://www.wikidata.org)", cfg.source_revision, "CC0 1.0")],
        columns={
            "id": "string",
            "category": "string",
            "country": "string",
            "form": "string",
            "letter": "string",
            "num_articles": "int64",
        },
        weaknesses=lambda counts: _weaknesses(cfg, counts),
        prompts={prompt.name: prompt.digest for prompt in prompts},
    )


def _asked(llm: LLMConfig, cache: Path, cfg: CultureConfig) -> list[Step]:
    """The steps that ask the LLM."""

    def step(
        name: str,
        prompts: Sequence[str],
        ask: Callable[[Row], Sequence[Ask]],
        take: Callable[[Row, list[Answer]], Outcome],
        calls_per_row: float = 1,
    ) -> AskStep:
        digests = {prompt: read_prompt(prompt).digest for prompt in prompts}
        return AskStep(name, llm, cache, ask, take, digests, calls_per_row=calls_per_row)

    return [
        step("described", [DESCRIBE], _ask_description, _take_description),
        Distractors(cfg.choice_share, cfg.seed),
        step("requested", [INSTRUCT, CHOOSE], _ask_request, _take_request),
        # Questions with choices have their answers.
        step("answered", [ANSWER], _ask_answer, _take_answer, 1 / (1 + cfg.choice_share)),
    ]


def _ask(name: str, row: Row, schema: Mapping[str, Any] | None, **values: str) -> Ask:
    prompt = read_prompt(name, row["language"])
    filled = prompt.fill(
        label=label(row),
        language=CARD_LANGUAGES[row["language"]][1],
        facts=facts_in_words(row),
        **values,
    )
    return Ask(prompt.version, [{"role": "user", "content": filled}], schema)


def label(row: Row) -> str:
    """What an entity is called in the row's language."""
    return str(row["labels"][row["language"]])


def facts_in_words(row: Row) -> str:
    """All that is known of an entity, a line each."""
    described = row["descriptions"].get(row["language"]) or row["descriptions"].get("en")
    lines = [f"- in short: {described}"] if described else []
    english = row["labels"].get("en")
    if english and english != label(row):
        lines.append(f"- in English: {english}")
    return "\n".join(lines + [f"- {name}: {', '.join(values)}" for name, *values in row["facts"]])


def known_texts(row: Row) -> list[str]:
    """What a text on an entity may take its names and numbers from."""
    values = [value for _, *values in row["facts"] for value in values]
    country = CARD_LANGUAGES[row["language"]][1]
    return [*row["labels"].values(), *row["descriptions"].values(), *values, country]


def _checked(row: Row, text: str, what: str, others: Sequence[str] = ()) -> Dropped | None:
    wrong = unsupported(text, [*known_texts(row), *others], row["language"])
    return (
        Dropped(row | {"unsupported": wrong}, f"{what} says what the facts do not")
        if wrong
        else None
    )


def _ask_description(row: Row) -> list[Ask]:
    return [_ask(DESCRIBE, row, object_of("description"))]


def _take_description(row: Row, answers: list[Answer]) -> Outcome:
    (answer,) = answers
    if not answer.is_usable:
        return Dropped(row, f"no description: {answer.problem}")
    text = answer.value["description"].strip()
    return _checked(row, text, "the description") or row | {"description": text}


def _ask_request(row: Row) -> list[Ask]:
    if row["form"] == CHOICE:
        others = "; ".join(row["others"])
        return [_ask(CHOOSE, row, object_of("question", "reason"), others=others)]
    asker = ASKERS[xxh3_64_intdigest(f"{row['id']} {row['language']}".encode()) % len(ASKERS)]
    values = {"description": row["description"], "asker": asker}
    return [_ask(INSTRUCT, row, object_of("request"), **values)]


def _take_request(row: Row, answers: list[Answer]) -> Outcome:
    (answer,) = answers
    if not answer.is_usable:
        what = "question" if row["form"] == CHOICE else "request"
        return Dropped(row, f"no {what}: {answer.problem}")
    if row["form"] == OPEN:
        text = answer.value["request"].strip()
        return _checked(row, text, "the request") or row | {"request": text}
    question, reason = answer.value["question"].strip(), answer.value["reason"].strip()
    named = [
        name for name in (label(row), *row["others"]) if name.casefold() in question.casefold()
    ]
    if named:
        return Dropped(row, "the question names a choice")
    if label(row).casefold() not in reason.casefold():
        return Dropped(row, "the reason does not name the right choice")
    wrong = _checked(row, f"{question}\n{reason}", "the question", row["others"])
    return wrong or row | {"question": question, "reason": reason}


def _ask_answer(row: Row) -> list[Ask]:
    if row["form"] == CHOICE:
        return []
    values = {"instruction": row["request"], "description": row["description"]}
    return [_ask(ANSWER, row, object_of("answer"), **values)]


def _take_answer(row: Row, answers: list[Answer]) -> Outcome:
    found = row | {"category": row["topic"]}
    if row["form"] == CHOICE:
        return found
    (answer,) = answers
    if not answer.is_usable:
        return Dropped(row, f"no answer: {answer.problem}")
    text = answer.value["answer"].strip()
    return _checked(row, text, "the answer") or found | {"messages": turns(row["request"], text)}


def _weaknesses(cfg: CultureConfig, counts: Sequence[StepCounts]) -> list[str]:
    """Say what a reader of the card should know, by what became of the rows."""
    by_name = {each.name: each for each in counts}
    found = {code: by_name["popular"].of(code).rows_out for code in cfg.languages}
    few = {code: count for code, count in found.items() if count < cfg.entities_per_language}
    said = [
        "Names are held against the facts where the script has capitals (Latin, Cyrillic, Greek; "
        "of German only what follows another noun); of other scripts titles in quotation marks and "
        "words in Latin letters are, and numbers and years in all. Numbers in words are not.",
        "That no wrong choice fits its question is asked of the LLM, and not checked.",
        "What Wikidata says is not checked, and is as old as its dump.",
    ]
    if few:
        listed = ", ".join(f"{code} {count:,}" for code, count in few.items())
        said.append(f"Fewer than {cfg.entities_per_language:,} entities were found for: {listed}.")
    return said
