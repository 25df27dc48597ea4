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
from agents import RWR, DenoisingPolicy

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
    weighted, equal = {"inverse_temperature": 3.0}, {"best_share": 1.0}
    arms = {
        "guided, weighted": (True, weighted),
        "guided, equal": (True, equal),
        "plain, weighted": (False, weighted),
        "plain, equal": (False, equal),
    }
    runs = {}
    for name, (is_guided, weights) in arms.items():
        policy = DenoisingPolicy(env.unwrapped.model, mixed_precision="bf16", seed=0, train_cfg=is_guided)
        runs[name] = RWR(
            policy,
            env,
            group_size=8,
            samples_per_epoch=LANES,
            prompt_sampling="round_robin",
            optimizer="muon",
            learning_rate=3e-4,
            warmup_updates=4,
            noise_draws=4,
            n_epochs=1,
            per_prompt=True,
            seed=0,
            **weights,
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
