"""The tools that show what a few-step model is good for, on a small one."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_gym.models import load_model
from tests.diffusion_gym.models.test_folders import change
from tests.tiny import make_tiny_latent_consistency
from tools.emoji import edit_icons, search_times
from tools.emoji.evaluate import frechet_distance


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small consistency model of 64×64 images."""
    folder = make_tiny_latent_consistency(tmp_path_factory.mktemp("lcm") / "tiny")
    change(folder / "unet" / "config.json", sample_size=32)
    assert load_model(folder).image_size == (64, 64)
    return folder


def test_all_edits_are_drawn_and_measured(folder, work, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(edit_icons, "ANIMALS", ("fox", "cat", "dog"))
    file = tmp_path / "pictures" / "edits.png"
    edit_icons.main(edit_icons.Args(str(folder), work, file, shown=("fox", "cat"), num_steps=(1, 3)))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 2 * (3 + 1) + 1
    assert all(float(row.split("|")[3]) < 1e-5 for row in rows[:-1])  # the error of what is known
    with Image.open(file) as picture:
        assert picture.height > 500


def test_the_distance_of_what_was_searched_is_compared_on_other_noises(folder, work, monkeypatch):
    monkeypatch.setattr(search_times, "BOOTSTRAPS", 2)
    monkeypatch.setattr(
        search_times, "evaluation_set", lambda count: (["fox", "cat", "dog"] * count, list(range(3 * count)))
    )
    arguments = search_times.Args(str(folder), work, 2, 2, (2, 3), candidates=5)
    search_times.main(arguments)
    report = json.loads((work / "times" / "report.json").read_text())
    assert set(report) == {"2 steps", "3 steps"}
    for num_steps, row in ((2, report["2 steps"]), (3, report["3 steps"])):
        assert len(row["times"]) == len(row["even times"]) == num_steps
        assert row["value"] == min(value for times, value in row["tried"].items() if times.count(",") == num_steps - 1)
        held_out = row["held out"]
        assert held_out["gain"] == pytest.approx(held_out["even"] - held_out["found"])
        assert held_out["error"] > 0 or row["times"] == row["even times"]


def test_a_comparison_is_of_the_same_rows():
    real, found = (torch.randn(60, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    report = search_times.compare(real, found, found + 2.0)
    assert report["found"] == pytest.approx(frechet_distance(real, found))
    assert report["gain"] == pytest.approx(report["even"] - report["found"])
    same = search_times.compare(real, found, found)
    assert (same["gain"], same["error"]) == (0, 0)


def test_the_ratio_of_signal_to_noise_is_in_decibels():
    truth = torch.zeros(2, 3, 4, 4)
    np.testing.assert_allclose(
        edit_icons.psnr(truth + torch.tensor([0.1, 0.01])[:, None, None, None], truth), [20, 40], rtol=1e-5
    )
