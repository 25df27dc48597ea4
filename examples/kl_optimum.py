"""How near KL-regularised training comes to its optimum, where that is known: a Gaussian mixture, term by term.

    python examples/kl_optimum.py

2 minutes on 2 cores. Samples of eight components on a circle are rewarded for lying to the right, r(x_0) = x, and pay β
for each nat of KL divergence to the untrained sampler. The best that any policy can do is the sampler's own law tilted
by exp(r/β), worth J* = β·log E[exp(r/β)]; every other falls short of it by β·KL(policy ‖ optimum), exactly. Prints what
the tilt makes of the data (closed form), what it makes of the sampler (its samples, weighted), what RLOO has made of
it, and what the gaps between the three are.

Of a value of 0.83 at the optimum, RLOO has 0.73 after 200 updates and 0.76 after 800 (with `--kl-place loss`, 0.71
after 200): what is left is mostly not that the policy stays too near (its 0.59 nats are the optimum's), but that its
nats are not spent as well.
"""

import tempfile
from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro
from torch import Tensor

import diffusion_gym  # noqa: F401
from agents import KL, RLOO, AdamW, DenoisingPolicy, Rollouts, collect
from agents.experience.rollouts import Rollout
from agents.kl import KLPlace
from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import MixtureModel, write_mixture

DDPM = {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing", "set_alpha_to_one": False}


@dataclass
class Args:
    """One training, and three laws."""

    kl_coefficient: float = 1.0
    """β."""
    kl_place: KLPlace = "exact"
    """Where the KL enters the gradient."""
    num_steps: int = 50
    """Denoising steps. All of them are stochastic: the process ends in a little noise."""
    updates: int = 200
    """Rollouts to learn from, one update each."""
    num_envs: int = 512
    """Samples per rollout."""
    learning_rate: float = 5e-3
    """AdamW's, at the start; it falls to 0."""
    batches: int = 40
    """Batches of num_envs samples that each law is measured with."""
    seed: int = 0
    """Of the training."""


def the_mixture() -> MixtureModel:
    """Return the embedded mixture with a process whose last step has a density too."""
    known = load_model("mixture").denoiser.config
    with tempfile.TemporaryDirectory() as folder:
        names = [str(index) for index in range(len(known.means))]
        write_mixture(folder, known.means, stds=known.stds, weights=known.weights, names=names, scheduler=DDPM)
        model = load_model(folder)
        assert isinstance(model, MixtureModel)
        assert model.denoiser is not None
    return model


def shares(model: MixtureModel, x: Tensor, weights: Tensor) -> Tensor:
    """Return how much of the weight lies nearest to each component, from the leftmost to the rightmost, [K]."""
    centres = model.denoiser.centres
    nearest = torch.cdist(x, centres).argmin(1)
    return torch.zeros(len(centres)).index_add(0, nearest, weights)[centres[:, 0].argsort()]


def mean_of(rewards: Tensor, weights: Tensor) -> str:
    mean = (weights * rewards).sum()
    return f"{mean:+.3f} ± {(weights * (rewards - mean)).square().sum().sqrt():.3f}"


def row(name: str, reward: str, value: float, parts: Tensor) -> None:
    print(f"{name:28} {reward:14}   {value:+.3f}   " + " ".join(f"{part:4.0%}" for part in parts))


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    beta = args.kl_coefficient
    model = the_mixture()

    def position(images: Tensor, prompts: object, metadata: object) -> Tensor:
        return model.positions(images)[:, 0]

    env = gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=args.num_envs,
        model=model,
        reward=position,
        prompts=["anything"],
        num_steps=args.num_steps,
        autoreset_mode="DISABLED",
    )
    policy = DenoisingPolicy(model, seed=0)
    learner = RLOO(
        policy,
        env,
        learning_rate=lambda remaining: args.learning_rate * remaining,
        clip_range=0.2,
        log_prob_reduction="sum",
        optimizer=AdamW(weight_decay=0.0, max_grad_norm=None),
        rollouts=Rollouts(group_size=args.num_envs, micro_batch_size=args.num_envs * args.num_steps),
        kl=KL(beta, place=args.kl_place),
        seed=args.seed,
    )

    def drawn() -> Rollout:
        generator = torch.Generator().manual_seed(0)
        rollout = collect(env, policy, seeds=range(args.batches), generators=generator)
        assert rollout is not None
        return rollout

    denoiser = model.denoiser
    left_to_right = denoiser.centres[:, 0].argsort()
    log_parts = denoiser.log_weights.log_softmax(0) + denoiser.centres[:, 0] / beta + denoiser.variances / (2 * beta**2)
    parts = log_parts.softmax(0)
    of_data = float((parts * (denoiser.centres[:, 0] + denoiser.variances / beta)).sum())
    data_value = float(beta * log_parts.logsumexp(0))

    before = drawn()
    rewards, x = before.returns, before.actions[-1].flatten(1)
    even = torch.full_like(rewards, 1 / len(rewards))
    weights = (rewards / beta).softmax(0)
    best = float(beta * (rewards / beta + even.log()).logsumexp(0))
    best_kl = (float((weights * rewards).sum()) - best) / beta

    learner.learn(args.updates * args.num_envs * args.num_steps, log_interval=0)
    after = drawn()
    kl = learner.kl_of_steps(after).sum(0)
    paid = after.returns - beta * kl
    value, error = float(paid.mean()), float(paid.std() / len(paid) ** 0.5)

    print(f"{'':28} mean reward      value    share of the components, left to right")
    row("untrained", mean_of(rewards, even), float(rewards.mean()), shares(model, x, even))
    row("the data, tilted", f"{of_data:+.3f}", data_value, parts[left_to_right])
    row("the sampler, tilted: optimum", mean_of(rewards, weights), best, shares(model, x, weights))
    x = after.actions[-1].flatten(1)
    row(f"RLOO, {args.updates} updates", mean_of(after.returns, even), value, shares(model, x, even))
    print(f"The optimum's weighted samples count as {1 / float(weights.square().sum()):.0f} of {len(weights)}.")
    print(f"KL to the untrained sampler: {float(kl.mean()):.3f} nats; the optimum's: {best_kl:.3f}.")
    print(f"Gap of {data_value - best:+.3f} from the data to the optimum: so few steps sample narrower components.")
    print(f"Gap of {best - value:+.3f} ± {error:.3f} from the optimum to RLOO, which is β times")
    print(f"{(best - value) / beta:.3f} nats between its paths and the optimal ones.")


if __name__ == "__main__":
    main()
