"""What is kept out of all that a run writes and says: keys, passwords, values of the environment.

A saved config has `${oc.env:NAME}` where the value of a variable stood, so that a resumption
compares the same text.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import DictConfig, OmegaConf

from marco_train.errors import require

REDACTED = "<redacted>"
FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*([^,}\s]+)")
SECRET_FIELD = re.compile(r"(^|_)(api_?key|token|password|passwd|secret|credentials?)$", re.I)
# What stands before the host of an URL.
USER_INFO = re.compile(r"(?<=://)[^/\s]+@")
# Shorter values are found where they are all of a text: a part of one may be chance.
SHORTEST_PART = 6
NAME = re.compile(r"\w[\w.+=,@-]*")


class Secrets:
    """Values of environment variables that the config of this process names."""

    known: ClassVar[dict[str, str]] = {}
    """By value, what stands for it."""


def note_secrets(composed: DictConfig) -> None:
    """Remember the values that a config takes from the environment, but for directories."""
    written = OmegaConf.to_yaml(composed, resolve=False)
    for name in sorted(set(FROM_ENVIRONMENT.findall(written))):
        value = os.environ.get(name, "")
        if value and not (value.startswith("/") and Path(value).exists()):
            Secrets.known[value] = f"${{oc.env:{name}}}"


def redacted(value: Any) -> Any:
    """Replace secrets in a text, or in all texts of a value of JSON."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED if item is not None and SECRET_FIELD.search(str(key)) else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [redacted(item) for item in value]
    if not isinstance(value, str):
        return value
    if value in Secrets.known:
        return Secrets.known[value]
    for secret in sorted(Secrets.known, key=len, reverse=True):
        if len(secret) >= SHORTEST_PART:
            value = value.replace(secret, Secrets.known[secret])
    return USER_INFO.sub(f"{REDACTED}@", value)


def check_name(what: str, name: str) -> None:
    """Refuse a name that is no plain part of a path.

    Raises:
        InputError: Says what it may hold.
    """
    require(
        NAME.fullmatch(name) is not None,
        f"{what} is {name!r}, and names files: take letters, digits and _, and behind the first of "
        "them also . - + = , @",
    )
