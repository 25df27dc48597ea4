"""What a rollout keeps, how often, and how much memory that takes while it is written down."""

import gc
import weakref
from concurrent.futures import Future
from contextlib import nullcontext

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.callbacks import BaseCallback
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_gym  # noqa: F401
from agents import RLOO, RWR, ContextFreeSchedule, DenoisingPolicy, DiffusionNFT, Policy, collect
from agents.experience.builder import RolloutBuilder, Tape
from agents.experience.environment import torch_env
from agents.experience.storage import Storage
from diffusion_gym.transitions import GaussianTransition


# what is constant is kept once
def test_latents_are_stored_once_and_embeddings_once_per_prompt(emoji, make_env):
    env = make_env(prompts=["a cat", "a dog"])
    rollout = collect(env, DenoisingPolicy(emoji, seed=0), seeds=[0, 4, 8])
    latents = rollout.changing["latents"]
    assert latents.shape == rollout.actions.shape == (3, 12, 4, 16, 16)
    assert latents.untyped_storage().data_ptr() == rollout.actions.untyped_storage().data_ptr()
    assert torch.equal(latents[1:], rollout.actions[:-1])
    rows = {key: len(constant.values) for key, constant in rollout.constants.items()}
    assert rows == {"prompt_id": 12, "prompt_embeds": 2, "negative_prompt_embeds": 1}
    expected = emoji.encode_prompts([env.unwrapped.prompts[index] for index in rollout.prompt_id])
    for key, value in expected.items():
        assert torch.equal(rollout.constants[key][torch.arange(12)], value), key


def test_prompts_outside_of_the_set_keep_their_own_embeddings(emoji, make_env):
    texts = ["a fox", "a hen", "a fox", "a cat"]
    rollout = collect(make_env(prompts=["a cat"]), DenoisingPolicy(emoji, seed=0), options={"prompt": texts})
    assert rollout.prompt_id.tolist() == [-1, -1, -1, 0]
    found = rollout.constants["prompt_embeds"][torch.arange(4)]
    assert torch.equal(found, emoji.encode_prompts(texts)["prompt_embeds"])


class Walk(Policy):
    """A policy without a network."""

    device = torch.device("cpu")

    def distribution(self, observation):
        latents = observation["latents"]
        return GaussianTransition(0.99 * latents, latents.new_full((len(latents),), 0.1))

    def save(self, folder):
        raise NotImplementedError

    load_weights = load = save


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made within the block take at any moment."""

    def __init__(self):
        super().__init__()
        self.peak, self._alive = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return made


@pytest.mark.parametrize(
    ("num_batches", "keep", "dtype", "copies"),
    [
        *((num_batches, "steps", None, 1.2) for num_batches in (1, 4)),
        *((num_batches, "steps", torch.bfloat16, 0.7) for num_batches in (1, 4)),
        (4, "ends", None, 0.1),
    ],
)
def test_a_rollout_takes_little_more_memory_than_its_latents(
    emoji, make_env, monkeypatch, num_batches, keep, dtype, copies
):
    """One copy is all latents in float32; beside what is kept there are the tensors of one step of one batch."""
    monkeypatch.setattr(emoji, "decode", lambda latents: latents.new_zeros(len(latents), 3, 8, 8))
    env, storage = make_env(num_steps=100, prompts=["a cat"]), Storage(dtype=dtype)
    collect(env, Walk(seed=0))  # what is cached is not counted
    with PeakMemory() as memory:
        seeds = list(range(num_batches))
        rollout = collect(env, Walk(seed=0), seeds=seeds, max_images=0, keep=keep, storage=storage)
    assert memory.peak < copies * 101 * rollout.ends.nbytes
    assert memory.peak > rollout.actions.nbytes


class LastRollout(BaseCallback):
    """Notes how many of the rollouts so far are alive where the next one begins."""

    def __init__(self):
        super().__init__()
        self.rollouts, self.alive = [], []

    def _on_training_start(self):
        train = self.model.train
        self.model.train = lambda rollout: self.rollouts.append(weakref.ref(rollout)) or train(rollout)

    def _on_rollout_start(self):
        self.alive.append(sum(rollout() is not None for rollout in self.rollouts))

    def _on_step(self):
        return True


@pytest.mark.parametrize("algorithm", [RLOO, RWR, DiffusionNFT])
@pytest.mark.filterwarnings("ignore:some prompts have one image")
def test_the_last_rollout_is_gone_before_the_next_is_collected(mixture, algorithm):
    """By reference counts alone: a cycle would keep it until the garbage collector comes."""
    env = gym.make_vec(
        "DenoisingMDP-v0", num_envs=4, num_steps=2, model=mixture, reward="brightness", autoreset_mode="DISABLED"
    )
    callback = LastRollout()
    gc.disable()
    try:
        algorithm(DenoisingPolicy(mixture, seed=0), env).learn(3 * 8, callback)
    finally:
        gc.enable()
    assert callback.alive == [0, 0, 0]
    assert len(callback.rollouts) == 3


# steps and lanes
def test_a_tape_grows():
    tape = Tape(torch.zeros(0, 2, dtype=torch.float16), 1, 3)
    for step in range(5):
        tape.write(step, slice(1, 3), torch.full((2, 2), float(step)))
    values = tape.read(5)
    assert values.shape == (5, 3, 2)
    assert values.dtype == torch.float16
    assert values[:, 1:].mean((1, 2)).tolist() == [0, 1, 2, 3, 4]
    assert (values[:, 0] == 0).all()


class Countdown:
    """What a builder asks of an environment whose lanes end after steps of their own, of a number not known before."""

    num_envs = 3
    device = torch.device("cpu")
    num_steps = max_steps = None
    autoreset_mode = AutoresetMode.DISABLED
    constant_keys = frozenset({"prompt_id"})
    large_keys = frozenset({"latents"})
    action_is_next_latents = False

    def __init__(self, lengths):
        self.lengths = np.array(lengths)

    def observed(self, step):
        return {"latents": torch.full((3, 2), float(step)), "prompt_id": torch.arange(3)[:, None]}

    def answer(self, step, pending):
        """Lane i earns 10·i + its length in its last step, and nothing else."""
        ended = self.lengths == step + 1
        earned = torch.from_numpy(np.where(ended, 10.0 * np.arange(3) + self.lengths, 0.0)).float()
        info = {"ended": self.lengths <= step + 1}
        if not ended.any():
            return earned, info
        info["images"] = earned.reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
        named = {"reward/r": earned, "reward_invalid": ended & (np.arange(3) == 1)}
        if not pending:
            return earned, info | named
        info["pending_rewards"] = Future()
        info["pending_rewards"].set_result((earned, named))
        return torch.zeros(3), info


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("resets", [[(1, 5, 2)], [(1, 1, 2), (6, 3, 4)]])
def test_episodes_of_unknown_lengths_are_written_down(resets, pending):
    """Whatever their lengths, and whether rewards come at once or later: as a list of lists would have them."""
    builder = RolloutBuilder(Countdown(resets[0]), len(resets), storage=Storage(), max_images=4)
    for lengths in resets:
        env = Countdown(lengths)
        builder.start(env.observed(0), {"prompt_id": np.arange(3)})
        step = 0
        while builder.active.any():
            scored = builder.active & (np.arange(3) != 2)
            builder.add(env.observed(step), torch.full((3, 1), step + 0.5), torch.full((3,), -float(step)), scored)
            builder.finish(*env.answer(step, pending))
            step += 1
        assert step == max(lengths)
    rollout = builder.build()
    lengths = np.concatenate(resets)
    assert rollout.lengths.tolist() == lengths.tolist()
    assert rollout.num_steps == lengths.max()
    lanes = np.tile(np.arange(3), len(resets))
    assert rollout.returns.tolist() == rollout.extras["reward/r"].tolist() == (10 * lanes + lengths).tolist()
    assert rollout.valid.tolist() == (lanes != 1).tolist()
    assert rollout.images[:, 0, 0, 0].tolist() == rollout.returns[:4].tolist()
    taken = np.arange(rollout.num_steps)[:, None] < lengths
    np.testing.assert_array_equal(rollout.scored, taken & (lanes == 0))
    steps, episodes = (torch.from_numpy(index) for index in np.nonzero(taken))
    assert torch.equal(rollout.observation(steps, episodes)["latents"][:, 0], steps.float())
    assert torch.equal(rollout.action(steps, episodes)[:, 0], steps + 0.5)
    np.testing.assert_array_equal(rollout.log_probs, np.where(rollout.scored, -np.arange(len(taken))[:, None], 0))


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_lanes_that_end_apart_must_rest(mixture, mode):
    env = gym.make_vec(
        "TimePredictionMDP-v0", num_envs=4, model=mixture, max_steps=9, reward="brightness", autoreset_mode=mode
    )
    policy = ContextFreeSchedule([0.5] * 9, initial_concentration=4.0, seed=0)
    rests = mode is AutoresetMode.DISABLED
    with nullcontext() if rests else pytest.raises(ValueError, match='make the environment with autoreset_mode="DIS'):
        rollout = collect(env, policy, seeds=[3])
    if rests:
        assert len(set(rollout.lengths.tolist())) > 1
        assert (rollout.scored.sum(0) == rollout.lengths).all()


def test_only_what_the_environment_calls_constant_is_kept_once(mixture):
    """The classes of keys are the environment's: none is known by its name."""
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, num_steps=2, model=mixture, reward="brightness")
    torch_env(env).constant_keys = frozenset({"prompt_id"})
    rollout = collect(env, DenoisingPolicy(mixture, seed=0), seeds=[0])
    assert set(rollout.constants) == {"prompt_id"}
    assert rollout.changing["prompt_embeds"].shape[:2] == (2, 2)


@pytest.mark.parametrize("keep", ["steps", "ends"])
def test_ends_are_each_episodes_own_last_actions(mixture, keep):
    env = gym.make_vec(
        "TimePredictionMDP-v0",
        num_envs=4,
        model=mixture,
        max_steps=9,
        reward="brightness",
        autoreset_mode=AutoresetMode.DISABLED,
    )
    policy = ContextFreeSchedule([0.5] * 9, initial_concentration=4.0, seed=0)
    whole, kept = (
        collect(env, policy, seeds=[3], generators=torch.Generator().manual_seed(0), keep=kind)
        for kind in ("steps", keep)
    )
    assert len(set(whole.lengths.tolist())) > 1
    last = torch.from_numpy(whole.lengths - 1)
    assert torch.equal(kept.ends, whole.actions[last, torch.arange(4)])
