"""Rules of sentences and pairs, each with a text on either side of its bound."""

import pytest

from marco_train.config.curation import CARD_LANGUAGES
from marco_train.curation.heuristics import (
    ENGLISH_RULES,
    PAIR_RULES,
    Pair,
    Text,
    chosen_rules,
    length_ratio,
    numbers_of,
    repeated_ngram_share,
    shared_numbers,
    top_ngram_share,
)
from marco_train.curation.scripts import SCRIPTS, share_of_script
from marco_train.errors import InputError
from tests.helpers.nllb_lines import ENGLISH, OTHERS

GOOD = "The old library in our town is open every day of the week."
# By rule: a text that it drops.
BAD = {
    "min_words": "See you soon",
    "max_words": " ".join(f"word{n}a" for n in range(151)),
    "min_word_length": "I am at a bus on A of us",
    "max_word_length": "Extraordinarily internationalised misunderstandings notwithstanding",
    "symbols": "Wait... what... is... going... on... over there",
    "alphabetic_words": "Call now 12 34 56 78 today",
    "repeated_5grams": "we all like to eat we all like to eat bread with butter",
    "repeated_6grams": "a b c d e f a b c d e f " + "other words stand here too " * 1,
    "repeated_7grams": "a b c d e f g a b c d e f g and some other words",
    "repeated_8grams": "a b c d e f g h a b c d e f g h and some other words",
    "repeated_9grams": "a b c d e f g h i a b c d e f g h i and other words",
    "repeated_10grams": "a b c d e f g h i j a b c d e f g h i j and other words",
    "braces": "Set the value of {name} in the first line of the file",
    "lorem_ipsum": "Lorem ipsum dolor sit amet and so on",
    "javascript": "Please turn on JavaScript to see this page",
    "policies": "Read our Privacy Policy before you go on",
    "stop_words": "Big dogs eat many small red apples",
    "bullet_lines": "- one\n- two\n- three",
    "ellipsis_lines": "And then...\nAnd then…\nThe end.",
    "repeated_lines": "one\none\none\ntwo",
    "repeated_line_characters": "one\none\none\ntwo",
    "repeated_paragraphs": "one\n\none\n\none\n\ntwo",
    "repeated_paragraph_characters": "one\n\none\n\none\n\ntwo",
    "top_2gram": "so much of so much of so much",
    "top_3gram": "as far as we know as far as that",
    "top_4gram": "what do you mean by what do you mean",
    "ended_lines": "no end\nno end here\nnor here",
    "short_lines": "short\nlines\nalone",
    "characters_in_repeated_lines": "a whole line\na whole line\nanother line that is longer",
    "newlines": "one\ntwo\nthree",
}


@pytest.mark.parametrize("rule", ENGLISH_RULES, ids=lambda rule: rule.name)
def test_each_rule_drops_what_it_is_made_for(rule: object) -> None:
    (found,) = [each for each in ENGLISH_RULES if each is rule]
    assert not found.passes(Text(BAD[found.name]))
    if found.is_on:
        assert found.passes(Text(GOOD))


def test_sentences_pass_all_rules_that_are_on_by_themselves() -> None:
    english, pairs = chosen_rules({}, {})
    for code, others in OTHERS.items():
        script = CARD_LANGUAGES[code][0].partition("_")[2]
        for sentence, other in zip(ENGLISH, others, strict=True):
            assert [rule.name for rule in english if not rule.passes(Text(sentence))] == []
            pair = Pair(sentence, other, script)
            assert [(code, rule.name) for rule in pairs if not rule.passes(pair)] == []


def test_rules_are_switched_and_bounded_by_name() -> None:
    english, pairs = chosen_rules({"stop_words": True, "braces": False}, {"min_words": 9})
    names = {rule.name: rule for rule in english}
    assert "stop_words" in names and "braces" not in names and names["min_words"].bound == 9
    assert len(pairs) == len(PAIR_RULES)
    for rules, bounds, field in (({"short": True}, {}, "rules"), ({}, {"short": 1}, "thresholds")):
        with pytest.raises(InputError, match=rf"{field}\.short: there is no such rule; known are"):
            chosen_rules(rules, bounds)


def test_repetition_is_measured_in_characters() -> None:
    text = Text("one two three four five six one two three four five six end")
    assert repeated_ngram_share(text, 5) == pytest.approx(22 / 47)
    assert repeated_ngram_share(text, 7) == 0
    assert top_ngram_share(Text("so much of so much"), 2) == pytest.approx(14 / 18)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("In 2,020 or 2020 or 2 020 or 2.020", {"2020": 4}),
        ("Of 12 3 and 3.5 and 7", {"12": 1, "35": 1}),
        ("عام ٢٠٢٠ و۱۲ و২৫ वर्ष २५", {"2020": 1, "12": 1, "25": 2}),
        ("２５本", {"25": 1}),
        ("no number", {}),
    ],
)
def test_numbers_are_read_in_the_digits_of_every_script(text: str, numbers: dict[str, int]) -> None:
    assert dict(numbers_of(text)) == numbers


def test_the_numbers_of_a_pair_are_shared() -> None:
    assert shared_numbers(Pair("25 of 1,000", "25 von 1.000", "Latn")) == 1
    assert shared_numbers(Pair("25 of 1,000", "25 von 1.001", "Latn")) == pytest.approx(1 / 3)
    assert shared_numbers(Pair("3 of them", "drei davon", "Latn")) == 1


def test_lengths_are_compared_by_what_letters_say() -> None:
    for code, others in OTHERS.items():
        script = CARD_LANGUAGES[code][0].partition("_")[2]
        ratios = [length_ratio(Pair(*both, script)) for both in zip(ENGLISH, others, strict=True)]
        assert max(ratios) < 1.45, (code, ratios)
    assert length_ratio(Pair("Some words", "...", "Latn")) == float("inf")


def test_scripts_are_told_by_their_letters() -> None:
    for code, others in OTHERS.items():
        script = CARD_LANGUAGES[code][0].partition("_")[2]
        for text in others:
            assert share_of_script(text, script) > 0.97
            strangers = (
                set(SCRIPTS) - {script} - ({"Jpan", "Hans"} if code in {"zh", "ja"} else set())
            )
            assert max(share_of_script(text, other) for other in strangers) < 0.1
    assert share_of_script("12 !", "Latn") == 0
    assert share_of_script("Москва ABC", "Cyrl") == pytest.approx(6 / 9)
