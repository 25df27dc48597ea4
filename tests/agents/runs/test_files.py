"""A folder is written whole or not at all, whatever the disk says; an optimizer comes back from its file."""

import json
import os
import shutil
import stat

import pytest
import torch
from torch import nn

from agents.runs.files import (
    clear_leftovers,
    existing_folder,
    load_optimizer,
    remove_folder,
    replaced_folder,
    save_optimizer,
)
from agents.runs.manifest import write_manifest


def write(path, text):
    """Write a folder of two files and a manifest."""
    with replaced_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_text(text)
        (folder / "state").write_text(text)
        write_manifest(folder)


def contents(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def read(path):
    return (existing_folder(path) / "inner" / "weights").read_text()


def test_a_folder_takes_the_place_of_an_earlier_one(tmp_path):
    for text in ("one", "two"):
        write(tmp_path / "deep" / "run", text)
        assert read(tmp_path / "deep" / "run") == text
        assert os.listdir(tmp_path / "deep") == ["run"]


@pytest.mark.parametrize("error", [RuntimeError("in the block"), KeyboardInterrupt()])
def test_an_error_in_the_block_leaves_the_earlier_folder(tmp_path, error):
    write(tmp_path / "run", "one")
    before = contents(tmp_path / "run")

    def fail():
        with replaced_folder(tmp_path / "run") as folder:
            (folder / "state").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert contents(tmp_path / "run") == before
    assert os.listdir(tmp_path) == ["run"]


def test_files_that_are_not_the_folders_own_stay(tmp_path):
    write(tmp_path / "run", "one")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "pictures").mkdir()
    (tmp_path / "run" / "pictures" / "a.png").write_text("mine too")
    write(tmp_path / "run", "two")
    assert read(tmp_path / "run") == "two"
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "run" / "pictures" / "a.png").read_text() == "mine too"


def test_what_a_kill_between_the_two_renames_leaves_is_found_and_put_back(tmp_path):
    write(tmp_path / "run", "one")
    (tmp_path / "run").rename(tmp_path / "run.previous")
    assert read(tmp_path / "run") == "one"
    write(tmp_path / "run", "two")
    assert read(tmp_path / "run") == "two"
    assert os.listdir(tmp_path) == ["run"]
    with pytest.raises(FileNotFoundError, match=r"there is no saved run at .*nothing"):
        existing_folder(tmp_path / "nothing")


def test_leftovers_of_kills_are_cleared_and_others_folders_left(tmp_path):
    for name in ("a_1", "a_2", "a_3"):
        write(tmp_path / name, name)
    (tmp_path / "a_1").rename(tmp_path / "a_1.previous")  # killed before the second rename
    shutil.copytree(tmp_path / "a_2", tmp_path / "a_2.previous")  # killed after it
    (tmp_path / "a_2.previous" / "notes.txt").write_text("mine")
    (tmp_path / "a_3").rename(tmp_path / "a_3.partial")  # killed while it was removed
    (tmp_path / "mine.partial").mkdir()
    clear_leftovers(tmp_path, "a_")
    assert sorted(os.listdir(tmp_path)) == ["a_1", "a_2", "mine.partial"]
    assert [read(tmp_path / name) for name in ("a_1", "a_2")] == ["a_1", "a_2"]
    assert (tmp_path / "a_2" / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_half_removed_is_not_whole_by_its_name(tmp_path, monkeypatch):
    write(tmp_path / "run", "one")

    def killed(path):
        (path / "state").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(tmp_path / "run")
    assert os.listdir(tmp_path) == ["run.partial"]
    clear_leftovers(tmp_path, "run")
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("notes")
    with pytest.raises(FileExistsError, match="run is a file, and what is saved becomes a folder"):
        write(tmp_path / "run", "one")
    assert (tmp_path / "run").read_text() == "notes"


# disks
def without(kinds, number):
    """Return a sync that a disk does not know for some kinds of files."""
    fsync = os.fsync

    def refuse(descriptor):
        if kinds(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    return refuse


@pytest.mark.parametrize(
    ("kinds", "number"),
    [(stat.S_ISDIR, 22), (stat.S_ISDIR, 9), (stat.S_ISDIR, 95), (stat.S_ISREG, 22), (lambda _: True, 38)],
)
def test_folders_are_written_where_disks_know_no_sync(tmp_path, monkeypatch, kinds, number):
    monkeypatch.setattr(os, "fsync", without(kinds, number))
    for text in ("one", "two"):
        write(tmp_path / "run", text)
        assert read(tmp_path / "run") == text


def test_folders_that_cannot_be_opened_are_not_synced(tmp_path, monkeypatch):
    """As on Windows."""
    opened = os.open

    def refuse(path, *arguments):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("agents.runs.files.os.open", refuse)
        write(tmp_path / "run", "one")
    assert read(tmp_path / "run") == "one"


@pytest.mark.parametrize(("kinds", "number"), [(stat.S_ISREG, 5), (stat.S_ISDIR, 28), (stat.S_ISREG, 9)])
def test_a_disk_that_did_not_write_is_an_error(tmp_path, monkeypatch, kinds, number):
    write(tmp_path / "run", "one")
    before = contents(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", without(kinds, number))
        with pytest.raises(OSError, match=os.strerror(number)):
            write(tmp_path / "run", "two")
    assert contents(existing_folder(tmp_path / "run")) == before


# optimizers
def stepped(weights, *, lr=1e-2):
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.8, 0.95))
    step(optimizer, 0)
    return optimizer


def step(optimizer, number):
    generator = torch.Generator().manual_seed(number)
    for weight in optimizer.param_groups[0]["params"]:
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()


def make_weights(*shapes):
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_an_optimizer_goes_on_from_its_file(tmp_path):
    weights = make_weights((3, 2), (4,))
    optimizer = stepped(weights)
    save_optimizer(optimizer, tmp_path / "optimizer.safetensors")
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    again = torch.optim.AdamW(others, lr=1.0)
    load_optimizer(again, tmp_path / "optimizer.safetensors")
    for one in (optimizer, again):
        step(one, 1)
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))
    groups = [json.dumps(one.state_dict()["param_groups"]) for one in (again, optimizer)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("shapes", [[(3, 2)], [(3, 2), (4,), (5,)], [(3, 2), (5,)]])
def test_the_state_of_other_weights_is_refused(tmp_path, shapes):
    save_optimizer(stepped(make_weights((3, 2), (4,))), tmp_path / "optimizer.safetensors")
    with pytest.raises(ValueError, match=r"optimizer\.safetensors is the state of other weights \(2\)"):
        load_optimizer(torch.optim.AdamW(make_weights(*shapes)), tmp_path / "optimizer.safetensors")
