"""Whether a text is in a language, and a response in the language of its prompt."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from marco_train.data.chat import Tokenizer, without_thinking
from marco_train.errors import InputError
from marco_train.types import Rollout

if TYPE_CHECKING:
    from lingua import Language

# Of the model card's 29 languages all that the identifier knows: it has no Nepali, and takes it for
# Hindi. They are candidates in every run, as an answer in a language that is none would be taken
# for one of the prompts'. All 75 that it knows would cost twice the memory, and take short Danish
# for Norwegian and short Dutch for Afrikaans.
CANDIDATES = (
    *("ar", "az", "bn", "cs", "de", "el", "en", "es", "fr", "he", "hu", "id", "it", "ja", "kk"),
    *("ko", "ms", "nl", "pl", "pt", "ro", "ru", "th", "tr", "uk", "ur", "vi", "zh"),
)
# What FLORES calls some of them, by the codes that the identifier has.
FLORES_CODES = {"arb": "ar", "azj": "az", "cmn": "zh", "zsm": "ms"}
# Bytes of letters in UTF-8 below which nothing is judged: 30 letters of Latin, 15 of Cyrillic or
# Arabic, 10 of Devanagari, Thai or Han. Of fewer, related languages are often taken for each other.
MIN_LETTER_BYTES = 30
# Code, formulas and addresses look like English in an answer of any language.
NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[a-zA-Z]+"
    r"|https?://\S+",
    re.DOTALL,
)


class Identifier:
    """Identifies the language of texts; costs about 0.5 GiB."""

    def __init__(self, languages: Iterable[str], asked_by: str) -> None:
        """Open it.

        Args:
            languages: Codes, as `de`, `zh-Hans` or `eng_Latn`; those that it knows are candidates
                beside the card's.
            asked_by: The setting that wants it.

        Raises:
            InputError: It is not installed.
        """
        try:
            from lingua import Language, LanguageDetectorBuilder
        except ImportError as error:
            raise InputError(
                f"{asked_by} needs the package lingua-language-detector: pip install "
                "'marco-train[languages]'"
            ) from error
        self._by_code = {
            code.name.lower(): language
            for language in Language.all()
            for code in (language.iso_code_639_1, language.iso_code_639_3)
        }
        known = [self._language(code) for code in (*CANDIDATES, *languages)]
        self._candidates = {language for language in known if language is not None}
        # In its mode of low accuracy, of 0.03 GiB, whole sentences of Indonesian are Malay.
        self._detector = LanguageDetectorBuilder.from_languages(*self._candidates).build()

    def knows(self, code: str) -> bool:
        """Whether a language is one that it can tell."""
        return self._language(code) in self._candidates

    def matches(self, text: str, code: str) -> bool | None:
        """Whether a text is in a language, whichever the script.

        None: there is no language, or one that the identifier does not know; or the text is too
        short to tell, beside code, formulas and addresses.
        """
        wanted = self._language(code)
        if wanted not in self._candidates:
            return None
        prose = NOT_PROSE.sub(" ", text)
        letters = "".join(filter(str.isalpha, prose))
        if len(letters.encode("utf-8", "replace")) < MIN_LETTER_BYTES:
            return None
        return self._detector.detect_language_of(prose) == wanted

    def _language(self, code: str) -> "Language | None":
        main = re.split("[-_]", code.lower())[0]
        return self._by_code.get(FLORES_CODES.get(main, main))


class LanguageJudge(Identifier):
    """Identifies the language of a run's responses, on each rank."""

    def __init__(self, tokenizer: Tokenizer, languages: Iterable[str]) -> None:
        """Open the identifier, with the codes of the run's prompts.

        Raises:
            InputError: It is not installed.
        """
        super().__init__(languages, "stage.identify_languages")
        self._tokenizer = tokenizer

    def __call__(self, rollout: Rollout) -> bool | None:
        """Whether a response is in its prompt's language, whichever the script.

        The answer is judged and not the thinking before it, which is English in many a data set
        whose answers are not. None: it cannot be told, as `matches` says.
        """
        return self.matches(self._answer(rollout), rollout.prompt.language)

    def _answer(self, rollout: Rollout) -> str:
        """The text that a reader gets: no thinking and no control tokens."""
        text = self._tokenizer.decode(rollout.response_ids)
        opening = self._tokenizer.decode(rollout.prompt.input_ids[-8:])  # of some chat templates
        if opening.rstrip().endswith("<think>"):
            text = f"<think>{text}"
        return self._tokenizer.spells_control.sub(" ", without_thinking(text))
