"""A training that is killed a hundred times and the same one that is left alone: are they equal, bit for bit?

    python benchmarks/kill_and_resume.py

With LoRA, averaged weights, Muon, fp16, a reward that learns its scale, prompts in turn, an adaptive KL penalty and a
callback with a state. A process goes on from the newest checkpoint and is killed (SIGKILL) at a random moment, while it
loads, draws, learns or saves. Each time the newest whole checkpoint is compared, file by file, with that of the same
iteration of the training that was left alone: weights, averages, optimizer, counters, statistics, the state of reward
and callback. So are the ends. A training that comes to its end before so many kills is begun again. Seen, on two busy
cores: 100 kills, 15 of them within a save, in 2 trainings; 0 of 102 comparisons differ.

Processes are forked from one that has imported all and runs on one thread, so that a kill costs a second. Says how many
were killed within a save, and ends with an error if anything differs.
"""

import json
import multiprocessing
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import torch
import tyro
from stable_baselines3.common.callbacks import BaseCallback

import diffusion_gym  # noqa: F401
from agents import DDPOIS, KL, Checkpoints, DenoisingPolicy, LoRA, Muon, PerPrompt, Rollouts
from agents.runs.manifest import MANIFEST_FILE, find_damage
from diffusion_gym.models import DiffusionModel, load_model
from diffusion_gym.rewards.normalised import Normalised

LANES, STEPS = 4, 3


@dataclass
class Args:
    """How often what is killed."""

    kills: int = 100
    """SIGKILLs."""
    iterations: int = 60
    """Of a training, with a checkpoint after each."""
    model: str = "mixture"
    """A model's name or folder."""
    seed: int = 0
    """Of the moments."""


class Memory(BaseCallback):
    """Keeps every rollout's mean reward in checkpoints."""

    def _on_rollout_end(self) -> None:
        means = self.model.callback_states.setdefault("memory", [])
        means.append(float(self.locals["returns"].mean()))

    def _on_step(self) -> bool:
        return True


def train(model: DiffusionModel, folder: Path, iterations: int, keep: int) -> None:
    """Begin a training in a folder, or go on with it: what a user's script does each time it is started."""
    env = gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=LANES,
        num_steps=STEPS,
        model=model,
        reward=Normalised("brightness"),
        prompts=model.default_prompts,
        autoreset_mode="DISABLED",
    )
    checkpoints = Checkpoints(folder, keep=keep)
    if checkpoints.found():
        algorithm = DDPOIS.load(folder, env)
    else:
        algorithm = DDPOIS(
            DenoisingPolicy(model, adaptation=LoRA(), precision="fp16", seed=0),
            env,
            learning_rate=1e-3,
            batch_size=LANES,
            optimizer=Muon(warmup_updates=4, ema_decay=0.9),
            rollouts=Rollouts(samples=2 * LANES, group_size=2, prompt_sampling="round_robin"),
            advantages=PerPrompt(8, min_count=2),
            kl=KL(0.1, target=0.05),
            seed=3,
        )
    left = iterations * 2 * LANES * STEPS - algorithm.num_timesteps
    algorithm.learn(left, [Memory(), checkpoints], log_interval=0, reset_num_timesteps=False)


def manifest(folder: Path, name: str) -> dict[str, object]:
    return json.loads((folder / name / MANIFEST_FILE).read_text())["files"]


def newest_whole(folder: Path) -> str | None:
    whole = [path.name for path in Checkpoints(folder).found() if find_damage(path) is None]
    return whole[-1] if whole else None


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    fork = multiprocessing.get_context("fork")
    model = load_model(args.model)
    model.denoiser  # noqa: B018  (loaded once, for all)
    model.encode_prompts([""])
    work = Path(tempfile.mkdtemp(prefix="kill_and_resume_"))

    def start(folder: Path, keep: int) -> multiprocessing.process.BaseProcess:
        process = fork.Process(target=train, args=(model, folder, args.iterations, keep))
        process.start()
        return process

    whole = work / "whole"
    began = time.monotonic()
    process = start(whole, args.iterations)
    process.join()
    if process.exitcode != 0:
        raise SystemExit("the training that was left alone failed")
    iteration = (time.monotonic() - began) / args.iterations
    print(f"left alone: {args.iterations} iterations, {iteration:.2f} s each", flush=True)

    killed, trainings, in_a_save, reached = 0, 0, 0, Counter[str]()
    differing: list[str] = []
    while killed < args.kills or process is not None:
        folder = work / f"killed_{trainings}"
        process = start(folder, 3)
        if killed < args.kills:
            process.join(rng.uniform(0, 4 * iteration))
            process.kill()
        process.join()
        if process.exitcode not in (0, -9):
            raise SystemExit(f"a continuation failed with {process.exitcode}")
        killed += process.exitcode == -9
        in_a_save += any(path.suffix in (".partial", ".previous") for path in folder.glob("*"))
        name = newest_whole(folder)
        reached[name or "none"] += 1
        if name is not None and (own := manifest(folder, name)) != (other := manifest(whole, name)):
            files = [file for file in {**own, **other} if own.get(file) != other.get(file)]
            differing.append(f"{folder.name}, {name}: {files}")
        if process.exitcode == 0:
            trainings += 1
            process = None
    print(
        f"{killed} kills, {in_a_save} of them within a save, in {trainings} trainings; {len(reached)} different newest "
        f"checkpoints; {len(differing)} of {sum(reached.values())} differ from the training that was left alone"
    )
    if differing:
        raise SystemExit("\n".join([*differing, f"what was written is in {work}"]))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
