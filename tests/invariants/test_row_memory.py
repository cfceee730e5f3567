"""Rows stay on disk: a source costs little more memory than its bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

OPENS = """\
import sys
from marco_train.config.data import SourceConfig
from marco_train.data.sources import open_rows
from marco_train.distributed import peak_bytes
import marco_train.data.sources, numpy
cfg = SourceConfig(path=sys.argv[1], category="c", weight=1.0)
before = peak_bytes()
rows = open_rows("fixture", cfg)
rows.digest
for row in range(0, len(rows), 10):
    rows[row]
print(len(rows), peak_bytes() - before)
"""


# A Python text of such characters would take four bytes for each of them, and JSON's escapes three
# times as many bytes; of short rows there are many to find.
CONTENTS = {"wide characters": "🙂" * 2500, "short rows": "a few words of a short question"}
SIZE = 320 * 2**20


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
@pytest.mark.long
def test_a_large_file_costs_little_more_memory_than_its_bytes(content: str, tmp_path: Path) -> None:
    row = json.dumps({"prompt": content}, ensure_ascii=False).encode() + b"\n"
    file = tmp_path / "rows.jsonl"
    file.write_bytes(row * (SIZE // len(row)))
    env = {**os.environ, "MARCO_TRAIN_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OPENS, str(file)],
        capture_output=True,
        text=True,
        check=True,
        env=env,
    )
    num_rows, cost = map(int, done.stdout.split())
    assert num_rows == SIZE // len(row)
    assert cost <= 1.3 * file.stat().st_size
