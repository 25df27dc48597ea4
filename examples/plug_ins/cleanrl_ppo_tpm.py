"""PPO in one file, in CleanRL's style, on the raw torch vector environment of time prediction: no adapter.

python examples/plug_ins/cleanrl_ppo_tpm.py
"""

import time
from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro
from torch import Tensor, nn

import diffusion_gym  # noqa: F401
from agents import TimePredictor, ValueNetwork, evaluate
from diffusion_gym.grids import karras_grid, step_ratios


@dataclass
class Args:
    """PPO on the time-prediction MDP: the image-text scorer's opinion, less a price for every network call."""

    price: float = 0.01
    """Of a network call, in cosine of the scorer."""
    total_timesteps: int = 6_144
    """Network calls to learn from."""
    num_envs: int = 32
    """Lanes."""
    num_steps: int = 12
    """Steps per lane and rollout."""
    update_epochs: int = 4
    """Passes over a rollout."""
    num_minibatches: int = 4
    """Optimizer steps per pass."""
    learning_rate: float = 3e-3
    """Adam's; it falls to 0."""
    clip_coef: float = 0.2
    """Of the ratio."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """The gradient is clipped to this."""
    initial_steps: int = 12
    """Steps of the Karras grid that the predictor starts from."""
    num_eval: int = 64
    """Held-out images before and after; a multiple of num_envs."""
    seed: int = 0
    """Of the training; the held-out seeds are 0, 1, 2 …"""
    quick: bool = False
    """Two rollouts of few lanes: only to see that it runs."""

    def __post_init__(self) -> None:
        if self.quick:
            self.total_timesteps, self.num_envs, self.num_steps, self.num_eval = 48, 4, 6, 8


class Agent(nn.Module):
    """The time predictor with a value head."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args) -> None:
        super().__init__()
        schedule = envs.unwrapped.model.schedule
        grid = karras_grid(schedule, args.initial_steps)
        ratios = dict(zip(grid.tolist(), step_ratios(schedule, grid).tolist(), strict=False))
        self.actor = TimePredictor(envs.single_observation_space, initial_ratio=ratios, seed=args.seed)
        self.critic = ValueNetwork(envs.single_observation_space, seed=args.seed)

    def get_action_and_value(
        self, obs: dict[str, Tensor], action: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return action, log-prob, entropy and value."""
        probs = self.actor.distribution(obs)
        action = probs.sample(self.actor.generator) if action is None else action
        return action, probs.log_prob(action), probs.entropy(), self.critic(obs)


def make_env(args: Args, **arguments: object) -> gym.vector.VectorEnv:
    return gym.make_vec(
        "TimePredictionMDP-v0",
        num_envs=args.num_envs,
        reward="emoji_alignment",
        step_cost="linear",
        step_cost_weight=args.price,
        guidance_scale=2.0,
        **arguments,
    )


def train(envs: gym.vector.VectorEnv, agent: Agent, args: Args) -> None:
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    num_iterations = args.total_timesteps // (args.num_envs * args.num_steps)
    shape = (args.num_steps, args.num_envs)
    next_obs, _ = envs.reset(seed=1_000_000 + args.seed)
    next_done = torch.zeros(args.num_envs)
    for iteration in range(num_iterations):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)
        obs, actions, returned = [], [], []
        logprobs, rewards, dones, values = (torch.zeros(shape) for _ in range(4))
        for step in range(args.num_steps):
            obs.append(next_obs)
            dones[step] = next_done
            with torch.no_grad():
                action, logprobs[step], _, values[step] = agent.get_action_and_value(next_obs)
            actions.append(action)
            next_obs, rewards[step], terminations, _, _ = envs.step(action)
            next_done = terminations.float()
            returned += rewards[step][terminations].tolist()  # an episode's return is its last reward

        advantages = torch.zeros(shape)  # generalised advantage estimates with γ = λ = 1: the reward is at the end
        with torch.no_grad():
            after, running = agent.critic(next_obs), torch.zeros(args.num_envs)
            for step in reversed(range(args.num_steps)):
                alive = 1 - (next_done if step == args.num_steps - 1 else dones[step + 1])
                following = after if step == args.num_steps - 1 else values[step + 1]
                running = rewards[step] + alive * following - values[step] + alive * running
                advantages[step] = running
        b_obs = {key: torch.cat([one[key] for one in obs]) for key in next_obs}
        b_actions, b_logprobs, b_values = torch.cat(actions), logprobs.flatten(), values.flatten()
        b_advantages = advantages.flatten()
        b_returns = b_advantages + b_values

        clipfracs = []
        for _ in range(args.update_epochs):
            order = torch.randperm(len(b_actions))
            for rows in order.chunk(args.num_minibatches):
                mb_obs = {key: value[rows] for key, value in b_obs.items()}
                _, newlogprob, _, newvalue = agent.get_action_and_value(mb_obs, b_actions[rows])
                ratio = (newlogprob - b_logprobs[rows]).exp()
                clipfracs.append(((ratio - 1).abs() > args.clip_coef).float().mean())
                mb = b_advantages[rows]
                mb = (mb - mb.mean()) / (mb.std() + 1e-8)
                pg_loss = torch.max(-mb * ratio, -mb * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)).mean()
                v_loss = 0.5 * (newvalue - b_returns[rows]).square().mean()
                optimizer.zero_grad()
                (pg_loss + args.vf_coef * v_loss).backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
        mean = f"{sum(returned) / len(returned):.4f}" if returned else "none yet"
        print(f"iteration {iteration + 1}: episodic_return {mean}, clipfrac {torch.stack(clipfracs).mean():.3f}")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    started = time.process_time()
    torch.manual_seed(args.seed)
    envs = make_env(args)
    agent = Agent(envs, args)
    judged = make_env(args, model=envs.unwrapped.model, autoreset_mode="DISABLED")  # lanes run to their ends
    before = evaluate(judged, agent.actor, seeds=range(args.num_eval))
    train(envs, agent, args)
    after = evaluate(judged, agent.actor, seeds=range(args.num_eval))
    gain, error = after.gain_over(before)
    for name, result in (("before", before), ("after", after)):
        print(
            f"{name}: reward {result.mean:.4f} ± {result.standard_error:.4f}, {result.lengths.mean():.2f} network calls"
        )
    print(f"gain {gain:+.4f} ± {error:.4f}; {time.process_time() - started:.0f} s of CPU")


if __name__ == "__main__":
    main()
