"""DDPO-IS with the paper's fourth reward: LLaVA says what it sees, BERTScore says how near that is to the prompt.

    python examples/ddpo_alignment.py --reward-device cuda:1

Stable Diffusion 1.4 learns to draw animals that wash dishes, ride bikes and play chess, with the paper's settings:
50 steps, guidance 5, 256 images a rollout, four updates of each, LoRA at 3e-4, 51,200 images. It wants a GPU for the
diffusion model and one of 40 GB for LLaVA-1.5-13B and DeBERTa; all weights come from the Hugging Face Hub, or from
folders that the flags name. We have no GPU and did not run that. What we ran, on 2 cores in 20 seconds, is the same
script on small models (`tests/test_examples.py` makes them):

    python examples/ddpo_alignment.py --model emoji --device cpu --prompts simple_animals --llava DIR --bert-score DIR \
        --num-layers 2 --reward-dtype float32 --num-envs 8 --samples-per-epoch 8 --batch-size 4 --reward-queries 8 \
        --num-steps 2 --num-eval 8

Prints the reward before and after, on the training's prompts and other seeds, and writes to `runs/ddpo_alignment`:
`before_after.png`, `model/`
(a LoRA file for diffusers and the state to go on from), `tensorboard/`, and `checkpoints/`: started again after it was
killed, the script goes on from the newest.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import torch
import tyro
from ddpo_incompressibility import draw_before_after

import diffusion_gym  # noqa: F401
from agents import (
    DDPOIS,
    Checkpoints,
    DenoisingPolicy,
    Full,
    LoRA,
    PerPrompt,
    Processes,
    Rollouts,
    evaluate,
)
from diffusion_gym.rewards import Reward
from diffusion_gym.rewards.prompt_alignment import DEBERTA, LLAVA_13B, PromptAlignment


@dataclass
class Training:
    """DDPO-IS on Stable Diffusion with the paper's settings."""

    model: str = "CompVis/stable-diffusion-v1-4"
    """A diffusers folder or a Hub id of the Stable Diffusion family, or "emoji"."""
    prompts: str = "simple_animals"
    """A prompt set's name, or a file."""
    reward_queries: int = 12_800
    """Images to learn from."""
    num_steps: int = 50
    """Denoising steps per image."""
    guidance_scale: float = 5.0
    """Of classifier-free guidance."""
    num_envs: int = 8
    """Images drawn together, a share of them by each process: as many as fit into memory."""
    samples_per_epoch: int = 256
    """Images per rollout."""
    batch_size: int = 64
    """Images per update."""
    use_lora: bool = True
    """Train LoRA layers; without it the whole denoiser (then the paper's learning rate is 1e-5)."""
    learning_rate: float = 3e-4
    """AdamW's."""
    precision: Literal["auto", "bf16", "fp16"] | None = "auto"
    """Of the denoiser's arithmetic: "auto" is "bf16" where the device has instructions for it; None that of its
    weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: half the speed, much less memory."""
    device: str = "cuda"
    """A torch device for the diffusion model; of many processes each has the one that accelerate gives it."""
    reward_device: str | None = None
    """A torch device for the reward's networks, if it is another one."""
    num_eval: int = 64
    """Images before and after, of the training's prompts; a multiple of num_envs."""
    checkpoint_every: int = 10
    """Rollouts between two checkpoints."""
    seed: int = 0
    """Of the training; the evaluations' seeds are 0, 1, 2 …, which no training uses."""
    output: Path = Path("runs/ddpo")
    """Where to write."""


@dataclass
class Args(Training):
    """DDPO-IS on Stable Diffusion, rewarded for prompt-image alignment by LLaVA and BERTScore."""

    prompts: str = "animals_activities"
    """A prompt set's name, or a file."""
    reward_queries: int = 51_200
    """Images to learn from."""
    llava: str = LLAVA_13B
    """The model that describes: a folder or a Hub id of the LLaVA family."""
    bert_score: str = DEBERTA
    """The model that compares the description with the prompt: a folder or a Hub id."""
    num_layers: int | None = None
    """Its layer that embeds; to be said for a folder (of the default: 40)."""
    reward_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """The type that LLaVA computes in."""
    output: Path = Path("runs/ddpo_alignment")
    """Where to write."""


def make_algorithm(args: Training, env: gym.vector.VectorEnv, policy: DenoisingPolicy) -> tuple[DDPOIS, Checkpoints]:
    """Return the algorithm, as new or from its newest checkpoint, and what writes checkpoints."""
    checkpoints = Checkpoints(args.output / "checkpoints", every=args.checkpoint_every)
    log = str(args.output / "tensorboard")
    if checkpoints.found():
        return DDPOIS.load(args.output / "checkpoints", env, tensorboard_log=log), checkpoints
    algorithm = DDPOIS(
        policy,
        env,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        rollouts=Rollouts(samples=args.samples_per_epoch, async_rewards=True),
        advantages=PerPrompt(32, min_count=16),
        tensorboard_log=log,
        seed=args.seed,
    )
    return algorithm, checkpoints


def train(args: Training, reward: Reward) -> None:
    """Train, evaluate before and after on the same seeds, and write what came of it."""
    started = time.monotonic()
    processes = Processes()
    env = gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=args.num_envs // processes.count,
        model=args.model,
        reward=reward,
        prompts=args.prompts,
        num_steps=args.num_steps,
        device=processes.device or args.device,
    )
    policy = DenoisingPolicy(
        env.unwrapped.model,
        guidance_scale=args.guidance_scale,
        adaptation=LoRA() if args.use_lora else Full(),
        precision=args.precision,
        gradient_checkpointing=args.gradient_checkpointing,
        seed=args.seed,
    )
    before = evaluate(env, policy, seeds=range(args.num_eval))
    if processes.is_main:
        print(f"before: {before.mean:.4f} ± {before.standard_error:.4f} {reward.name}", flush=True)
    algorithm, checkpoints = make_algorithm(args, env, policy)
    remaining = args.reward_queries * args.num_steps - algorithm.num_timesteps
    algorithm.learn(remaining, checkpoints, reset_num_timesteps=False, progress_bar=True)
    after = evaluate(env, algorithm.policy, seeds=range(args.num_eval))
    algorithm.save(args.output / "model")
    if not processes.is_main:
        return
    gain, error = after.gain_over(before)
    print(f"after:  {after.mean:.4f} ± {after.standard_error:.4f} {reward.name}")
    print(
        f"paired difference: {gain:+.4f} ± {error:.4f} after {algorithm.reward_queries} reward queries; the error is "
        "over prompts, and of this one policy"
    )
    draw_before_after(before, after, args.output / "before_after.png", unit="")
    print(f"{args.output}: before_after.png, model/, tensorboard/; {(time.monotonic() - started) / 60:.1f} minutes")


def main() -> None:
    args = tyro.cli(Args)
    reward = PromptAlignment(
        llava=args.llava,
        bert_score=args.bert_score,
        num_layers=args.num_layers,
        device=args.reward_device,
        dtype=getattr(torch, args.reward_dtype),
    )
    train(args, reward)


if __name__ == "__main__":
    main()
