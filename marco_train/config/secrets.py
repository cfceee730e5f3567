"""What of a config nobody else may read."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
SECRET_NAME = re.compile(r"(^|_)(api_?key|key|secret|password|passwd|credentials?|token)$", re.I)
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def without_secrets(value: Any, name: str = "") -> Any:
    """Hide what names call a secret, and users and passwords in addresses; the rest is as it was.

    Args:
        value: Of a config: mappings, lists and plain values.
        name: Its key.
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item, name) for item in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if value and SECRET_NAME.search(name) else IN_ADDRESS.sub(HIDDEN, value)
