"""What files hold, of directories and patterns of rows too."""

import os
from pathlib import Path
from typing import Any

from marco_train.content import digest, is_same, look


def test_a_directory_of_rows_is_known_by_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    first, second = tmp_path / "data" / "a.jsonl", tmp_path / "data" / "b.jsonl.gz"
    first.write_text("1\n")
    second.write_bytes(b"2")
    (tmp_path / "README.md").write_text("# Rows\n")
    for path in (tmp_path, f"{tmp_path}/data/*"):
        noted: dict[str, Any] = {"files": look(path), "digest": digest(path)}
        assert len(noted["files"]) == 2
        os.utime(first, (1, 1))
        assert is_same(noted, path)  # which was only touched
        first.write_text("3\n")
        assert not is_same(noted, path)
        first.write_text("1\n")
