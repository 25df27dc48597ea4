"""DDPO-IS with the paper's third reward: LAION's predictor of how much people like an image.

    python examples/ddpo_aesthetic.py

Stable Diffusion 1.4 learns to draw 45 animals that people would rate higher, with the paper's settings: 50 steps,
guidance 5, 256 images a rollout, four updates of each, LoRA at 3e-4, 12,800 images. It wants a GPU; the weights come
from the Hugging Face Hub, or from files and folders that the flags name. We have no GPU and did not run that. What we
ran, on 2 cores in 20 seconds, is the same script on small models (`tests/test_examples.py` makes them):

    python examples/ddpo_aesthetic.py --model emoji --device cpu --clip DIR --head FILE --num-envs 8 \
        --samples-per-epoch 8 --batch-size 4 --reward-queries 8 --num-steps 2 --num-eval 8

What it prints and writes is what `ddpo_alignment.py` does, to `runs/ddpo_aesthetic`. The reward looks at the picture
alone, so that the animal may get lost on the way to a higher number: watch `before_after.png`.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from ddpo_alignment import Training, train

from diffusion_gym.rewards.aesthetic import Aesthetic


@dataclass
class Args(Training):
    """DDPO-IS on Stable Diffusion, rewarded by LAION's aesthetic predictor."""

    clip: str = "openai/clip-vit-large-patch14"
    """CLIP ViT-L/14: a folder or a Hub id."""
    head: str | None = None
    """The head's weights, a .safetensors or .pth file; None: the published ones, from the Hub."""
    output: Path = Path("runs/ddpo_aesthetic")
    """Where to write."""


def main() -> None:
    args = tyro.cli(Args)
    head = {} if args.head is None else {"head": args.head}
    train(args, Aesthetic(clip=args.clip, device=args.reward_device, **head))


if __name__ == "__main__":
    main()
