"""Every example runs, shortened, as a user would start it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

from agents import ContextFreeSchedule, TimePredictor
from agents.policies import load_policy
from diffusion_gym.rewards.affine_head import AffineHead
from tests.launching import launcher
from tests.tiny import make_tiny_clip
from tests.tiny_language import make_tiny_bert, make_tiny_llava

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
SMALL_STABLE_DIFFUSION = [
    "--model", "emoji", "--device", "cpu", "--prompts", "simple_animals", "--num-envs", "8", "--samples-per-epoch", "8",
    "--batch-size", "4", "--reward-queries", "8", "--num-steps", "2", "--num-eval", "8", "--precision", "None",
    "--output", "OUTPUT",
]  # fmt: skip
SHORT = {
    "consistency.py": [
        "--trajectories", "2", "--start-images", "4", "--images", "4", "--batch-size", "2", "--output", "OUTPUT",
    ],
    "kl_optimum.py": ["--updates", "3", "--num-envs", "64", "--num-steps", "5", "--batches", "4"],
    "mixture.py": ["--updates", "2", "--num-envs", "64", "--num-steps", "5", "--output", "OUTPUT"],
    "my_algorithm.py": [
        "--reward-queries", "8", "--num-envs", "8", "--num-steps", "4", "--num-eval", "8", "--precision", "None",
    ],
    "random_policy.py": ["--num-steps", "5"],
    "rloo_tpm.py": [
        "--timesteps", "1", "--context-free-timesteps", "1", "--num-envs", "4", "--samples-per-epoch", "4",
        "--group-size", "2", "--num-starts", "1", "--num-eval", "4", "--paces", "1.0", "--grid-steps", "5", "20",
        "--output", "OUTPUT",
    ],
    "reinforce.py": [
        "--iterations", "1", "--num-envs", "4", "--num-steps", "2", "--num-eval", "4", "--precision", "None",
    ],
    "ddpo_incompressibility.py": [
        "--reward-queries", "8", "--num-envs", "4", "--group-size", "2", "--num-steps", "2", "--noisy-steps", "1",
        "--num-eval", "24", "--precision", "None", "--output", "OUTPUT",
    ],
    "ddpo_alignment.py": [
        *SMALL_STABLE_DIFFUSION, "--llava", "llava", "--bert-score", "bert", "--num-layers", "2",
        "--reward-dtype", "float32",
    ],
    "ddpo_aesthetic.py": [*SMALL_STABLE_DIFFUSION, "--clip", "clip", "--head", "head.safetensors"],
    "rloo_denoising.py": [
        "--updates", "1", "--num-envs", "4", "--group-size", "2", "--num-steps", "2", "--noisy-steps", "1",
        "--num-eval", "4", "--precision", "None", "--output", "OUTPUT",
    ],
    "compare_algorithms.py": [
        "--reward-queries", "8", "--num-envs", "4", "--group-size", "4", "--num-steps", "2", "--noisy-steps", "1",
        "--num-eval", "4", "--eval-every", "4", "--seeds", "0", "--precision", "None",
        "--output", "OUTPUT",
    ],
}  # fmt: skip


def run(name, output, *command):
    arguments = [str(output) if argument == "OUTPUT" else argument for argument in SHORT[name]]
    command = [*(command or [sys.executable]), str(ROOT / "examples" / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=output.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_is_tried():
    assert sorted(SHORT) == EXAMPLES


def test_random_policy(tmp_path):
    assert re.search(r"5 steps, return 3\.\d+ kB", run("random_policy.py", tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("random_policy.py", ["--nope"], "Unrecognized options: --nope"),
        ("rloo_tpm.py", ["--max-steps", "20"], "max_steps must be at least 28"),
        ("rloo_tpm.py", ["--paces", "0.7"], r"1\.0 among the paces; got 28 and \(0\.7,\)"),
        ("compare_algorithms.py", ["--algorithms", "RLO"], "unknown algorithm 'RLO': .* Did you mean 'RLOO'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_made(tmp_path, name, arguments, message):
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode != 0
    assert re.search(message, re.sub(r"[\s│]+", " ", result.stderr))
    assert list(tmp_path.iterdir()) == []


def test_mixture(tmp_path):
    text = run("mixture.py", tmp_path / "out")
    assert len(re.findall(r"mean reward [+-]\d\.\d+, mean log-density under the data -\d", text)) == 8
    assert re.findall(r"DDPO-IS after (\d+) updates", text) == ["0", "1", "1", "2"]
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.size[0] > 1000


def test_kl_optimum(tmp_path):
    text = run("kl_optimum.py", tmp_path / "out")
    assert re.search(r"the data, tilted +\+1\.458 +\+0\.855", text)
    assert re.search(r"RLOO, 3 updates +[+-]\d\.\d+ ± 0\.\d+", text)
    assert re.search(r"Gap of \+0\.\d+ ± 0\.\d+ from the optimum to RLOO", text)


def test_reinforce(tmp_path):
    assert re.search(r"brightness 0\.\d+ -> 0\.\d+: [+-]0\.\d+ ± 0\.\d+", run("reinforce.py", tmp_path / "out"))


def test_my_algorithm(tmp_path):
    text = run("my_algorithm.py", tmp_path / "out")
    found = re.findall(r"^(\S+): \d\.\d+ kB [+-]\d\.\d+ ± \d\.\d+ after 8 queries", text, re.MULTILINE)
    assert found == ["DAPO", "DDPO-IS"]


@pytest.mark.parametrize("processes", [1, 2])
def test_ddpo_incompressibility(tmp_path, processes):
    output = tmp_path / "out"
    text = run("ddpo_incompressibility.py", output, *(launcher() if processes == 2 else []))
    before = re.findall(r"before: \d\.\d+ ± 0\.\d+ kB on (.*), held-out seeds", text)
    after = re.findall(r"after: +\d\.\d+ ± 0\.\d+ kB on (.*); paired difference: [+-]0\.\d+ ± 0\.\d+ kB", text)
    assert before == after == ["prompts of the training", "emoji_animals, not trained on"]
    with Image.open(output / "before_after.png") as picture:
        assert picture.size[0] > 1000
    UNet2DConditionModel.from_pretrained(output / "model" / "unet")
    assert len(list((output / "tensorboard").glob("*/events.*"))) == 1


def test_ddpo_alignment(tmp_path):
    """It trains, and started again goes on from its checkpoint."""
    make_tiny_llava(tmp_path / "llava")
    make_tiny_bert(tmp_path / "bert")
    output = tmp_path / "out"
    text = run("ddpo_alignment.py", output)
    assert re.search(r"before: [+-]?0\.\d{4} ± 0\.\d{4} prompt_alignment", text)
    assert re.search(r"paired difference: [+-]0\.\d{4} ± 0\.\d{4} after 8 reward queries", text)
    assert (output / "model" / "pytorch_lora_weights.safetensors").is_file()
    with Image.open(output / "before_after.png") as picture:
        assert picture.size[0] > 1000
    again = run("ddpo_alignment.py", output)
    numbers = re.compile("^(?:before|paired).*$", re.MULTILINE)
    assert numbers.findall(again) == numbers.findall(text)


def test_ddpo_aesthetic(tmp_path):
    make_tiny_clip(tmp_path / "clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(AffineHead(width=24).state_dict(), tmp_path / "head.safetensors")
    output = tmp_path / "out"
    text = run("ddpo_aesthetic.py", output)
    assert re.search(r"before: [+-]?0\.\d{4} ± 0\.\d{4} aesthetic", text)
    assert re.search(r"paired difference: [+-]0\.\d{4} ± 0\.\d{4} after 8 reward queries", text)
    assert (output / "model" / "pytorch_lora_weights.safetensors").is_file()


def test_rloo_denoising(tmp_path):
    output = tmp_path / "out"
    assert re.search(r"paired difference: [+-]\d\.\d+ ± \d\.\d+ kB", run("rloo_denoising.py", output))
    UNet2DConditionModel.from_pretrained(output / "model" / "unet")


def test_compare_algorithms(tmp_path):
    """All of them run to their end; what was there before is not run again, and a run that was cut off goes on."""
    output = tmp_path / "out"
    text = run("compare_algorithms.py", output)
    curves = {file.stem: file.read_text() for file in output.glob("*.csv")}
    assert len(curves) == 8
    for curve in curves.values():
        rows = [row.split(",") for row in curve.splitlines()]
        assert [int(row[0]) for row in rows] == [0, 4, 8]
        assert {len(row) for row in rows} == {1 + 2 * 4}
    assert len({curve.splitlines()[0] for curve in curves.values()}) == 1  # all start from the same model
    assert len({curve.splitlines()[2] for curve in curves.values()}) > 5
    (output / "GRPO_0.csv").unlink()  # then it starts anew
    (output / "RWR_0.csv").write_text("".join(curves["RWR_0"].splitlines(keepends=True)[:2]))
    again = run("compare_algorithms.py", output)
    assert re.findall(r"^(\S+), seed (\d)", again, re.MULTILINE) == [("GRPO", "0"), ("RWR", "0")]
    assert re.findall(r"^\|.*\|$", again, re.MULTILINE) == re.findall(r"^\|.*\|$", text, re.MULTILINE)
    assert len((output / "table.md").read_text().splitlines()) == 10
    for name in ("curves.png", "images.png"):
        with Image.open(output / name) as picture:
            assert picture.size[0] > 400


def test_consistency(tmp_path):
    output = tmp_path / "out"
    assert re.search(r"distilled after \d+ s", run("consistency.py", output))
    pipeline = LatentConsistencyModelPipeline.from_pretrained(output / "pipeline")
    pipeline.scheduler.set_timesteps(2)
    assert pipeline.scheduler.timesteps.tolist() == [799, 399]
    with Image.open(output / "samples.png") as picture:
        assert picture.size[0] > 700


def test_rloo_tpm(tmp_path):
    output = tmp_path / "out"
    text = run("rloo_tpm.py", output)
    assert len(re.findall(r"[\d.]+ calls   distance 0\.\d+ ± 0\.\d+   error 0\.\d+ ± .*   alignment 0\.", text)) == 12
    assert len(re.findall(r"against .* at 1\d\.\d\d calls: (distance|error) [+-]\d+%, better by", text)) == 4
    assert len(re.findall(r"calls for what uniform steps reach with 20", text)) == 7
    for name in ("quality.png", "times.png", "path.png"):
        with Image.open(output / name) as picture:
            assert picture.size[0] > 700
    for name, kind in (("time_predictor", TimePredictor), ("context_free", ContextFreeSchedule)):
        assert isinstance(load_policy(output / name), kind)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_state_their_command_and_their_time(name):
    text = (ROOT / "examples" / name).read_text()
    docstring = text.split('"""')[1]
    assert f"python examples/{name}" in docstring
    assert re.search(r"\d+ (seconds|minutes)", docstring)
