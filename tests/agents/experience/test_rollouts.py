import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from agents import DDPOIS, DenoisingPolicy, Policy, Replay, TimePredictor, collect, evaluate
from agents.experience.storage import Storage
from diffusion_gym.models import load_model
from diffusion_gym.transitions import GaussianTransition
from tests.tiny import make_tiny_stable_diffusion


def naive_rollout(env, policy, seed):
    """The same episodes by hand, everything written down."""
    observation, info = env.reset(seed=seed)
    seen, actions, log_probs = [], [], []
    while not info["ended"].all():
        with torch.no_grad():
            action, log_prob = policy.sample(observation, reduction="mean")
        seen.append(observation)
        actions.append(action)
        log_probs.append(log_prob)
        observation, reward, *_, info = env.step(action)
    return seen, actions, log_probs, reward


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_rollout_is_what_happened(emoji, make_env, mode):
    env = make_env(autoreset_mode=mode)
    seen, actions, log_probs, reward = naive_rollout(env, DenoisingPolicy(emoji, seed=1), seed=5)
    rollout = collect(env, DenoisingPolicy(emoji, seed=1), seeds=[5])
    assert (rollout.num_steps, rollout.num_episodes) == (3, 4)
    assert torch.equal(rollout.returns, reward)
    lanes = torch.arange(4)
    for step in range(3):
        steps = torch.full((4,), step)
        observation = rollout.observation(steps, lanes)
        assert set(observation) == set(seen[step])
        for key, value in seen[step].items():
            assert torch.equal(observation[key], value), key
        assert torch.equal(rollout.action(steps, lanes), actions[step])
        assert torch.equal(rollout.log_probs[step], log_probs[step])
    assert rollout.images.shape == (4, 3, 64, 64)
    torch.testing.assert_close(rollout.images, emoji.decode(rollout.actions[-1]), rtol=0, atol=1e-5)
    assert torch.equal(rollout.extras["reward/brightness"], rollout.returns)


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


@pytest.mark.parametrize(("num_batches", "keep", "copies"), [(1, "steps", 1.2), (4, "steps", 1.2), (4, "ends", 0.1)])
def test_a_rollout_takes_little_more_memory_than_its_latents(emoji, make_env, monkeypatch, num_batches, keep, copies):
    monkeypatch.setattr(emoji, "decode", lambda latents: latents.new_zeros(len(latents), 3, 8, 8))
    env = make_env(num_steps=100, prompts=["a cat"])
    collect(env, Walk(seed=0))  # what is cached is not counted
    with PeakMemory() as memory:
        rollout = collect(env, Walk(seed=0), seeds=list(range(num_batches)), max_images=0, keep=keep)
    assert memory.peak < copies * 101 * rollout.ends.nbytes
    assert memory.peak > rollout.actions.nbytes


def test_only_as_many_images_are_kept_as_are_wanted(emoji, make_env):
    rollout = collect(make_env(num_steps=1), DenoisingPolicy(emoji, seed=0), seeds=[0, 4, 8], max_images=6)
    everything = collect(make_env(num_steps=1), DenoisingPolicy(emoji, seed=0), seeds=[0, 4, 8], max_images=12)
    assert torch.equal(rollout.images, everything.images[:6])
    assert collect(make_env(num_steps=1), DenoisingPolicy(emoji), max_images=0).images.shape == (0, 3, 64, 64)


def test_a_rollout_of_ends_has_the_same_ends_and_rewards(emoji, make_env):
    whole, ends = (
        collect(make_env(), DenoisingPolicy(emoji, seed=0), seeds=[0, 4], keep=keep) for keep in ("steps", "ends")
    )
    for name in ("ends", "returns", "images"):
        assert torch.equal(getattr(ends, name), getattr(whole, name))
    assert (ends.changing, ends.actions.shape[0], ends.scored.any()) == ({}, 1, False)
    assert ends.lengths.tolist() == whole.lengths.tolist()
    one, other = (Replay.from_rollout(rollout) for rollout in (whole, ends))
    for (latents, constants), (expected, others) in [(one.inputs(torch.arange(8)), other.inputs(torch.arange(8)))]:
        assert torch.equal(latents, expected)
        assert all(torch.equal(constants[key], others[key]) for key in others)


def test_batches_lie_side_by_side(emoji, make_env):
    env = make_env()
    both = collect(env, DenoisingPolicy(emoji, seed=0), seeds=[3, 8])
    first = collect(env, DenoisingPolicy(emoji, seed=0), seeds=[3])
    assert both.num_episodes == 8
    assert both.actions.shape == (3, 8, 4, 16, 16)
    assert torch.equal(both.actions[:, :4], first.actions)
    assert both.lengths.tolist() == [3] * 8
    assert torch.equal(both.returns[:4], first.returns)
    assert not torch.equal(both.actions[:, 4:], first.actions)
    np.testing.assert_array_equal(both.prompt_id, both.constants["prompt_id"][:][:, 0].numpy())


def test_rollout_holds_no_graph(emoji, make_env):
    rollout = collect(make_env(), DenoisingPolicy(emoji, seed=0), seeds=[0])
    assert not any(t.requires_grad for t in (rollout.actions, rollout.log_probs, rollout.returns))


def test_deterministic_steps_are_marked_and_cost_no_density(tmp_path):
    import gymnasium as gym

    model = load_model(make_tiny_stable_diffusion(tmp_path / "clean"))  # set_alpha_to_one: ends at the clean end
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, num_steps=4, model=model, reward="brightness")
    rollout = collect(env, DenoisingPolicy(model, seed=0), seeds=[0])
    assert rollout.scored.tolist() == [[True] * 2] * 3 + [[False] * 2]
    assert (rollout.log_probs[-1] == 0).all()
    assert (rollout.log_probs[:-1] != 0).all()


def test_collection_can_be_stopped(emoji, make_env):
    calls = []
    stopped = collect(make_env(), DenoisingPolicy(emoji), after_step=lambda n: calls.append(n) or len(calls) < 2)
    assert stopped is None
    assert calls == [4, 4]


def test_other_environments_are_refused(emoji):
    import gymnasium as gym

    with pytest.raises(ValueError, match="torch vector environment"):
        collect(gym.make_vec("CartPole-v1", num_envs=2), DenoisingPolicy(emoji))


def test_evaluation_depends_on_the_seeds_alone(emoji, make_env):
    policy = DenoisingPolicy(emoji)
    prompts, seeds = ["a cat", "a dog", "a cow", "a bee"], [10, 11, 12, 13]
    four = evaluate(make_env(num_envs=4), policy, seeds=seeds, prompts=prompts)
    two = evaluate(make_env(num_envs=2), policy, seeds=seeds, prompts=prompts)
    np.testing.assert_allclose(four.rewards, two.rewards, atol=1e-4)
    torch.testing.assert_close(four.images, two.images, rtol=0, atol=2e-3)
    assert len(set(four.rewards.tolist())) == 4
    gain, error = two.gain_over(four)
    assert abs(gain) < 1e-4
    assert error < 1e-4
    assert four.mean == pytest.approx(four.rewards.mean())
    assert four.standard_error == pytest.approx(four.rewards.std(ddof=1) / 2)
    with pytest.raises(ValueError, match="multiple of num_envs=4"):
        evaluate(make_env(num_envs=4), policy, seeds=[1], prompts=["a cat"])
    with pytest.raises(ValueError, match="same seeds and prompts"):
        evaluate(make_env(num_envs=2), policy, seeds=[1, 2], prompts=["a cat"] * 2).gain_over(four)
    with pytest.raises(ValueError, match="same seeds and prompts"):
        evaluate(make_env(num_envs=4), policy, seeds=[10, 11, 12, 14], prompts=prompts).gain_over(four)


def test_evaluation_without_prompts_takes_the_environments_in_turn(emoji, make_env):
    env = make_env(num_envs=2)
    given = env.unwrapped.prompts
    assert evaluate(env, DenoisingPolicy(emoji), seeds=[0, len(given) + 1]).prompts == (given[0], given[1])


def test_evaluation_noise_is_not_the_initial_noise(emoji, make_env):
    """The policy's draws and x_T come from streams of their own."""
    env = make_env(num_envs=1, num_steps=20)
    start = env.reset(seed=10)[0]["latents"].flatten()
    from agents.experience.seeding import derived_generator

    noise = torch.randn(1, 4, 16, 16, generator=derived_generator(10)).flatten()
    for shift in range(-3, 4):
        assert abs(float(torch.corrcoef(torch.stack([start, noise.roll(shift)]))[0, 1])) < 0.15


# ---------------------------------------------------------------------- storage
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rounded_rollout_holds_what_was_seen_and_scored(emoji, make_env, monkeypatch, dtype):
    """The policy's log-probs of what is stored are those that it acted with, to the last bit."""
    env = make_env()
    policy = DenoisingPolicy(emoji, seed=0)
    seen = []
    sample = policy.distribution
    monkeypatch.setattr(policy, "distribution", lambda observation: seen.append(observation) or sample(observation))
    rollout = collect(env, policy, seeds=[0], reduction="mean", storage=Storage(dtype=dtype))
    assert rollout.actions.dtype == rollout.changing["latents"].dtype == dtype
    assert rollout.ends.dtype == torch.float32
    lanes = torch.arange(4)
    for step in range(3):
        steps = torch.full((4,), step)
        observation = rollout.observation(steps, lanes)
        assert observation.keys() == seen[step].keys()
        assert all(torch.equal(observation[key], seen[step][key]) for key in observation)
        log_prob = policy.log_prob(observation, rollout.action(steps, lanes), "mean")
        if rollout.scored[step, 0]:
            assert torch.equal(log_prob, rollout.log_probs[step])
    assert not torch.equal(collect(env, policy, seeds=[0]).ends, rollout.ends)


def test_features_are_rounded_and_times_are_not(emoji):
    env = gym.make_vec(
        "TimePredictionMDP-v0", num_envs=2, model=emoji, max_steps=3, reward="brightness", autoreset_mode="DISABLED"
    )
    policy = TimePredictor(env.unwrapped.single_observation_space, seed=0)
    rollout = collect(env, policy, seeds=[0], storage=Storage(dtype=torch.bfloat16))
    dtypes = {key: rollout.changing[key].dtype for key in ("latents", "features", "timestep")}
    assert dtypes == {"latents": torch.bfloat16, "features": torch.bfloat16, "timestep": torch.float32}
    assert rollout.actions.dtype == torch.float32
    steps, lanes = torch.zeros(2, dtype=torch.long), torch.arange(2)
    log_prob = policy.log_prob(rollout.observation(steps, lanes), rollout.action(steps, lanes))
    torch.testing.assert_close(log_prob, rollout.log_probs[0], rtol=0, atol=1e-6)


def test_a_training_from_the_host_is_the_same(emoji, make_env):
    """Here the policy is on the host as well: that nothing else changes is all that can be seen."""
    weights = []
    for device in (None, "cpu"):
        policy = DenoisingPolicy(emoji, use_lora=True, seed=0)
        learner = DDPOIS(policy, make_env(), samples_per_epoch=4, batch_size=4, rollout_device=device, seed=0)
        learner.learn(12, log_interval=0)
        weights.append([p.detach().clone() for p in policy.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_a_device_that_is_not_there_is_named(emoji, make_env):
    storage = Storage(torch.device("cuda:99"))
    with pytest.raises(ValueError, match=r"device 'cuda:99' cannot be used here \(.*\): \"cpu\" always can"):
        collect(make_env(), DenoisingPolicy(emoji, use_lora=True), storage=storage)


def test_rounding_what_is_rounded_already_is_refused(emoji, make_env):
    env = make_env(dtype="bfloat16", model="emoji")
    sizes = {"samples_per_epoch": 4, "batch_size": 4}
    with pytest.raises(ValueError, match=r"cannot be stored in torch\.float16: the environment's latents are"):
        DDPOIS(DenoisingPolicy(env.unwrapped.model, seed=0), env, rollout_dtype="float16", **sizes)
    with pytest.raises(ValueError, match=r"rollout_dtype must be one of .*got 'float64'"):
        DDPOIS(DenoisingPolicy(emoji, use_lora=True), make_env(), rollout_dtype="float64", **sizes)
