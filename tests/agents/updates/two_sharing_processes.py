"""What `test_sharing_processes.py` lets two processes do that share a denoiser's weights, and one alone."""

import copy
import gc
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import torch
from safetensors.torch import save_file

from agents import (
    DDPOIS,
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
    Full,
    Groups,
    LoRA,
    Muon,
    Only,
    Processes,
    Rollouts,
    Steps,
    Window,
)
from diffusion_gym.models import load_model, sharding
from tests.agents.updates.two_processes import SGD, StopAfter
from tests.families import FAMILIES

LANES = 2
# Passes of one transition are rounded alike, whoever makes them.
FOUR = Rollouts(samples=4, micro_batch_size=1)
FAMILY = {family.name: family for family in FAMILIES}
SD, SD3, FLUX = "stable-diffusion", "stable-diffusion-3", "flux-dev"
GROUPS = {"rollouts": replace(FOUR, group_size=2), "advantages": Groups()}
# Which family, what is trained of it, and by what.
CASES = {
    # The reference is asked in each pass; processes have different numbers of steps, and one sometimes none.
    "full": (
        SD,
        {"adaptation": Full()},
        DDPOIS,
        {
            "batch_size": 2,
            "steps": Steps(fraction=0.5),
            "advantages": Batch(),
            "kl": KL(0.1),
            "clip_range": 0.1,
        },
    ),
    # One episode an update: one process makes passes of nothing.
    "full-checkpointing": (
        SD3,
        {"adaptation": Full(), "gradient_checkpointing": True},
        RLOO,
        {"batch_size": 1, "ratio": "trajectory", "kl": KL(0.1, place="reward"), **GROUPS},
    ),
    # The policy that draws is a copy of the one that is trained.
    "only": (
        FLUX,
        {"adaptation": Only("norm", "bias")},
        DiffusionNFT,
        {"rollouts": replace(FOUR, group_size=2), "batch_size": 4},
    ),
    # Which of the images count, and so whose they are, is known when they are drawn.
    "sparse": (
        FLUX,
        {"adaptation": Full()},
        RWR,
        {"rollouts": FOUR, "batch_size": 2, "weights": Best(0.3), "n_epochs": 2},
    ),
    "lora": (
        FLUX,
        {"adaptation": LoRA(rank=2)},
        GRPO,
        {"batch_size": 2, "kl": KL(0.1, place="exact"), "steps": Steps(window=Window(1)), **GROUPS},
    ),
    "lora-checkpointing": (
        SD,
        {"adaptation": LoRA(rank=2), "gradient_checkpointing": True},
        DDPOIS,
        {"batch_size": 2, "advantages": Batch(), "clip_range": 0.1, "n_epochs": 2},
    ),
    "bf16": (SD3, {"adaptation": Full(), "precision": "bf16"}, GRPO, {"batch_size": 2, **GROUPS}),
}
ADAPTATIONS = {"full": Full(), "lora": LoRA(rank=2)}
PLAIN = {"rollouts": FOUR, "batch_size": 2, "advantages": Batch(), "seed": 5}
CLOSE = {"bf16": 0.03}  # relative distances; 1e-5 for the others


def make_env(folder, family, **more):
    """Return the environment; the model's folder is written by the main process."""
    processes, path = Processes(), folder / family
    if processes.is_main and not path.exists():
        FAMILY[family].write(path)
    processes.wait()
    model = load_model(path, device=processes.device or "cpu", image_size=FAMILY[family].told_size)
    return gym.make_vec("DenoisingMDP-v0", num_envs=LANES, num_steps=2, model=model, reward="brightness", **more)


def make(folder, name, **more):
    """Return a case's learner, with SGD."""
    family, arguments, algorithm, settings = CASES[name]
    env = make_env(folder, family)
    scale = FAMILY[family].guidance_scale
    policy = DenoisingPolicy(env.unwrapped.model, guidance_scale=scale, seed=0, **arguments)
    move(policy)
    shared = {"rollouts": FOUR, "optimizer": SGD(ema_decay=0.5), "learning_rate": 0.003, "seed": 5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ratios of whole trajectories are far from 1 after an update
        return algorithm(policy, env, **{**shared, **settings, **more})


@torch.no_grad()
def move(policy):
    """Move a policy away from the pretrained model: next to it a KL divergence is a difference of near-equals."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(policy):
        parameter += sharding.like(parameter, 0.05 * torch.randn(parameter.shape, generator=generator))


def trained(policy):
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if sharding.is_shard(tensor) else tensor.clone()


def run(folder, name):
    """Train a case; return the gradient of every update, and the weights and their average at the end."""
    learner = make(folder, name)
    found = {}

    def remember(*_):
        for index, parameter in enumerate(trained(learner.policy)):
            if parameter.grad is not None:
                found[f"gradient/{learner.num_updates:03d}/{index}"] = whole(parameter.grad)

    learner.updates.optimizer.register_step_pre_hook(remember)
    learner.learn(10**6, StopAfter(1), log_interval=0)
    found |= {f"weight/{index}": whole(parameter) for index, parameter in enumerate(trained(learner.policy))}
    with learner.averaged_weights():
        found |= {f"average/{index}": whole(parameter) for index, parameter in enumerate(trained(learner.policy))}
    return found | {"counters": torch.tensor([learner.iteration, learner.num_updates, learner.num_timesteps])}


def state_of(learner):
    """Return the sum of all weights, averages and states of the optimizer, exactly."""
    averages = learner.updates.average._ema.shadow_params
    state = learner.updates.optimizer.state_dict()["state"]
    moments = [state[index][key] for index in sorted(state) for key in ("exp_avg", "exp_avg_sq")]
    return [float(whole(tensor).double().sum()) for tensor in (*learner.policy.parameters(), *averages, *moments)]


def going_on(folder, name):
    """Return states: after two iterations, after two with a checkpoint in between, and at that checkpoint."""

    def fresh():
        env = make_env(folder, FLUX)
        policy = DenoisingPolicy(env.unwrapped.model, adaptation=ADAPTATIONS[name], guidance_scale=4.0, seed=0)
        return DDPOIS(policy, env, learning_rate=0.01, optimizer=AdamW(epsilon=1e-2, ema_decay=0.5), **PLAIN)

    def learn(learner):
        learner.learn(FOUR.samples * 2, Checkpoints(path), log_interval=0, reset_num_timesteps=False)
        Processes().wait()

    straight = fresh()
    path = folder / f"{name}-straight"
    learn(straight)
    learn(straight)
    path = folder / f"{name}-checkpoints"
    learn(fresh())
    saved = DDPOIS.load(path, make_env(folder, FLUX))
    after_one = state_of(saved)
    learn(saved)
    return {"straight": state_of(straight), "resumed": state_of(saved), "after_one": after_one}


def saved_by_others(folder, other, name):
    """Return the state of a run that was saved by another number of processes."""
    return state_of(DDPOIS.load(other / f"{name}-checkpoints" / "iteration_00000001", make_env(folder, FLUX)))


def alive():
    """Return the bytes of all tensors that are alive in this process, each memory counted once."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    parts = [one.to_local() if sharding.is_shard(one) else one for one in tensors]
    memories = [one.untyped_storage() for one in parts if one.device.type != "meta"]
    return sum({memory.data_ptr(): memory.nbytes() for memory in memories}.values())


def memory(folder, name):
    """Return the memory that model, policy, reference and optimizer hold after an update, over the denoiser's size."""
    env = make_env(folder, SD3)
    model = env.unwrapped.model
    model.encode_prompts(env.unwrapped.prompts.texts)
    env.reset(seed=0)
    before = alive()
    policy = DenoisingPolicy(model, adaptation=ADAPTATIONS[name], guidance_scale=4.0, seed=0)
    learner = DDPOIS(policy, env, kl=KL(0.1), optimizer=SGD(), **PLAIN)
    learner.learn(FOUR.samples, log_interval=0)
    size = sum(weight.numel() * weight.element_size() for weight in model.denoiser.parameters())
    return (alive() - before) / size


def copies(folder):
    """Return whether a deep copy of a policy, its window and its reference predict what they should."""
    learner = make(folder, "lora")
    policy, env = learner.policy, learner.env
    observation, _ = env.reset(seed=0)
    with torch.no_grad():
        means = [
            one.distribution(observation).mean
            for one in (policy, copy.deepcopy(policy), policy.windowed(1.0, 0.0), policy.reference())
        ]
        pretrained = DenoisingPolicy(policy.model, adaptation=LoRA(rank=2), guidance_scale=policy.guidance_scale)
        means.append(pretrained.distribution(observation).mean)
    same = [torch.equal(means[0], other) for other in means[1:3]]
    return [*same, torch.equal(means[0], means[3]), torch.allclose(means[3], means[4], atol=1e-6)]


def one_stops_for_all(folder):
    """Return the counters when the last process alone ends the training."""
    learner = make(folder, "bf16")
    last = learner.processes.rank == learner.processes.count - 1
    learner.learn(10**6, StopAfter(1, has_a_say=last), log_interval=0)
    return [learner.iteration, learner.num_timesteps]


def refusals(folder):
    """Return what is said of what cannot be had."""
    said = []

    def note(action):
        try:
            action()
        except ValueError as error:
            said.append(str(error))
        else:
            said.append(None)

    def time_prediction():
        gym.make_vec("TimePredictionMDP-v0", num_envs=2, model=make_env(folder, SD).unwrapped.model)

    def fp16():
        env = make_env(folder, SD)
        DDPOIS(DenoisingPolicy(env.unwrapped.model, precision="fp16"), env, **PLAIN)

    note(lambda: make(folder, "full", optimizer=Muon()))
    note(lambda: make(folder, "lora", optimizer=Muon()))
    note(time_prediction)
    note(fp16)
    return said


def main(folder, other=None):
    torch.set_num_threads(1)
    rank = Processes().rank
    for name in CASES:
        save_file(run(folder, name), folder / f"{name}-{rank}.safetensors")
    results = {
        "going_on": {name: going_on(folder, name) for name in ADAPTATIONS},
        "memory": {name: memory(folder, name) for name in ADAPTATIONS},
        "copies": copies(folder),
        "one_stops_for_all": one_stops_for_all(folder),
        "refusals": refusals(folder),
    }
    if other is not None:
        results["saved_by_others"] = {name: saved_by_others(folder, other, name) for name in ADAPTATIONS}
    (folder / f"results-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
