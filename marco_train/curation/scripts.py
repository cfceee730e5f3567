"""The scripts of the card's languages, told by their letters."""

import re
from functools import cache

NO_LETTERS = re.compile(r"[\W\d_]+")
SCRIPTS = {
    "Latn": "A-Za-z\u00aa\u00ba\u00c0-\u024f\u0250-\u02af\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a",
    "Cyrl": "\u0400-\u052f\u1c80-\u1c8f",
    "Arab": "\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufeff",
    "Hans": "\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0002ebef",
    "Jpan": "\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uff66-\uff9f",
    "Hang": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "Thai": "\u0e00-\u0e7f",
    "Hebr": "\u0590-\u05ff",
    "Beng": "\u0980-\u09ff",
    "Grek": "\u0370-\u03ff\u1f00-\u1fff",
    "Deva": "\u0900-\u097f",
}
"""Characters of each, as Unicode's blocks have them."""


def share_of_script(text: str, script: str) -> float:
    """Share of a text's letters that are of a script; 0 of a text without letters.

    Args:
        text: Of any language.
        script: Its code in ISO 15924, as `Cyrl`.
    """
    letters = NO_LETTERS.sub("", text)
    return 1 - len(_others(script).sub("", letters)) / len(letters) if letters else 0.0


@cache
def _others(script: str) -> re.Pattern[str]:
    return re.compile(f"[{SCRIPTS[script]}]+")
