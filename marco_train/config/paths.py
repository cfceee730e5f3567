"""Where the files of `configs/` lie."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# Beside the package in a checkout, inside it in a wheel; absolute, so that the console script
# works from any directory.
CONFIG_DIR = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
