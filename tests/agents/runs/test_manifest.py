"""Whatever has become of a checkpoint's files is found, and the newest whole checkpoint is taken."""

import json
import os
import random

import pytest

from agents.runs.manifest import (
    MANIFEST_FILE,
    checkpoint_name,
    find_checkpoints,
    find_damage,
    iteration_of,
    top_level_names,
    whole_checkpoint,
    write_manifest,
)


def write(folder):
    """Write a checkpoint of four files."""
    (folder / "inner" / "most").mkdir(parents=True)
    rng = random.Random(str(folder.name))
    for name, size in {"weights": 3000, "state.json": 40, "inner/weights": 500, "inner/most/config.json": 1}.items():
        (folder / name).write_bytes(rng.randbytes(size))
    write_manifest(folder)
    return folder


@pytest.fixture
def checkpoints(tmp_path):
    """Return a folder with the checkpoints of iterations 9, 10 and 100."""
    for iteration in (9, 10, 100):
        write(tmp_path / checkpoint_name(iteration))
    return tmp_path


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position % len(content)] ^= 1 << (position % 8)
    file.write_bytes(content)


def test_checkpoints_are_found_in_the_order_of_their_iterations(checkpoints):
    (checkpoints / "iteration_12.partial").mkdir()
    (checkpoints / "iteration_x").mkdir()
    (checkpoints / checkpoint_name(5)).write_text("a file")
    (checkpoints / "iteration_00000000000011").mkdir()
    assert [iteration_of(path) for path in find_checkpoints(checkpoints)] == [9, 10, 11, 100]
    assert find_checkpoints(checkpoints / "nothing") == []
    assert [iteration_of(checkpoints / name) for name in ("iteration_12.partial", "run")] == [-1, -1]


def test_a_manifest_has_the_size_and_the_hash_of_every_file(tmp_path):
    folder = write(tmp_path / "run")
    files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    assert {name: entry["size"] for name, entry in files.items()} == {
        "weights": 3000,
        "state.json": 40,
        "inner/weights": 500,
        "inner/most/config.json": 1,
    }
    assert top_level_names(folder) == {"weights", "state.json", "inner", MANIFEST_FILE}
    assert top_level_names(folder / "inner") == set()
    assert find_damage(folder) is None


def test_every_flipped_bit_is_found(tmp_path):
    folder = write(tmp_path / "run")
    rng = random.Random(0)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) == 5
    for file in files:
        content = file.read_bytes()
        for _ in range(20):
            position = rng.randrange(len(content))
            if content[position : position + 1].isspace() and file.name == MANIFEST_FILE:
                continue  # in its own layout it means nothing
            flip(file, position)
            assert find_damage(folder) is not None, (file, position)
            file.write_bytes(content)
    assert find_damage(folder) is None


def test_sizes_alone_are_looked_at_where_that_is_asked_for(tmp_path):
    folder = write(tmp_path / "run")
    flip(folder / "weights", 5)
    assert find_damage(folder, hashes=False) is None
    assert "content of weights" in find_damage(folder)
    os.truncate(folder / "weights", 5)
    assert find_damage(folder, hashes=False) == "weights has 5 bytes instead of 3000"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {"weights": 3}}', '{"files": {"weights": {"size": "x"}}}'])
def test_a_manifest_that_is_none_is_damage(tmp_path, text):
    folder = write(tmp_path / "run")
    (folder / MANIFEST_FILE).write_text(text)
    assert f"its {MANIFEST_FILE} cannot be read" in find_damage(folder)
    assert top_level_names(folder) == set()


def test_the_newest_whole_one_is_taken_and_newer_ones_are_named(checkpoints):
    assert whole_checkpoint(checkpoints) == checkpoints / checkpoint_name(100)
    (checkpoints / checkpoint_name(100) / "weights").unlink()
    with pytest.warns(UserWarning, match=r"iteration_00000100 is damaged: weights is missing. Going on from .*00010"):
        assert whole_checkpoint(checkpoints) == checkpoints / checkpoint_name(10)
    with pytest.raises(ValueError, match="iteration_00000100 is not a whole checkpoint: weights is missing; load an"):
        whole_checkpoint(checkpoints / checkpoint_name(100))
    assert whole_checkpoint(checkpoints / checkpoint_name(9)) == checkpoints / checkpoint_name(9)
    for iteration in (9, 10):
        (checkpoints / checkpoint_name(iteration) / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match="none of the 3 checkpoints") as caught:
        whole_checkpoint(checkpoints)
    assert str(caught.value).splitlines()[1:] == [
        "  iteration_00000100: weights is missing",
        f"  iteration_00000010: it has no {MANIFEST_FILE}",
        f"  iteration_00000009: it has no {MANIFEST_FILE}",
    ]


def test_a_folder_that_is_no_checkpoint_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no saved run at .*: the folder is empty"):
        whole_checkpoint(tmp_path)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match=f"is not a whole checkpoint: it has no {MANIFEST_FILE}"):
        whole_checkpoint(tmp_path)
