"""Optuna tunes DDPO-IS: learning rate, clip range, passes and the baseline, at as many reward queries for all.

    make plug-in-optuna

The mixture model takes seconds for a trial; any other environment is another `make_env`. Trials that fall behind are
pruned after each rollout. In the end the best settings and the algorithm's own are trained from seeds that the study
did not use, because the best of many trials is partly the luckiest.
"""

import argparse
from typing import Any

import gymnasium as gym
import optuna
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import BaseCallback

import diffusion_gym  # noqa: F401
from agents import DDPOIS, Batch, Critic, DenoisingPolicy, PerPrompt, Rollouts, evaluate
from diffusion_gym.models import load_model

ADVANTAGES = {"batch": Batch(), "per prompt": PerPrompt(16, min_count=2), "critic": Critic(n_epochs=2)}
LANES, NUM_STEPS, ROLLOUTS = 64, 10, 8
QUERIES = LANES * ROLLOUTS


def make_env() -> VectorEnv:
    model = load_model("mixture")
    return gym.make_vec("DenoisingMDP-v0", num_envs=LANES, num_steps=NUM_STEPS, model=model, reward="brightness")


class Report(BaseCallback):
    """Tells a trial what each rollout earned, and ends it where others earned more."""

    def __init__(self, trial: optuna.Trial) -> None:
        super().__init__()
        self.trial = trial

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.trial.report(self.locals["returns"].mean().item(), self.model.iteration)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def gain(env: VectorEnv, settings: dict[str, Any], *, seed: int, callback: Report | None = None) -> tuple[float, float]:
    """Return how much the held-out reward has risen after the queries, and its standard error.

    Args:
        env: The environment.
        settings: What DDPO-IS is given; {}: its own.
        seed: Of the training.
        callback: Asked after each rollout.
    """
    if "advantages" in settings:
        settings = {**settings, "advantages": ADVANTAGES[settings["advantages"]]}
    policy = DenoisingPolicy(env.unwrapped.model, seed=seed)
    learner = DDPOIS(policy, env, rollouts=Rollouts(samples=LANES), batch_size=LANES, seed=seed, **settings)
    before = evaluate(env, policy, seeds=range(LANES))
    learner.learn(QUERIES * NUM_STEPS, callback, log_interval=0)
    return evaluate(env, policy, seeds=range(LANES)).gain_over(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=12)
    args = parser.parse_args()
    env = make_env()

    def objective(trial: optuna.Trial) -> float:
        settings = {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-2, log=True),
            "clip_range": trial.suggest_float("clip_range", 1e-2, 1.0, log=True),
            "n_epochs": trial.suggest_int("n_epochs", 1, 4),
            "advantages": trial.suggest_categorical("advantages", list(ADVANTAGES)),
        }
        return gain(env, settings, seed=trial.number, callback=Report(trial))[0]

    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0), pruner=pruner)
    study.optimize(objective, n_trials=args.trials)
    pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    print(f"Optuna: {args.trials} trials, {pruned} pruned; best {study.best_params}")
    for name, settings in (("its own", {}), ("the best", study.best_params)):
        rise, error = gain(env, settings, seed=1000)
        print(f"brightness with {name} settings, new seed: {rise:+.4f} ± {error:.4f} after {QUERIES} queries")


if __name__ == "__main__":
    main()
