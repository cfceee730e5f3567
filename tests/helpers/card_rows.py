"""Rows in the columns of the datasets that the model card names, as the rehearsal makes them."""

import runpy
from collections.abc import Callable
from typing import Any

from tests.helpers.processes import REPOSITORY

_made = runpy.run_path(str(REPOSITORY / "recipes" / "marco_mini" / "card_rows.py"))
SHAPES: dict[str, list[dict[str, Any]]] = _made["SHAPES"]
SFT: dict[str, str] = _made["SFT"]
OPD: dict[str, str] = _made["OPD"]
dolci_tools: Callable[[int], dict[str, Any]] = _made["dolci_tools"]
