"""What an evaluation writes."""

import json
from pathlib import Path
from typing import Any

from marco_train.config import TrainConfig


def write_reports(cfg: TrainConfig, report: dict[str, Any], signatures: dict[str, Any]) -> None:
    """Write evaluation.json, and signatures.json where there are any."""
    directory = Path(cfg.output_dir)
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (directory / "evaluation.json").write_text(text, encoding="utf-8")
    if signatures:
        (directory / "signatures.json").write_text(json.dumps(signatures))
