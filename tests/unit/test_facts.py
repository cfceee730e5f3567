"""A text says no number and no name that the facts do not."""

import pytest

from marco_train.curation.facts import unsupported

EIFFEL = [
    "Eiffel Tower",
    "tower in Paris, France",
    "Gustave Eiffel",
    "1889-03-31",
    "330 metre",
    "1710 tonne",
    "Champ de Mars",
]
TESTS = [
    ("en", "The Eiffel Tower in Paris, France, opened on 31 March 1889; it is 330 m tall.", []),
    ("en", "The Eiffel Tower, of the 19th century and the 1880s, weighs 1,710 t.", []),
    ("en", "It was opened in 1890 by Napoleon in Paris.", ["1890", "Napoleon"]),
    ("en", "A tower. Napoleon begins a sentence, and I do not know.", []),
    ("de", "Der Turm in Paris hat eine Höhe von 330 Metern und steht auf dem Champ de Mars.", []),
    ("de", "Der Turm von Gustave Eiffel zog Otto Bismarck an.", ["Bismarck"]),
    ("de", "Er steht in der Hauptstadt Paris und nicht in der Stadt Wien.", ["Wien"]),
    (
        "fr",
        "La tour fut construite par Gustave Eiffel, et non par Victor Hugo.",
        ["Victor", "Hugo"],
    ),
    ("el", "Ο πύργος άνοιξε τον Μαρτίου του 1889 στην Αθήνα.", ["Αθήνα"]),
    ("ar", "افتتح البرج عام ١٨٨٩ ويبلغ ارتفاعه ٣٣٠ مترا", []),
    ("ar", "افتتح البرج عام ١٨٩٠", ["1890"]),
    ("th", "หอคอยเปิดในปี พ.ศ. 2432", []),
    ("th", "หอคอยเปิดในปี พ.ศ. 2433", ["2433"]),
    ("zh", "这座塔建于1889年，与《巴黎圣母院》无关。", ["巴黎圣母院"]),
    ("ja", "1889年に開業し、Eiffelが設計した。Napoleonではない。", ["Napoleon"]),
]


@pytest.mark.parametrize(("language", "text", "wrong"), TESTS)
def test_what_the_facts_do_not_say_is_found(language: str, text: str, wrong: list[str]) -> None:
    assert unsupported(text, EIFFEL, language) == wrong


def test_inflected_names_are_those_of_the_facts() -> None:
    facts = ["Lech Wałęsa", "Gdańsk", "Warszawa"]
    text = "Urodził się pod Gdańskiem, a o Wałęsie mówiono w Warszawie."
    assert unsupported(text, facts, "pl") == []
    assert unsupported("Mówiono o tym w Krakowie.", facts, "pl") == ["Krakowie"]


def test_digits_of_any_script_and_separators_of_thousands_are_one_number() -> None:
    for text in ("12,500", "12.500", "12 500", "१२५००", "১২,৫০০", "12'500"):
        assert unsupported(f"x {text} x", ["12500"], "en") == []
    assert unsupported("12,501", ["12500"], "en") == ["12501"]
    assert unsupported("4.5", ["4.5 Q1"], "en") == []
