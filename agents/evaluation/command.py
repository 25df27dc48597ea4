"""The command `python -m agents.evaluation`."""

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym

import diffusion_gym  # noqa: F401
from diffusion_gym.models.base import DiffusionModel
from diffusion_gym.prompts import PromptSet, make_prompts
from diffusion_gym.rewards import Reward, make_reward

from ..policies import DenoisingPolicy
from .measures import FeatureName, choose_prompts, draw_samples, make_features
from .page import write_page
from .runs import find_curves, load_denoiser, policy_folder, training_state
from .study import Comparison, findings

_UNSEEN = ("unseen_animals", "unseen_objects", "unseen_activities")
_UNSEEN_EMOJI = ("emoji_animals", "emoji_objects", "emoji_backgrounds")
_ENVIRONMENT = "DenoisingMDP-v0"
_FEATURES = {
    "emoji_scorer": "the image embedding of the scorer emoji_alignment",
    "latents": "the direction of the latents x₀",
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    command = argparse.ArgumentParser(
        prog="python -m agents.evaluation",
        description="Compare a trained policy with the pretrained model, on the prompts that it was trained on and on "
        "unseen ones, and write a page (index.html) and all numbers (results.json).",
    )
    command.add_argument("run", type=Path, help="a saved run, a folder of checkpoints, or a folder with a model/")
    command.add_argument("--output", type=Path, help="where to write; RUN/evaluation if not given")
    command.add_argument(
        "--reward",
        type=reward,
        help="the reward that was trained for, if the run does not say: a name, a sum as JSON, {name: weight}, or a "
        "Python function or reward, module:name",
    )
    command.add_argument(
        "--held-out", type=reward, help='a reward that was not trained for, or "none"; emoji_alignment for emoji'
    )
    command.add_argument(
        "--prompts", help="the prompts that were trained on (a name or a file), if the run does not say"
    )
    command.add_argument("--unseen", nargs="*", help="sets of prompts; those of the training are left out")
    command.add_argument("--features", choices=tuple(_FEATURES), help="what images are compared by")
    command.add_argument("--num-steps", type=int, help="denoising steps, if the run does not say")
    command.add_argument("--samples-per-prompt", type=int, default=4, help="images of each prompt (4)")
    command.add_argument(
        "--max-prompts", type=int, default=48, help="of larger sets so many are drawn, always the same (48)"
    )
    command.add_argument("--num-envs", type=int, default=32, help="images drawn together (32)")
    command.add_argument("--device", default="cpu", help="a torch device (cpu)")
    return command


def reward(text: str) -> str | dict[str, float]:
    """Return a command-line argument as a source for `make_reward`; argparse's error has this function's name."""
    return json.loads(text) if text.startswith("{") else text


def _reward_of(args: argparse.Namespace, saved: Mapping[str, Any]) -> Reward:
    """Return the reward that was given, or the one that the run was trained for.

    Raises:
        SystemExit: the run says none, or one that would run code or ask a server because a file says so.
    """
    source = _setting(args, "reward", saved)
    names = [source] if isinstance(source, str) else list(source)
    if args.reward is None and any(":" in name for name in names):
        raise SystemExit(
            f"{args.run} was trained for {source!r}: what a file names is neither imported nor asked over the network "
            "unless you say so: give --reward"
        )
    return make_reward(source)


def _setting(args: argparse.Namespace, name: str, saved: Mapping[str, Any], default: object = None) -> Any:
    """Return a setting: the argument, or the run's, or the default.

    Raises:
        SystemExit: there is none of the three.
    """
    argument = getattr(args, name)
    setting = saved.get(name, default) if argument is None else argument
    if setting is None:
        raise SystemExit(f"{args.run} does not say its {name}: give --{name.replace('_', '-')}")
    return setting


def _some(prompts: PromptSet, most: int) -> PromptSet:
    """Return the set, or `most` prompts of it that are drawn with a fixed seed, in their order."""
    return prompts if len(prompts) <= most else _subset(prompts, choose_prompts(len(prompts), most))


def _subset(prompts: PromptSet, rows: Iterable[int]) -> PromptSet:
    rows = list(rows)
    return PromptSet(tuple(prompts[row] for row in rows), tuple(prompts.metadata[row] for row in rows))


def _prompt_sets(
    args: argparse.Namespace, saved: Mapping[str, Any], model: DiffusionModel
) -> list[tuple[str, PromptSet]]:
    """Return named prompt sets: the one that was trained on, then the unseen prompts of each other set.

    Raises:
        SystemExit: it is not known what was trained on, or there would be an interval over a single prompt.
    """
    source = _setting(args, "prompts", saved, model.default_prompts if saved else None)
    trained_on = make_prompts(source)
    if min(len(trained_on), args.max_prompts) < 2:
        raise SystemExit(
            f"an interval over prompts needs at least two of them: got {len(trained_on)} that the run was trained on, "
            f"and --max-prompts {args.max_prompts}"
        )
    sets = [(Path(source).stem if isinstance(source, str) else "training prompts", _some(trained_on, args.max_prompts))]
    knows_others = isinstance(model.default_prompts, str)  # a mixture knows no prompts but its own
    default_unseen = _UNSEEN_EMOJI if model.source == "emoji" else _UNSEEN if knows_others else ()
    for other in default_unseen if args.unseen is None else args.unseen:
        prompts = make_prompts(other)
        rows = [row for row, text in enumerate(prompts) if text not in trained_on.texts]
        if len(rows) < 2:
            print(
                f"{other} is left out: of its {len(prompts)} prompts {len(rows)} were not trained on, and an interval "
                "over prompts needs at least two",
                flush=True,
            )
        else:
            sets.append((Path(other).stem, _some(_subset(prompts, rows), args.max_prompts)))
    return sets


@dataclass(frozen=True)
class Setup:
    """The settings of an evaluation, the same for every set of prompts.

    Args:
        policy: The trained policy.
        reward: The reward that it was trained for.
        held_out: A reward that it was not trained for; None: there is no such reward.
        features: The features that images are compared by.
        num_steps: Denoising steps.
        samples_per_prompt: Images of each prompt.
        num_envs: Images drawn together, at most.
    """

    policy: DenoisingPolicy
    reward: Reward
    held_out: Reward | None
    features: FeatureName
    num_steps: int
    samples_per_prompt: int
    num_envs: int

    @classmethod
    def parse(cls, args: argparse.Namespace, policy: DenoisingPolicy, saved: Mapping[str, Any]) -> "Setup":
        """Return the setup that the arguments ask for, completed by the run's settings and its model's defaults."""
        if saved.get("observe_embeds") is not False:  # the policy saw the environment's embeddings, not its own
            policy.negative_prompt = saved.get("negative_prompt", policy.negative_prompt)
        is_emoji = policy.model.source == "emoji"
        reward = _reward_of(args, saved)
        default_held_out = "emoji_alignment" if is_emoji and reward.name != "emoji_alignment" else "none"
        held_out = args.held_out or default_held_out
        return cls(
            policy,
            reward,
            None if held_out == "none" else make_reward(held_out),
            args.features or ("emoji_scorer" if is_emoji else "latents"),
            int(_setting(args, "num_steps", saved)),
            args.samples_per_prompt,
            args.num_envs,
        )

    def compare(self, name: str, prompts: PromptSet, *, trained_on: bool) -> Comparison:
        """Return the comparison of the pretrained model's and the policy's images of a set of prompts."""
        policy = self.policy
        env = gym.make_vec(
            _ENVIRONMENT,
            num_envs=min(self.num_envs, len(prompts) * self.samples_per_prompt),
            num_steps=self.num_steps,
            model=policy.model,
            reward=self.reward,
            prompts=prompts,
            negative_prompt=policy.negative_prompt,
        )
        policy.prompts = prompts.texts
        pretrained = policy.reference()
        settings: dict[str, Any] = {
            "prompts": prompts.texts,
            "samples_per_prompt": self.samples_per_prompt,
            "held_out": self.held_out,
            "features": make_features(self.features),
        }
        before = draw_samples(env, pretrained, **settings)
        return Comparison(name, trained_on, before, draw_samples(env, policy, reference=pretrained, **settings))

    def results(self, comparisons: Sequence[Comparison]) -> dict[str, Any]:
        """Return the numbers of all sets, the first of which was trained on, as JSON can hold them."""
        summaries = [comparison.summary(comparisons[0]) for comparison in comparisons]
        unit = "" if self.reward.unit == "1" else f" {self.reward.unit}"
        held_out = None if self.held_out is None else self.held_out.name
        return {
            "reward": self.reward.name,
            "unit": self.reward.unit,
            "held_out": held_out,
            "num_steps": self.num_steps,
            "guidance_scale": self.policy.guidance_scale,
            "features": _FEATURES[self.features],
            "findings": findings(summaries, reward=self.reward.name, unit=unit, held_out=held_out),
            "sets": summaries,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a run, write its page and its numbers, and print the findings."""
    command = parser()
    args = command.parse_args(arguments)
    if min(args.samples_per_prompt, args.num_envs) < 1:
        command.error(
            f"--samples-per-prompt and --num-envs must be at least 1, got {args.samples_per_prompt} and {args.num_envs}"
        )
    started = time.monotonic()
    try:
        folder = policy_folder(args.run)
        state = training_state(folder)
        saved = state.get("environment", {})
        if saved.get("id", _ENVIRONMENT) != _ENVIRONMENT:
            raise ValueError(
                f"{folder} was trained in {saved['id']}, and this command compares in {_ENVIRONMENT} alone"
            )
        setup = Setup.parse(args, load_denoiser(folder, args.device), saved)
        model = setup.policy.model
        sets = _prompt_sets(args, saved, model)
    except (OSError, ValueError, ImportError) as error:  # what was asked for is not there, or not right
        raise SystemExit(str(error)) from error
    comparisons: list[Comparison] = []
    for name, prompts in sets:
        comparisons.append(setup.compare(name, prompts, trained_on=not comparisons))
        minutes = (time.monotonic() - started) / 60
        print(f"{name}: {len(prompts)} prompts, {minutes:.1f} minutes", flush=True)
    results = {
        "run": str(args.run),
        "checkpoint": folder.name,
        "algorithm": state.get("algorithm"),
        "reward_queries": state.get("reward_queries"),
        "model": model.source,
        **setup.results(comparisons),
    }
    output = args.output or args.run / "evaluation"
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=1))
    (output / "index.html").write_text(write_page(results, comparisons, find_curves(args.run)), encoding="utf-8")
    print(*results["findings"], f"{output}: index.html, results.json", sep="\n")
