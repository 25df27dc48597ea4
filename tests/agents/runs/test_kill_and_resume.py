"""The benchmark that kills a training a hundred times, with three kills."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_tiny_stable_diffusion

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "kill_and_resume.py"


@pytest.mark.parametrize(("model", "seed"), [("mixture", 0), ("tiny", 1)])
def test_a_training_with_everything_on_goes_on_bit_for_bit_wherever_it_is_killed(tmp_path, model, seed):
    if model == "tiny":
        model = str(make_tiny_stable_diffusion(tmp_path / "tiny"))
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--iterations", "6", "--model", model, "--seed", str(seed)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr + result.stdout
    assert re.search(r"3 kills, .* 0 of \d+ differ", result.stdout)
