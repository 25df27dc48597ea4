"""The value function: what it looks at, what it learns, and that a resumed run goes on with it."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DDPOIS, Critic, DenoisingPolicy, DiffusionNFT, PerPrompt, Rollouts, ValueNetwork
from agents.advantages import Rewards
from agents.experience.collection import collect
from agents.updates.distributed import Processes


def make_env(model, num_envs=16, **arguments):
    return gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, num_steps=3, model=model, **arguments)


def by_prompt(images, prompts, metadata):
    """A reward that the prompt alone decides, and by a lot."""
    return torch.tensor([5.0 if prompt == "north" else 1.0 for prompt in prompts])


def make(model, env=None, **arguments):
    env = make_env(model, reward=by_prompt, prompts=["north", "west"]) if env is None else env
    arguments = {
        "rollouts": Rollouts(samples=16),
        "batch_size": 16,
        "advantages": Critic(seed=1),
        "seed": 0,
    } | arguments
    return DDPOIS(DenoisingPolicy(model, seed=0), env, **arguments)


def perturbed(network):
    """Make a network's values depend on all that it looks at."""
    generator = torch.Generator().manual_seed(0)
    network.output.weight.data.normal_(generator=generator)
    return network


@pytest.mark.parametrize("observe_embeds", [True, False])
@pytest.mark.parametrize("name", ["DenoisingMDP-v0", "TimePredictionMDP-v0"])
def test_a_value_depends_on_picture_time_and_prompt(emoji, name, observe_embeds):
    env = gym.make_vec(name, num_envs=2, model=emoji, observe_embeds=observe_embeds)
    seen, _ = env.reset(seed=0, options={"prompt_id": [3, 3]})
    other, _ = env.reset(seed=5, options={"prompt_id": [4, 4]})
    network = perturbed(ValueNetwork(env.single_observation_space))
    picture = "features" if "features" in seen else "latents"
    prompt = [key for key in seen if key == ("prompt_embeds" if observe_embeds else "prompt_id")]
    for changed in ([picture], ["timestep"], prompt):
        moved = {key: other[key] if key in changed and key != "timestep" else seen[key] for key in seen}
        moved["timestep"] = seen["timestep"] - (300 if "timestep" in changed else 0)
        assert ((network(moved) - network(seen)).abs() > 1e-4).all(), changed
    assert network(seen).shape == (2,)


def test_leading_dimensions_are_free(emoji):
    env = make_env(emoji, num_envs=6)
    seen, _ = env.reset(seed=0)
    network = perturbed(ValueNetwork(env.single_observation_space))
    folded = {key: value.reshape(2, 3, *value.shape[1:]) for key, value in seen.items()}
    torch.testing.assert_close(network(folded), network(seen).reshape(2, 3))


def test_it_starts_at_zero_and_from_its_seed_alone(emoji):
    space = make_env(emoji, num_envs=1).single_observation_space
    torch.manual_seed(0)
    first = ValueNetwork(space, seed=3)
    torch.manual_seed(1)
    second, third = ValueNetwork(space, seed=3), ValueNetwork(space, seed=4)
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.hidden[0].weight, third.hidden[0].weight)
    seen, _ = make_env(emoji, num_envs=2).reset(seed=0)
    assert (first(seen) == 0).all()


def rollout_of(env, policy, seed=0):
    rollout = collect(env, policy, seeds=[seed])
    return rollout, Rewards(rollout.returns, rollout.valid, rollout.prompt_id, env.unwrapped.prompts.texts, 1, rollout)


def test_the_first_advantages_are_normalised_rewards(mixture):
    env = make_env(mixture, reward="brightness")
    rollout, rewards = rollout_of(env, DenoisingPolicy(mixture, seed=0))
    part = Critic(clip=None)
    advantages = part.of(rewards, part.memory(env.single_observation_space, env.unwrapped.device))
    scored = torch.from_numpy(rollout.scored)
    assert not scored.all()  # the step to the clean end has no density
    expected = (rollout.returns - rollout.returns.mean()) / rollout.returns.std(correction=0)
    torch.testing.assert_close(advantages, torch.where(scored, expected, 0.0), rtol=1e-4, atol=1e-4)
    assert part.of(rewards, part.memory(env.single_observation_space, env.unwrapped.device)).abs().max() <= 5


def test_it_learns_what_is_to_be_expected_and_says_it_before_it_sees_it(mixture):
    """What the prompt decides is no merit of an action: the values explain it after some rollouts."""
    env = make_env(mixture, reward=by_prompt, prompts=["north", "west"])
    policy = DenoisingPolicy(mixture, seed=0)
    memory = Critic(n_epochs=20).memory(env.single_observation_space, env.unwrapped.device)
    errors = []
    for seed in range(6):
        rollout, rewards = rollout_of(env, policy, 100 * seed)
        values = memory.update(rewards.values, rollout)
        scored = torch.from_numpy(rollout.scored)
        errors.append(float((values - rollout.returns)[scored].square().mean()))
    assert errors[0] == pytest.approx(4, rel=0.3)  # the rewards' own variance: 1 and 5 about alike
    assert errors[-1] < 0.1 * errors[0]


def test_equal_rewards_teach_nothing(mixture):
    env = make_env(mixture, reward=lambda images, prompts, metadata: torch.full((len(images),), 2.5))
    _, rewards = rollout_of(env, DenoisingPolicy(mixture, seed=0))
    part = Critic()
    memory = part.memory(env.single_observation_space, env.unwrapped.device)
    assert (part.of(rewards, memory) == 0).all()
    assert float(memory.network.output.weight.detach().abs().max()) < 1e-3


def test_an_episode_without_a_reward_counts_for_nothing(mixture):
    def sometimes(images, prompts, metadata):
        return torch.tensor([float("nan"), *range(len(images) - 1)])

    env = make_env(mixture, reward=sometimes, on_invalid_reward="nan")
    learner = make(mixture, env)
    learner.learn(2 * 16 * 3, log_interval=0)
    rollout, rewards = rollout_of(env, learner.policy)
    assert not rollout.valid.all()
    advantages = learner.advantages.of(rewards, learner._memory)
    assert torch.isfinite(advantages).all()
    assert (advantages[:, ~rollout.valid] == 0).all()


def test_a_resumed_run_goes_on_with_its_critic_bit_for_bit(mixture, tmp_path):
    whole = make(mixture)
    whole.learn(4 * 16 * 3, log_interval=0)
    half = make(mixture)
    half.learn(2 * 16 * 3, log_interval=0)
    half.save(tmp_path / "run")
    resumed = DDPOIS.load(tmp_path / "run", half.env)
    assert resumed.advantages == Critic(seed=1)
    resumed.learn(2 * 16 * 3, reset_num_timesteps=False, log_interval=0)
    for module in (lambda run: run.policy, lambda run: run._memory.network):
        for one, two in zip(module(whole).parameters(), module(resumed).parameters(), strict=True):
            assert torch.equal(one, two)


def test_an_iteration_that_is_interrupted_is_taken_back(mixture, monkeypatch):
    learner = make(mixture)
    learner.learn(16 * 3, log_interval=0)
    before = learner.tensors(), learner.state()

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(learner.updates, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learner.learn(16 * 3, reset_num_timesteps=False, log_interval=0)
    assert learner.state() == before[1]
    assert all(torch.equal(value, before[0][name]) for name, value in learner.tensors().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width must be an integer of at least 1, got 0"),
        ({"n_epochs": 1.5}, "n_epochs must be .*, got 1.5"),
        ({"batch_size": 0}, "batch_size must be .*, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be .*, got -1.0"),
        ({"clip": 0}, "clip must be .*, got 0"),
        ({"seed": -1}, "seed must be .*, got -1"),
    ],
)
def test_wrong_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Critic(**arguments)


def test_what_is_no_space_of_ours_is_refused():
    with pytest.raises(TypeError, match=r"env\.single_observation_space with latents, timestep and prompt_id"):
        ValueNetwork(gym.spaces.Box(0, 1, (3,)))


def test_finished_images_have_no_states_to_judge(mixture):
    with pytest.raises(TypeError, match=r"PromptMeans\(\) or PerPrompt\(16\); got Critic\(\)"):
        DiffusionNFT(DenoisingPolicy(mixture), make_env(mixture), advantages=Critic())


class TwoProcesses(Processes):
    """Says that there are two, as far as a constructor asks."""

    def __init__(self):
        super().__init__()
        self.count = 2

    def from_main(self, value):
        return value

    def join(self, tensors):
        pass


def test_many_processes_are_refused(mixture, monkeypatch):
    monkeypatch.setattr("agents.training.algorithm.Processes", TwoProcesses)
    sizes = {"rollouts": Rollouts(samples=32), "batch_size": 32}
    with pytest.raises(ValueError, match="each of 2 processes would fit a critic of its own"):
        make(mixture, **sizes)
    make(mixture, **sizes, advantages=PerPrompt(4))


def test_values_are_of_all_lanes_and_steps(mixture):
    env = make_env(mixture, reward="brightness")
    rollout, rewards = rollout_of(env, DenoisingPolicy(mixture, seed=0))
    memory = Critic(batch_size=7).memory(env.single_observation_space, env.unwrapped.device)
    perturbed(memory.network)
    values = memory.update(rewards.values, rollout)
    assert ((values != 0).numpy() == rollout.scored).all()
    assert len(np.unique(values.numpy().round(6))) > rollout.scored.sum() // 2
