"""What people bring to the benchmark: a class, functions, and some that do not keep to the rules."""

from dataclasses import dataclass
from typing import final

import torch

from agents import DDPOSF, Rollouts, collect
from agents.training.policy_gradient import PolicyGradient


@final
@dataclass(kw_only=True, eq=False, repr=False)
class OwnClass(PolicyGradient):
    """REINFORCE, as a class."""

    def surrogate(self, log_prob, old_log_prob, advantages):
        return DDPOSF.surrogate(self, log_prob, old_log_prob, advantages)


def own_algorithm(env, budget, seed):
    """Return an algorithm with settings of one's own."""
    return DDPOSF(budget.make_policy(env, seed), env, rollouts=Rollouts(samples=48), learning_rate=1e-2, seed=seed)


def own_loop(env, budget, seed):
    """Yield the policy of a loop of one's own after each update."""
    policy = budget.make_policy(env, seed)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    while budget.left >= env.num_envs:
        rollout = collect(env, policy, seeds=[[2**32 + budget.spent + k for k in range(env.num_envs)]])
        steps, lanes = rollout.scored.nonzero()
        index = torch.as_tensor(steps), torch.as_tensor(lanes)
        log_prob = policy.distribution(rollout.observation(*index)).log_prob(rollout.action(*index), "mean")
        loss = -((rollout.returns - rollout.returns.mean())[index[1]] * log_prob).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield policy


def only_at_the_end(env, budget, seed):
    """Return the policy that was at hand from the beginning."""
    return budget.make_policy(env, seed)


def greedy(env, budget, seed):
    """Ask the reward directly for more images than the task has."""
    policy = budget.make_policy(env, seed)
    env.unwrapped.reward(torch.rand(budget.total + 1, 3, 1, 1), ["anything"] * (budget.total + 1))
    yield policy


def no_policy(env, budget, seed):
    """Yield something else."""
    yield "a policy"


def nothing(env, budget, seed):
    """Yield nothing."""
    yield from ()


def broken(env, budget, seed):
    """Fail."""
    raise RuntimeError("this algorithm has a bug")
