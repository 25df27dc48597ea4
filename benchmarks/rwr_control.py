"""What RWR's weights do, and what the guidance in its loss does: the same training with and without each.

    python benchmarks/rwr_control.py

Four arms from the same prompts and noise: weighted or equally, on the guided prediction, as published, or on the plain
one. Prints the mean reward of each round's images, in kB; about 25 minutes on one core.
"""

import argparse

import gymnasium as gym
import torch
from stable_baselines3.common.callbacks import BaseCallback

import diffusion_gym  # noqa: F401
from agents import RWR, Best, DenoisingPolicy, Muon, Noising, Rollouts, Softmax

LANES, STEPS = 32, 10


class MeanReward(BaseCallback):
    """Keeps the mean reward of the last rollout."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.last = float(self.locals["returns"].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    env = gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=LANES,
        num_steps=STEPS,
        reward="incompressibility",
        autoreset_mode="DISABLED",
    )
    weighted, equal = Softmax(3.0, per_prompt=True), Best(1.0, per_prompt=True)
    arms = {
        "guided, weighted": (True, weighted),
        "guided, equal": (True, equal),
        "plain, weighted": (False, weighted),
        "plain, equal": (False, equal),
    }
    runs = {}
    for name, (is_guided, weights) in arms.items():
        runs[name] = RWR(
            DenoisingPolicy(env.unwrapped.model, precision="auto", seed=0),
            env,
            learning_rate=3e-4,
            n_epochs=1,
            optimizer=Muon(warmup_updates=4),
            rollouts=Rollouts(samples=LANES, group_size=8, prompt_sampling="round_robin"),
            weights=weights,
            noising=Noising(draws=4, guidance_scale=None if is_guided else 1.0),
            seed=0,
        )
    print("round", *runs, sep=" | ")
    for number in range(1, args.rounds + 1):
        means = []
        for run in runs.values():
            callback = MeanReward()
            run.learn(LANES * STEPS, callback, log_interval=0, reset_num_timesteps=False)
            means.append(f"{callback.last:.3f}")
        print(number, *means, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
