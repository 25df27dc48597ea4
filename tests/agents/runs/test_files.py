"""Folders that are replaced whole, or not at all."""

import pytest

from agents.runs.files import replaced_folder


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="notes is a file"), replaced_folder(tmp_path / "notes"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    assert (tmp_path / "notes").read_text() == "mine"


def test_folder_is_replaced_only_when_it_is_whole(tmp_path):
    with replaced_folder(tmp_path / "x") as folder:
        (folder / "file").write_text("one")
        assert not (tmp_path / "x").exists()

    def interrupted():
        with replaced_folder(tmp_path / "x") as folder:
            (folder / "file").write_text("two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "x" / "file").read_text() == "one"
