"""Files and directories are replaced whole, or stay as they were."""

from pathlib import Path

import pytest

from marco_train.files import link_directory, replace_directory, replaces


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "note.json"
    for text in ("one", "two"):
        with replaces(file) as partial:
            partial.write_text(text)
        assert file.read_text() == text
        assert names(tmp_path) == ["note.json"]


def test_a_file_stays_as_it_was_where_the_writing_fails(tmp_path: Path) -> None:
    file = tmp_path / "note.json"
    file.write_text("whole")

    def write() -> None:
        with replaces(file) as partial:
            partial.write_text("ha")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        write()
    assert file.read_text() == "whole"
    assert names(tmp_path) == ["note.json"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "note.json"
    with replaces(file) as first:
        first.write_text("first")
        with replaces(file) as second:
            second.write_text("second")
        assert file.read_text() == "second"
    assert file.read_text() == "first"


@pytest.mark.parametrize("existed", [True, False])
def test_a_directory_takes_the_place_of_the_one_before(existed: bool, tmp_path: Path) -> None:
    target, complete = tmp_path / "export", tmp_path / ".export.partial"
    if existed:
        target.mkdir()
        (target / "old").write_text("old")
    complete.mkdir()
    (complete / "new").write_text("new")
    replace_directory(target, complete)
    assert names(tmp_path) == ["export"]
    assert names(target) == ["new"]


def test_a_link_stands_for_the_directory_beside_it(tmp_path: Path) -> None:
    for name in ("export-first", "export-second", "export"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    link = tmp_path / "export"
    for name in ("export-first", "export-second"):  # over a directory, and over another link
        link_directory(link, tmp_path / name)
        assert link.is_symlink() and (link / "weights").read_text() == name
    assert names(tmp_path) == ["export", "export-first", "export-second"]
    (tmp_path / ".export.partial").mkdir()
    replace_directory(link, tmp_path / ".export.partial")
    assert not link.is_symlink() and names(link) == []
    assert (tmp_path / "export-second" / "weights").read_text() == "export-second"
