"""What `test_distributed.py` lets two processes do, and one alone."""

import json
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import torch
from safetensors.torch import save_file
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

import diffusion_gym  # noqa: F401
from agents import (
    DDPOIS,
    DDPOSF,
    GRPO,
    KL,
    RLOO,
    RWR,
    AdamW,
    Batch,
    Best,
    Checkpoints,
    DenoisingPolicy,
    DiffusionNFT,
    Groups,
    Noising,
    PerPrompt,
    Processes,
    Replay,
    Rollouts,
    Steps,
    TimePredictor,
    Window,
)
from agents.updates.optimizers import Optimizer
from diffusion_gym.models import load_model

LANES = 4
ITERATIONS = 2
PROMPTS = ["north", "south", "anything"]
SIXTEEN = Rollouts(samples=16)
EIGHT = Rollouts(samples=8)
CASES = {
    "ddpo-sf": (DDPOSF, {"advantages": Batch(), "n_epochs": 2, "steps": Steps(weights="inverse_sensitivity")}),
    "ddpo-is": (
        DDPOIS,
        {"batch_size": 4, "n_epochs": 2, "steps": Steps(fraction=0.5), "clip_range": 0.1}
        | {"rollouts": replace(SIXTEEN, micro_batch_size=3), "advantages": PerPrompt(8, 3)}
        | {"kl": KL(0.1, place="exact", target=0.5)},
    ),
    "ddpo-window": (
        DDPOIS,
        {"batch_size": 4, "n_epochs": 4, "clip_range": 0.5, "steps": Steps(window=Window(2, within=(0, 4)))}
        | {"kl": KL(0.1, target=0.01), "stop_kl": 2e-4},
    ),
    "grpo": (
        GRPO,
        {"batch_size": 4, "advantages": Groups("group_mean", scale="group"), "kl": KL(0.1), "clip_range": 0.1}
        | {"rollouts": replace(SIXTEEN, group_size=2, same_noise=True)},
    ),
    "rloo": (
        RLOO,
        {"ratio": "trajectory", "advantages": Groups(scale="rollout"), "kl": KL(0.1, place="reward")}
        | {"rollouts": replace(SIXTEEN, group_size=2)},
    ),
    "rwr": (RWR, {"n_epochs": 2, "batch_size": 8}),
    "rwr-sparse": (
        RWR,
        {"n_epochs": 2, "batch_size": 8, "weights": Best(0.3, per_prompt=True)}
        | {"rollouts": replace(SIXTEEN, group_size=2)},
    ),
    "nft": (DiffusionNFT, {"batch_size": 8, "noising": Noising(draws=2), "rollouts": replace(SIXTEEN, group_size=4)}),
    # Groups with common noise cancel so well that rounding alone, of other micro-batches, is 6e-4 of their gradient.
    "nft-common": (
        DiffusionNFT,
        {"batch_size": 8, "noising": Noising(draws=2, common=True), "advantages": PerPrompt(16, 2)},
    ),
    # fp16 scales the losses, and has to where there are none.
    "ddpo-fp16": (DDPOSF, {"rollouts": EIGHT, "batch_size": 1, "steps": Steps(fraction=0.5)}),
    # One episode an update: all processes but one have nothing to do in it. Episodes differ in length.
    "rloo-times": (
        RLOO,
        {"rollouts": replace(EIGHT, group_size=2, same_noise=True), "batch_size": 1, "n_epochs": 2},
    ),
}


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Steps that are the gradient's, so that weights tell of gradients."""

    def make(self, parameters, learning_rate):
        return torch.optim.SGD(parameters, lr=learning_rate)


def height(images, prompts, metadata):
    return images[:, 1].mean((1, 2)) + images[:, 0].mean((1, 2)) ** 2


def make_env(kind="DenoisingMDP-v0"):
    arguments = {"num_steps": 4, "prompts": PROMPTS} if kind == "DenoisingMDP-v0" else {"max_steps": 6}
    device = Processes().device or "cpu"
    return gym.make_vec(
        kind,
        num_envs=LANES,
        model=load_model("mixture", device=device),
        reward=height,
        autoreset_mode="DISABLED",
        **arguments,
    )


def make_policy(env, seed, **more):
    """Return a policy that is away from the pretrained model."""
    if "TimePrediction" in env.spec.id:
        policy = TimePredictor(env.single_observation_space, initial_ratio=0.4, seed=seed)
        layer = policy.output
    else:
        policy = DenoisingPolicy(env.unwrapped.model, seed=seed, **more)
        layer = policy.denoiser.last
    generator = torch.Generator().manual_seed(seed)
    layer.weight.data += 0.05 * torch.randn(layer.weight.shape, generator=generator)
    return policy


def make(name, *, policy_seed=0, reference_seed=99, **more):
    """Return a case's learner, with SGD."""
    algorithm, arguments = CASES[name]
    env = make_env("TimePredictionMDP-v0" if name == "rloo-times" else "DenoisingMDP-v0")
    if "kl" in arguments:
        more["kl"] = replace(arguments["kl"], reference=make_policy(env, reference_seed))
    precision = {"precision": "fp16"} if name == "ddpo-fp16" else {}
    shared = {"rollouts": SIXTEEN, "optimizer": SGD(), "learning_rate": 0.003, "seed": 5}
    return algorithm(make_policy(env, policy_seed, **precision), env, **{**shared, **arguments, **more})


def trained(learner):
    return [parameter for parameter in learner.policy.parameters() if parameter.requires_grad]


def run(name, folder, rank, *, break_it=False):
    """Train a case; return the gradient of every update, the weights at the end, and what was logged."""
    learner = make(name)
    if break_it:
        normalise_apart(learner)
    found = {}

    def remember(*_):
        for index, parameter in enumerate(trained(learner)):
            found[f"gradient/{learner.num_updates:03d}/{index}"] = parameter.grad.clone()

    learner.updates.optimizer.register_step_pre_hook(remember)
    learner.set_logger(configure(str(folder / f"log{rank}"), ["json"]))
    learner.learn(total_timesteps=10**6, callback=StopAfter(ITERATIONS))
    learner.logger.close()
    found |= {f"weight/{index}": parameter.detach().clone() for index, parameter in enumerate(trained(learner))}
    counters = [*learner.counts_at_boundary.values(), learner.iteration, learner.num_updates]
    return found | {"counters": torch.tensor(counters)}


def normalise_apart(learner):
    """Break it: each process compares its episodes with each other alone."""
    whole = learner.advantages_of

    def apart(rollout):
        advantages = whole(rollout)
        mine = rollout.returns[rollout.lanes_here]
        advantages[rollout.lanes_here] = (mine - mine.mean()) / mine.std(correction=0)
        return advantages

    learner.advantages_of = apart


class StopAfter(BaseCallback):
    """Ends the training in the first step after so many rollouts, if this process has a say."""

    def __init__(self, iterations, *, has_a_say=True):
        super().__init__()
        self.iterations = iterations
        self.has_a_say = has_a_say

    def _on_step(self):
        return self.model.iteration < self.iterations or not self.has_a_say


def one_stops_for_all(folder, rank):
    """Return the counters when the last process alone ends the training."""
    learner = make("rloo-times")
    last = learner.processes.count - 1
    learner.learn(10**6, callback=StopAfter(1, has_a_say=rank == last), log_interval=0)
    return [learner.iteration, *learner.counts_at_boundary.values()]


def all_start_alike(folder, rank):
    """Return seed and weights of learners whose processes drew, or were given, different ones."""
    learner = make("grpo", policy_seed=rank, reference_seed=99 - rank, seed=None)
    parameters = [*trained(learner), *learner.penalty.reference.parameters()]
    return [learner.seed, *(float(parameter.detach().double().sum()) for parameter in parameters)]


def a_loss_is_infinite_in_one(folder, rank):
    """Return how many updates are left out, and the weights, when the last process's loss is infinite."""
    learner = make("ddpo-sf", optimizer=SGD(on_nonfinite="skip"))
    loss = sum(parameter.sum() for parameter in trained(learner))
    learner.updates.backward(loss + float("inf") if rank == learner.processes.count - 1 else loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learner.updates.apply()
    return [
        learner.updates.guard.num_skipped,
        learner.num_updates,
        *(float(p.detach().sum()) for p in trained(learner)),
    ]


def learn_from_a_folder(folder, rank):
    """Return metrics of learning from images that all processes were given, 9 of them."""
    learner = make("rwr", batch_size=4)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(9, *learner.policy.model.latent_shape, generator=generator)
    encoded = learner.policy.model.encode_prompts(PROMPTS, "")
    constants = {key: torch.cat([value] * 3) for key, value in encoded.items()}
    replay = Replay(latents, constants, torch.arange(9.0), torch.arange(9).numpy() % 3)
    return [float(value) for value in learner.fit(replay).values()]


def too_few_samples(folder, rank):
    """Return what is said when the batches cannot be shared."""
    try:
        make("ddpo-sf", rollouts=Rollouts(samples=12))
    except ValueError as error:
        return str(error)
    return None


def go_on(folder, rank):
    """Return the weights of a run that was saved and loaded again: first all save, then the main one alone."""
    processes = Processes()
    arguments = {**CASES["ddpo-is"][1], "optimizer": AdamW(epsilon=1e-2), "learning_rate": 0.01, "seed": 5}
    env = make_env()
    learner = DDPOIS(make_policy(env, 0), env, **arguments, tensorboard_log=str(folder / "tensorboard"))
    for time in range(2):
        checkpoints = Checkpoints(folder / "checkpoints", keep=1)
        learner.learn(learner.sizes.samples * 4, checkpoints, reset_num_timesteps=False)
        learner.logger.close()
        if time == 0 or processes.is_main:
            learner.save(folder / "saved")
        processes.wait()
        learner = DDPOIS.load(folder / "saved", env, tensorboard_log=str(folder / "tensorboard"))
        processes.wait()
    return [parameter.tolist() for parameter in trained(learner)]


SPECIAL = [one_stops_for_all, all_start_alike, a_loss_is_infinite_in_one, learn_from_a_folder, too_few_samples, go_on]


def main(folder):
    torch.set_num_threads(1)
    rank = Processes().rank
    for name in CASES:
        save_file(run(name, folder / name, rank), folder / f"{name}-{rank}.safetensors")
    save_file(run("ddpo-sf", folder / "broken", rank, break_it=True), folder / f"broken-{rank}.safetensors")
    results = {case.__name__: case(folder, rank) for case in SPECIAL}
    (folder / f"special-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
