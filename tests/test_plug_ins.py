"""Examples of other RL libraries: those of the core run here, shortened; the others are targets of `make plug-ins`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "plug_ins"
PRINTED = {
    "sb3_ppo_denoising": r"brightness: 0\.\d+ ± 0\.\d+ -> 0\.\d+ ± 0\.\d+, [+-]0\.\d+ ± 0\.\d+, after 8 images",
    "sb3_ppo_tpm": r"before: reward 0\.\d+ ± 0\.\d+, \d+\.\d+ network calls, .*\nafter:  .*\ngain [+-]0\.\d+ ± 0\.\d+",
    "cleanrl_ppo_tpm": r"iteration 2: episodic_return 0\.\d+[^~]*after: reward 0\.\d+ ± 0\.\d+, \d+\.\d+ network calls",
    "torchrl_ppo": r"brightness: 0\.\d+ ± 0\.\d+ -> 0\.\d+ ± 0\.\d+, [+-]0\.\d+ ± 0\.\d+, after 8 images",
}
WRITTEN = {"sb3_ppo_denoising": {"ppo.zip", "before_after.png"}, "sb3_ppo_tpm": {"ppo.zip", "before_after.png"}}


BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "plug_ins.md").read_text(), re.DOTALL)


def plug_ins():
    """Return the libraries that the Makefile tries."""
    return re.search(r"^PLUG_INS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


def test_every_file_is_tried_somewhere():
    elsewhere = {path.stem for name in plug_ins() for path in [*FOLDER.glob(f"{name}.py"), *FOLDER.glob(f"{name}_*")]}
    assert elsewhere | set(PRINTED) == {path.stem for path in FOLDER.iterdir() if path.is_file()}
    assert not elsewhere & set(PRINTED)


def test_every_library_has_its_versions_in_the_makefile():
    text = (ROOT / "Makefile").read_text()
    for name in plug_ins():
        packages = re.search(rf"^INSTALL_{name} := (.*)$", text, re.MULTILINE)[1].split()
        assert packages
        assert all("==" in package for package in packages)


@pytest.mark.parametrize("name", PRINTED)
def test_it_runs_to_its_end(tmp_path, name):
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(PRINTED[name], result.stdout), result.stdout
    written = {path.name: path for path in tmp_path.rglob("*") if path.is_file()}
    assert written.keys() == WRITTEN.get(name, set())
    for path in written.values():
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.size[0] > 200


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_the_pages_code_runs(index, tmp_path):
    result = subprocess.run([sys.executable, "-c", BLOCKS[index]], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
