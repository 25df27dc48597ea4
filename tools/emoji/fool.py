"""How the scorer is fooled: by choosing, by gradients, by reinforcement learning.

    python -m tools.emoji.fool

prints, with the classifier, which nothing was optimised for, as the second opinion:

- best of N samples by the score: what is chosen, for N = 1, 4, 16;
- the gradient of the score followed in the latents of finished samples: `gradient.png`;
- DDPO-IS trained on the score, for `queries` rewards: `policy.png`.

The share that the classifier names as the prompt says whether a higher score is a better picture.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import torch
import tyro
from torch import Tensor

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DenoisingPolicy, PerPrompt, Rollouts, evaluate
from diffusion_gym.models import DiffusionModel, load_model
from diffusion_gym.prompts.base import with_article
from diffusion_gym.rewards.emoji_alignment import EmojiAlignment

from .export import CLASSIFIER
from .icons import ANIMALS
from .samples import draw_samples, lay_out
from .sources import WORK
from .train_classifier import Classifier


class Judge:
    """Scores pictures, and asks the classifier what they show."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.reward = EmojiAlignment()

    @torch.no_grad()
    def score(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Return the scores [B] of images for the names they should show."""
        return self.reward(images, [with_article(name) for name in names]).values

    def opinion(self, what: str, images: Tensor, names: Sequence[str]) -> str:
        """Return the mean score and the share that the classifier names right, as a line."""
        right = [found == name for found, name in zip(self.classifier.animals(images), names, strict=True)]
        mean = self.score(images, names).mean()
        return f"{what}: mean score {mean:.3f}, the classifier agrees on {100 * sum(right) / len(right):.1f} %"


def choose_best(judge: Judge, model: DiffusionModel, counts: Sequence[int], per_animal: int) -> None:
    """Print what the best of N by the score are."""
    most = max(counts) * per_animal
    names = [animal for animal in ANIMALS for _ in range(most)]
    images = draw_samples(model, [with_article(name) for name in names], list(range(30_000, 30_000 + len(names))))
    scores = judge.score(images, names).reshape(-1, most)
    rows = torch.arange(len(names)).reshape(-1, most)
    for count in counts:
        groups = scores.reshape(len(ANIMALS) * most // count, count)
        chosen = rows.reshape(groups.shape).gather(1, groups.argmax(1, keepdim=True))[:, 0]
        print(judge.opinion(f"best of {count}", images[chosen], [names[row] for row in chosen.tolist()]))


def follow_gradient(
    judge: Judge, model: DiffusionModel, folder: Path, *, num_steps: int = 60, rate: float = 0.05
) -> None:
    """Print and draw what Adam makes of the latents of finished samples when it raises the score."""
    names = list(ANIMALS)
    prompts = [with_article(name) for name in names]
    before = draw_samples(model, prompts, list(range(40_000, 40_000 + len(names))))
    latents = model.encode(before).requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=rate)
    for _ in range(num_steps):
        loss = -judge.reward(model._decode(latents), prompts).values.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = model.decode(latents.detach())
    print(judge.opinion("samples", before, names))
    print(judge.opinion(f"after {num_steps} steps along the gradient", after, names))
    pairs = torch.stack([before, after], 1).flatten(0, 1)
    lay_out(pairs, names, per_label=2, columns=9).save(folder / "gradient.png")


def train_policy(judge: Judge, model: DiffusionModel, folder: Path, *, queries: int) -> None:
    """Print and draw what DDPO-IS makes of the model when it is rewarded with the score."""
    env = gym.make_vec("DenoisingMDP-v0", num_envs=45, num_steps=10, model=model, reward=judge.reward)
    policy = DenoisingPolicy(env.unwrapped.model, precision="auto", seed=0)
    algorithm = DDPOIS(
        policy,
        env,
        learning_rate=1e-4,
        batch_size=45,
        rollouts=Rollouts(samples=45),
        advantages=PerPrompt(16, min_count=4, center=True),
        seed=0,
    )
    names = list(ANIMALS) * 4
    prompts, seeds = [with_article(name) for name in names], list(range(len(names)))
    before = evaluate(env, policy, seeds=seeds, prompts=prompts, max_images=len(seeds))
    print(judge.opinion("the policy", before.images, names), flush=True)
    for _ in range(4):
        algorithm.learn(queries // 4 * 10, reset_num_timesteps=False)
        after = evaluate(env, policy, seeds=seeds, prompts=prompts, max_images=len(seeds))
        print(judge.opinion(f"after {algorithm.reward_queries} rewards", after.images, names), flush=True)
    pairs = torch.stack([before.images, after.images], 1)[: len(ANIMALS)].flatten(0, 1)
    lay_out(pairs, ANIMALS, per_label=2, columns=9).save(folder / "policy.png")


@dataclass
class Args:
    """Fool the scorer."""

    pipeline: Path = Path("diffusion_gym/models/emoji")
    """What draws."""
    work: Path = WORK
    """Where the pictures are written."""
    classifier: Path = CLASSIFIER
    """The classifier's folder."""
    counts: tuple[int, ...] = (1, 4, 16)
    """The Ns of best of N."""
    queries: int = 1440
    """Rewards that DDPO-IS asks for."""


def main(args: Args) -> None:
    folder = args.work / "fool"
    folder.mkdir(parents=True, exist_ok=True)
    judge, model = Judge(Classifier(args.classifier)), load_model(args.pipeline)
    choose_best(judge, model, args.counts, per_animal=1)
    follow_gradient(judge, model, folder)
    train_policy(judge, model, folder, queries=args.queries)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(Args, description=__doc__))
