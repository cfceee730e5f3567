"""An LLM that writes about the example's entities in their languages, and errs on purpose."""

import json
import re
from typing import Any

# Of a language: a description, a request, an answer, a question, and its reason.
TEXTS = {
    "German": (
        "{label} gehört zu den bekannten Orten in {town} und stammt aus dem Jahr {year}.",
        "Was kannst du mir über {label} und seine lange Geschichte erzählen?",
        "{label} liegt in {town} und stammt aus dem Jahr {year}, also aus sehr alter Zeit.",
        "Wie heißt das, was in {town} zu finden ist und aus dem Jahr {year} stammt?",
        "Gesucht ist {label}, denn nur das stammt aus dem Jahr {year}.",
    ),
    "French": (
        "{label} se trouve à {town} et remonte à l'année {year}, selon ce que l'on sait.",
        "Que peux-tu me raconter sur {label} et sur sa longue histoire ?",
        "{label} se trouve à {town} et date de {year}, ce qui est déjà fort ancien.",
        "Comment s'appelle ce que l'on trouve à {town} et qui remonte à l'année {year} ?",
        "Il s'agit de {label}, car c'est la seule réponse qui remonte à l'année {year}.",
    ),
    "Arabic": (
        "يقع {label} في {town} ويعود تاريخه إلى عام {year} بحسب ما هو معروف.",
        "ماذا يمكنك أن تخبرني عن {label} وعن تاريخه الطويل؟",
        "يوجد {label} في {town} وقد بدأ في عام {year}، أي منذ زمن بعيد جدا.",
        "ما اسم الشيء الموجود في {town} والذي يعود إلى عام {year}؟",
        "الجواب هو {label} لأنه الوحيد الذي يعود إلى عام {year}.",
    ),
    "Japanese": (
        "{label}は{town}にあり、{year}年に始まったと伝えられています。",
        "{label}とその長い歴史について教えてください。",
        "{label}は{town}にあって、{year}年から続いているとても古いものです。",
        "{town}にあって、{year}年に始まったものは何という名前ですか。",
        "答えは{label}です。{year}年に始まったのはこれだけだからです。",
    ),
    "Thai": (
        "{label} อยู่ที่ {town} และเริ่มต้นขึ้นในปี {year} ตามที่ทราบกัน",
        "ช่วยเล่าเรื่อง {label} และประวัติอันยาวนานให้ฟังหน่อยได้ไหม",
        "{label} อยู่ที่ {town} และมีมาตั้งแต่ปี {year} ซึ่งนับว่าเก่าแก่มาก",
        "สิ่งที่อยู่ใน {town} และเริ่มต้นขึ้นในปี {year} มีชื่อว่าอะไร",
        "คำตอบคือ {label} เพราะเป็นสิ่งเดียวที่เริ่มต้นขึ้นในปี {year}",
    ),
    "Czech": (
        "{label} stojí v místě zvaném {town} a pochází z roku {year}, jak se ví.",
        "Co mi můžeš říct o tom, co je {label} a jaké to má dějiny?",
        "{label} je v místě zvaném {town} a pochází z roku {year}, tedy z dávné doby.",
        "Jak se jmenuje to, co stojí v místě zvaném {town} a pochází z roku {year}?",
        "Hledá se {label}, protože jen to pochází z roku {year}.",
    ),
}


def write(body: dict[str, Any]) -> str:
    """Answer a question of the pipelines of culture and science."""
    asked = body["messages"][-1]["content"]
    language = next((name for name in TEXTS if f" in {name}" in asked), None)
    if language is None:
        return _solve(asked, body["seed"])
    described, request, answer, question, reason = TEXTS[language]
    (label,) = set(re.findall('"([^"]+)"', asked)) & set(_labels(asked))
    facts = dict(re.findall(r"^- ([^:\n]+): (.+)$", asked, re.MULTILINE))
    values = {
        "label": label,
        "town": facts.get("located in", ""),
        "year": facts.get("founded or begun", ""),
    }
    if asked.startswith("Describe"):
        wrong = label in ("Eichenburg", "朝霧城")  # which the facts do not say
        found = {"description": described.format(**values | ({"year": "1999"} if wrong else {}))}
    elif asked.startswith("Here is"):
        found = {"request": request.format(**values)}
    elif asked.startswith("Somebody asks"):
        # One answers in another language, and one never gives JSON.
        if label == "Lindenburg":
            answer = TEXTS["French"][2]
        if label == "Falkenburg":
            return "I would rather not."
        found = {"answer": answer.format(**values)}
    else:
        named = label == "Silberburg"
        found = {
            "question": label if named else question.format(**values),
            "reason": reason.format(**values),
        }
    return json.dumps(found, ensure_ascii=False)


def _labels(asked: str) -> list[str]:
    patterns = (
        r'^Describe "([^"]+)"|wrote about "([^"]+)"|known of "([^"]+)"|right answer is "([^"]+)"'
    )
    return [name for found in re.findall(patterns, asked) for name in found if name]


def _solve(asked: str, seed: int) -> str:
    """Work out an energy, and wrongly with every third seed."""
    numbers = re.search(r"body of (\d+) kg moves at (\d+) m/s", asked)
    if numbers is None:
        return f"Ice floats because its open lattice makes it less dense than water. ({seed})"
    mass, speed = map(int, numbers.groups())
    energy = mass * speed**2 / 2 + (seed % 3 == 0)
    return (
        f"The kinetic energy is half the mass times the speed squared: $\\boxed{{{energy:g}}}$ J."
    )
