"""What a response answers: the letter of a choice, or the text of a number or formula.

A box counts first, and of several the last; then a line as "Answer: C", in the languages of the
card; then a response that is nothing but the answer. Nothing is evaluated.
"""

import re
from collections.abc import Sequence

from marco_train.data.chat import without_thinking
from marco_train.evaluation.verifiers import comparable

LETTERS = "ABCDEFGHIJ"
# How other scripts count choices, in order. Cyrillic and Greek letters that look like Latin ones
# are taken for these, as prompts name choices by Latin letters.
COUNTED = (
    "أبجده",
    "ابجده",
    "АБВГД",
    "ΑΒΓΔΕΖ",
    "אבגדה",
    "কখগঘঙ",
    "कखगघङ",
    "กขคงจ",
    "가나다라마",
    "ㄱㄴㄷㄹㅁ",
    "アイウエオ",
    "甲乙丙丁戊",
    "①②③④⑤⑥⑦⑧⑨⑩",
    "ⒶⒷⒸⒹⒺⒻⒼⒽⒾⒿ",
    "ＡＢＣＤＥＦＧＨＩＪ",
)
LOOK_ALIKES = {"В": "B", "С": "C", "Е": "E"}
LETTER_OF = {
    sign: letter for signs in COUNTED for sign, letter in zip(signs, LETTERS, strict=False)
} | LOOK_ALIKES

# What stands before an answer, of the card's 29 languages.
ANSWER_WORDS = (
    *("answer", "choice", "option", "答案", "答え", "回答", "解答", "정답", "답", "antwort"),
    *("respuesta", "réponse", "resposta", "risposta", "cevap", "yanıt", "jawaban", "jawapan"),
    *("odpowiedź", "odpověď", "ответ", "відповідь", "đáp án", "câu trả lời", "คำตอบ", "תשובה"),
    *("الإجابة", "الجواب", "جواب", "উত্তর", "उत्तर", "жауап", "απάντηση", "răspuns", "răspunsul"),
    *("válasz", "cavab", "antwoord"),
)
# Words and marks that may stand between it and the answer.
LINK = (
    r"(?:\s|[*_`:：=\-—–>(\[（【]|(?:\w+\s+){0,1}?(?:is|ist|es|est|è|é|är|adalah|ialah|là|คือ|是|为|為"
    r"|は|은|는|هي|هو|ہے|হল|हो|היא|είναι|este|to|jest|je|option|choice|the)\b|是|为|為|は|은|는|คือ)*"
)
SIGNS = "".join(sorted(set(LETTERS) | set(LETTER_OF)))
SAID = re.compile(
    rf"(?:{'|'.join(map(re.escape, ANSWER_WORDS))}){LINK}([{re.escape(SIGNS)}])(?![^\W\d_])",
    re.IGNORECASE,
)
ALONE = re.compile(
    rf"[\W_]*([{re.escape(SIGNS)}])(?:[\W_]*$|\s*[.):：、）]\s*(?P<rest>.*)$)",
    re.DOTALL | re.IGNORECASE,
)
# LaTeX that only dresses what it holds.
DRESS = re.compile(r"\\(?:textbf|textit|text|mathrm|mathbf|mathsf|operatorname|bf|rm)\s*")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
HASHES = re.compile(r"####\s*(.+)")
SAID_LINE = re.compile(
    rf"(?:{'|'.join(map(re.escape, ANSWER_WORDS))})\s*(?:is|是|为|：|:|=)+\s*(.+)", re.IGNORECASE
)
NUMBER = re.compile(r"[-−+]?\d[\d,\s\u00a0\u202f٬']*(?:[.٫]\d+)?")
MAX_BOX = 500  # characters of an answer that can be one


def boxed(text: str) -> str | None:
    """What the last complete box of a text holds; None without any."""
    found = None
    for match in BOX.finditer(text):
        depth, start = 1, match.end()
        for place in range(start, min(len(text), start + MAX_BOX)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                found = text[start:place].strip()
                break
    return found


def letter_of(response: str, choices: Sequence[str]) -> str | None:
    """Letter of the choice that a response names; None: it names none of them.

    Args:
        response: As it was sampled; what stands between thinking tags does not count.
        choices: Texts of the choices, which the prompt called A, B, ...
    """
    text = without_thinking(response).strip()
    allowed = LETTERS[: len(choices)]
    box = boxed(text)
    if box is not None:
        return _letter_in(box, choices, allowed)
    said = [_as_letter(match[1]) for match in SAID.finditer(text)]
    named = [letter for letter in said if letter in allowed]
    if named:
        return named[-1]
    return _letter_alone(text, choices, allowed)


def _letter_in(box: str, choices: Sequence[str], allowed: str) -> str | None:
    """The choice that the text of a box names: by letter, by its own text, or by number."""
    bare = _undressed(box)
    found = _letter_alone(bare, choices, allowed)
    if found is not None:
        return found
    said = [_as_letter(match[1]) for match in SAID.finditer(bare)]
    if said and said[-1] in allowed:
        return said[-1]
    same = [
        letter
        for letter, choice in zip(allowed, choices, strict=True)
        if _undressed(choice).casefold() == bare.casefold()
    ]
    if len(same) == 1:
        return same[0]
    number = comparable(bare).strip("().")
    counts = not any(comparable(choice).isdecimal() for choice in choices)
    if counts and number.isdecimal() and 1 <= int(number) <= len(allowed):
        return allowed[int(number) - 1]
    return None


def _letter_alone(text: str, choices: Sequence[str], allowed: str) -> str | None:
    """The letter of a text that is nothing else, but for the text of that choice."""
    match = ALONE.match(text)
    letter = _as_letter(match[1]) if match else None
    if match is None or letter is None or letter not in allowed:
        return None
    rest = (match["rest"] or "").strip()
    choice = choices[allowed.index(letter)]
    return (
        letter
        if not rest or comparable(rest).strip(" .") == comparable(choice).strip(" .")
        else None
    )


def _as_letter(sign: str) -> str:
    return LETTER_OF.get(sign, LETTER_OF.get(sign.upper(), sign.upper()))


def _undressed(text: str) -> str:
    """A text without what LaTeX and Markdown only dress it with."""
    bare = DRESS.sub("", comparable(text)).replace("{", "").replace("}", "")
    return bare.replace("\\", "").strip(" $*_`\"'.,;")


def number_of(response: str) -> str | None:
    """The number that a response ends in, with the digits of ASCII; None: there is none."""
    text = comparable(without_thinking(response))
    box = boxed(text)
    candidates = [box] if box is not None else [*HASHES.findall(text)[-1:]]
    if not candidates:
        candidates = [*SAID_LINE.findall(text)[-1:], text]
    for candidate in candidates:
        numbers = NUMBER.findall(candidate)
        if numbers:
            return plain_number(numbers[-1])
    return box or None  # in words, or a formula


def plain_number(number: str) -> str:
    """A number as Python reads it: without separators of thousands, and with a point."""
    bare = re.sub(r"[\s\u00a0\u202f٬']", "", number).replace("−", "-").replace("٫", ".").lstrip("+")
    if re.fullmatch(r"-?\d+,\d{1,2}", bare):  # a decimal comma; thousands have three digits
        return bare.replace(",", ".")
    return bare.replace(",", "").rstrip(".")


def formula_of(response: str) -> str | None:
    """What a response gives as its mathematical answer, as LaTeX or plain text; None: nothing."""
    text = comparable(without_thinking(response))
    box = boxed(text)
    if box is not None:
        return box or None
    for pattern in (HASHES, SAID_LINE):
        found = pattern.findall(text)
        if found:
            return str(found[-1]).strip().rstrip(".") or None
    formulas = re.findall(r"\$([^$\n]+)\$", text)
    if formulas:
        return str(formulas[-1]).strip() or None
    numbers = NUMBER.findall(text)
    return plain_number(numbers[-1]) if numbers else None


def translation_of(response: str) -> str:
    """The text of a translation, in one line as sacrebleu takes it."""
    return " ".join(without_thinking(response).split())
