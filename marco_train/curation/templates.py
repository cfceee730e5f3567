"""How a translation is asked for, in English or in the other language of a pair.

A template is an instruction in a layout; `configs/curation/templates/<code>.yaml` has the
instructions of a language, whole sentences without their last sign.
"""

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any

from omegaconf import OmegaConf

from marco_train.config.curation import CARD_LANGUAGES, CURATION_DIR
from marco_train.errors import require

TEMPLATES = CURATION_DIR / "templates"
LAYOUTS = (
    "{instruction}{colon}\n\n{text}",
    "{instruction}{colon} {text}",
    "{text}\n\n{instruction}{stop}",
    "{instruction}{stop}{space}{only}\n\n{text}",
    "{instruction}{colon}\n\n{text}\n\n{only}",
    "{instruction}{stop}\n\n---\n{text}\n---",
)
"""`only` is the sentence that asks for nothing but the translation."""


@dataclass(frozen=True)
class Templates:
    """Those of one language."""

    from_english: tuple[str, ...]
    to_english: tuple[str, ...]
    only: str
    colon: str
    stop: str
    space: str
    """Between two sentences."""

    @property
    def count(self) -> int:
        """Of each direction."""
        return len(self.from_english) * len(LAYOUTS)

    def fill(self, number: int, text: str, *, from_english: bool) -> str:
        """Write template `number`, from 0 to `count` - 1, around a text."""
        instructions = self.from_english if from_english else self.to_english
        layout = LAYOUTS[number % len(LAYOUTS)]
        return layout.format(
            instruction=instructions[number // len(LAYOUTS)],
            text=text,
            only=self.only,
            colon=self.colon,
            stop=self.stop,
            space=self.space,
        )


@cache
def templates_of(code: str, about: str) -> Templates:
    """Read the templates of a language, English or that of a pair.

    Args:
        code: Of the language that they are in.
        about: Of the other language of the pairs than English.

    Raises:
        InputError: There are none.
    """
    file = TEMPLATES / f"{code}.yaml"
    require(file.is_file(), f"languages: there are no templates of {code!r}, as {str(file)!r}")
    read: Any = OmegaConf.to_container(OmegaConf.load(file))
    name = CARD_LANGUAGES[about][1]

    def filled(key: str) -> tuple[str, ...]:
        return tuple(each.replace("LANGUAGE", name) for each in read[key])

    return Templates(
        filled("from_english"),
        filled("to_english"),
        read["only"],
        read.get("colon", ":"),
        read.get("stop", "."),
        read.get("space", " "),
    )


def digest_of_templates(code: str) -> str:
    """Of those of a language and of the layouts."""
    said = (TEMPLATES / f"{code}.yaml").read_bytes() + "\n".join(LAYOUTS).encode()
    return sha256(said).hexdigest()[:16]
