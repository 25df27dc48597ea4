"""The README's Python blocks run as they stand, but for the sizes below."""

import re
from pathlib import Path

import pytest

from tests.tiny import make_tiny_clip

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALLER = {
    'num_envs=64, num_steps=10, reward="incompressibility"': 'num_envs=2, num_steps=3, reward="incompressibility"',
    "rollouts=Rollouts(samples=64)": "rollouts=Rollouts(samples=2), batch_size=2",
    "total_timesteps=10_240": "total_timesteps=6",
    '    num_envs=32,\n    reward="reference_distance"': '    num_envs=2,\n    reward="brightness"',
    "group_size=8": "group_size=2",
    "total_timesteps=20_000": "total_timesteps=6",
    "102_400": "6",
    'device="cuda:1",': 'device="cpu",',
}


@pytest.mark.filterwarnings("ignore:It seems that your observation")
@pytest.mark.filterwarnings("ignore:The minimal resolution for an image")
@pytest.mark.filterwarnings("ignore:Your observation .* has an unconventional shape")
@pytest.mark.filterwarnings("ignore:We recommend you to use a symmetric")
@pytest.mark.filterwarnings("ignore:.*A Box (observation|action) space")
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = BLOCKS[index]
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    if "weights/clip" in code:
        make_tiny_clip(tmp_path / "weights" / "clip-vit-large-patch14")
        (tmp_path / "weights" / "sac+logos+ava1-l14-linearMSE.pth").touch()
    namespace = {}
    exec(compile(code, f"README.md block {index}", "exec"), namespace)
    if index == 0:
        assert (tmp_path / "runs" / "first" / "unet" / "config.json").is_file()
        assert namespace["algorithm"].num_updates == 1
    if "frame" in namespace:
        assert namespace["frame"].shape == (64, 64, 3)
    if "images" in namespace:
        assert namespace["images"].shape == (4, 3, 64, 64)


def test_every_size_that_is_made_smaller_is_in_the_readme():
    assert [text for text in SMALLER if text not in README] == []


def test_the_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_nothing_is_left_to_fill_in():
    assert re.findall(r"\b[A-Z]+_(?:MINUTES|RESULT|BEFORE|AFTER)\b|\b(?:OVERHEAD|EPOCH)\b", README) == []
