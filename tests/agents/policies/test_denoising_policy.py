import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from agents import DDPOSF, Batch, DenoisingPolicy, Full, LoRA, Only, Rollouts, collect
from agents.policies import denoising
from diffusion_gym.models import load_model
from diffusion_gym.samplers import CPS, DDIM, Consistency, FlowSDE, Windowed
from diffusion_gym.transitions import transition
from tests.tiny import EMOJI, make_tiny_stable_diffusion

BOTH = pytest.mark.parametrize("adaptation", [Full(), LoRA()], ids=["full", "lora"])


def batch(env, seed=0):
    return env.reset(seed=seed)[0]


def perturb(policy, scale=1e-3):
    """Stand in for training: move every trainable weight."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.mark.parametrize("sampler", [DDIM(0.7), DDIM(1.0), CPS(0.7), Consistency()], ids=repr)
def test_untrained_policy_is_the_sampler_of_the_models_own_predictions(emoji, make_env, sampler):
    observation = batch(make_env())
    policy = DenoisingPolicy(emoji, sampler=sampler)
    t, s = observation["timestep"][:, 0], observation["next_timestep"][:, 0]
    with torch.no_grad():
        prediction = emoji.denoise(observation["latents"], t, emoji_conditioning(observation), guidance_scale=4.0)
        ours = policy.distribution(observation)
    expected = transition(prediction.x0, prediction.epsilon, sampler.scales(emoji.schedule, t, s))
    assert torch.equal(ours.mean, expected.mean)
    assert torch.equal(ours.std, expected.std)


def emoji_conditioning(observation):
    return {key: value for key, value in observation.items() if key.endswith("embeds")}


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_ratio_is_one_before_the_first_update(precision, dtype, adaptation):
    import gymnasium as gym

    env = gym.make_vec("diffusion_gym:DenoisingMDP-v0", num_envs=4, num_steps=4, reward="brightness", dtype=dtype)
    policy = DenoisingPolicy(env.unwrapped.model, precision=precision, adaptation=adaptation, seed=0)
    rollout = collect(env, policy, seeds=[0], reduction="mean")
    assert rollout.actions.dtype == getattr(torch, dtype)
    assert rollout.log_probs.dtype == torch.float32
    assert rollout.scored.all()
    lanes = torch.arange(4)
    for step in range(4):
        steps = torch.full((4,), step)
        log_prob = policy.log_prob(rollout.observation(steps, lanes), rollout.action(steps, lanes), reduction="mean")
        assert torch.equal(log_prob.detach(), rollout.log_probs[step])
    # in other batches, and with times mixed, it is at most 1e-5 in full precision
    if precision is None and dtype == "float32":
        steps, lanes = torch.tensor([3, 0, 2]), torch.tensor([1, 2, 0])
        log_prob = policy.log_prob(rollout.observation(steps, lanes), rollout.action(steps, lanes), reduction="mean")
        assert (log_prob.detach() - rollout.log_probs[steps, lanes]).abs().max() < 1e-5


def test_rounding_comes_before_scoring(make_env):
    """The stored action has the stored log-prob: scored unrounded, the last step would be off by far more."""
    env = make_env(model=load_model("emoji", dtype="bfloat16"), num_steps=20)
    policy = DenoisingPolicy(env.unwrapped.model, precision="bf16", seed=0)
    observation, _ = env.reset(seed=0)
    observation["timestep"][:], observation["next_timestep"][:] = 1.0, 0.0
    action, log_prob = policy.sample(observation, reduction="mean")
    assert action.dtype == torch.bfloat16
    assert torch.equal(log_prob, policy.log_prob(observation, action, reduction="mean"))


def test_log_prob_is_the_sum_unless_asked_for_the_mean(emoji, make_env):
    observation = batch(make_env())
    policy = DenoisingPolicy(emoji, seed=0)
    with torch.no_grad():
        action, log_prob = policy.sample(observation)
        torch.testing.assert_close(policy.log_prob(observation, action, "mean") * 1024, log_prob)


def test_dropout_is_off_at_all_times(emoji):
    policy = DenoisingPolicy(emoji)
    policy.train()
    assert not any(module.training for module in policy.modules())


@BOTH
def test_two_policies_and_the_model_never_see_each_others_updates(emoji, make_env, adaptation):
    observation = batch(make_env())
    one, other = (DenoisingPolicy(emoji, adaptation=adaptation, seed=0) for _ in range(2))
    with torch.no_grad():
        before = other.distribution(observation).mean
        frozen = emoji.denoise(
            observation["latents"], observation["timestep"][:, 0], emoji_conditioning(observation), guidance_scale=4.0
        ).x0
        assert torch.equal(one.distribution(observation).mean, before)
        perturb(one, 0.02)
        assert not torch.equal(one.distribution(observation).mean, before)
        assert torch.equal(other.distribution(observation).mean, before)
        again = emoji.denoise(
            observation["latents"], observation["timestep"][:, 0], emoji_conditioning(observation), guidance_scale=4.0
        ).x0
    assert torch.equal(again, frozen)


def test_lora_trains_few_weights_over_shared_frozen_ones(emoji):
    policy = DenoisingPolicy(emoji, adaptation=LoRA(rank=4))
    trainable = [p for p in policy.parameters() if p.requires_grad]
    frozen = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
    assert sum(p.numel() for p in trainable) < 0.02 * sum(p.numel() for p in emoji.denoiser.parameters())
    assert frozen == {p.data_ptr() for p in emoji.denoiser.parameters()}
    assert not hasattr(emoji.denoiser, "peft_config")
    assert all(p.dtype == torch.float32 for p in trainable)


def test_half_precision_model_is_trained_in_float32():
    model = load_model("emoji", dtype="bfloat16")
    policy = DenoisingPolicy(model, precision="bf16")
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.bfloat16}


def test_gradient_reaches_every_weight(emoji, make_env):
    policy = DenoisingPolicy(emoji)
    policy.log_prob(batch(make_env(num_envs=2)), torch.zeros(2, 4, 16, 16), "mean").sum().backward()
    without = [n for n, p in policy.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_generators_decide_the_draw_lane_by_lane(emoji, make_env):
    observation = batch(make_env())
    policy = DenoisingPolicy(emoji)

    def draw(seeds, part=slice(None)):
        observed = {key: value[part] for key, value in observation.items()}
        return policy.act(observed, generators=[torch.Generator().manual_seed(seed) for seed in seeds])

    whole = draw([1, 2, 3, 4])
    assert torch.equal(whole, draw([1, 2, 3, 4]))
    torch.testing.assert_close(whole[1:3], draw([2, 3], slice(1, 3)), rtol=0, atol=1e-4)
    assert not torch.equal(draw([5, 2, 3, 4])[0], whole[0])
    assert torch.equal(draw([5, 2, 3, 4])[1:], whole[1:])


def test_deterministic_action_is_the_mean_and_eta_zero_has_no_density(emoji, make_env):
    observation = batch(make_env())
    policy = DenoisingPolicy(emoji)
    with torch.no_grad():
        assert torch.equal(policy.act(observation, deterministic=True), policy.distribution(observation).mean)
    silent = DenoisingPolicy(emoji, sampler=DDIM(0.0))
    silent.act(observation)
    with pytest.raises(ValueError, match="eta > 0"):
        silent.log_prob(observation, observation["latents"])


def test_scored_marks_the_steps_that_have_a_density(emoji, tmp_path):
    clean = load_model(make_tiny_stable_diffusion(tmp_path / "clean", set_alpha_to_one=True))
    policy = DenoisingPolicy(clean)
    info = {"timestep": [750.0, 0.0, 0.0], "next_timestep": [500.0, 0.0, -1.0]}
    assert policy.scored(info).tolist() == [True, False, False]
    assert DenoisingPolicy(emoji).scored({"timestep": [1.0], "next_timestep": [0.0]}).tolist() == [True]
    assert not DenoisingPolicy(clean, sampler=DDIM(0.0)).scored(info).any()


def test_embeddings_are_looked_up_where_they_are_not_observed(emoji, make_env):
    with_embeds, without = make_env(), make_env(observe_embeds=False)
    policy = DenoisingPolicy(emoji, prompts=without.unwrapped.prompts)
    with torch.no_grad():
        expected = policy.distribution(batch(with_embeds)).mean
        assert torch.equal(policy.distribution(batch(without)).mean, expected)
        with pytest.raises(ValueError, match="observe_embeds=True"):
            DenoisingPolicy(emoji).distribution(batch(without))


class Made(TorchDispatchMode):
    """Counts the bytes of the results of operations in this context."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.is_mutable:
            self.num_bytes += result.nbytes
        return result


def test_looking_prompts_up_takes_no_more_memory_with_more_of_them(emoji):
    observation = {"latents": torch.zeros(2, *emoji.latent_shape), "prompt_id": torch.tensor([[1], [-1]])}
    made = {}
    for number in (2, 20):
        policy = DenoisingPolicy(emoji, prompts=[f"a cat {index}" for index in range(number)])
        policy._conditioning(observation)
        with Made() as made[number]:
            conditioning = policy._conditioning(observation)
    embeddings = sum(value.nbytes for value in conditioning.values())
    assert embeddings <= made[2].num_bytes == made[20].num_bytes < 1.1 * embeddings
    assert [bool(row.isnan().all()) for row in conditioning["prompt_embeds"]] == [False, True]


def test_noised_latents_are_predicted_with_the_guidance_that_is_asked_for(emoji, make_env):
    observation = batch(make_env(num_envs=2))
    conditioning = emoji_conditioning(observation)
    clean, noise = observation["latents"], observation["latents"].flip(0)
    t = torch.tensor([100.0, 900.0])
    alpha, sigma = (level(t)[:, None, None, None] for level in (emoji.schedule.alpha, emoji.schedule.sigma))
    policy = DenoisingPolicy(emoji, guidance_scale=3.0)
    for asked, scale in ((None, 3.0), (1.0, 1.0), (2.0, 2.0)):
        with torch.no_grad():
            found = policy.predict_noised(clean, t, noise, observation, guidance_scale=asked)
            expected = emoji.denoise(alpha * clean + sigma * noise, t, conditioning, guidance_scale=scale)
        assert torch.equal(found.x0, expected.x0)
        assert torch.equal(found.epsilon, expected.epsilon)


def test_the_distribution_is_the_same_with_and_without_gradients(emoji, make_env):
    observation = batch(make_env(num_envs=2))
    policy = DenoisingPolicy(emoji)
    with torch.no_grad():
        without = policy.distribution(observation).mean
    assert torch.equal(policy.distribution(observation).mean, without)


def test_a_windowed_policy_is_a_view_with_the_same_bits_inside(emoji, make_env):
    observation = batch(make_env())
    times = torch.tensor([[900.0], [700.0], [500.0], [300.0]])
    observation |= {"timestep": times, "next_timestep": times - 100}
    policy = DenoisingPolicy(emoji, sampler=DDIM(0.7), seed=0)
    view = policy.windowed(700.0, 300.0)
    assert view.sampler == Windowed(DDIM(0.7), 700.0, 300.0)
    assert policy.sampler == DDIM(0.7)
    assert view.denoiser is policy.denoiser
    assert view.generator is policy.generator
    with torch.no_grad():
        plain, windowed = policy.distribution(observation), view.distribution(observation)
    assert torch.equal(windowed.mean[1:3], plain.mean[1:3])
    assert torch.equal(windowed.std[1:3], plain.std[1:3])
    assert windowed.std[[0, 3]].tolist() == [0.0, 0.0]
    info = {"timestep": times[:, 0], "next_timestep": times[:, 0] - 100}
    assert view.scored(info).tolist() == [False, True, True, False]
    sensitivity = view.sensitivity(times[:, 0], times[:, 0] - 100)
    assert sensitivity.isinf().tolist() == [True, False, False, True]
    assert view.reference().sampler == view.sampler


@pytest.mark.parametrize("sampler", [DDIM(0.3), DDIM(1.0), CPS(0.5), Consistency()], ids=repr)
def test_sensitivity_is_how_far_the_mean_moves_with_the_output(emoji, sampler):
    """Against two predictions of noise that are 1 apart: emoji's denoiser predicts ε."""
    policy = DenoisingPolicy(emoji, sampler=sampler)
    times = emoji.schedule.timesteps(10)
    t, s = times[:-1], times[1:]
    alpha, sigma = emoji.schedule.alpha(t), emoji.schedule.sigma(t)
    low, high = (
        transition(
            ((1 - sigma * noise) / alpha)[:, None],
            torch.full((10, 1), noise, dtype=t.dtype),
            sampler.scales(emoji.schedule, t, s),
        )
        for noise in (0.0, 1.0)
    )
    moved = (high.mean - low.mean)[:, 0].abs() / low.std
    torch.testing.assert_close(policy.sensitivity(t, s), moved, rtol=1e-9, atol=0)


def test_a_denoising_policy_answers_for_itself(emoji):
    policy = DenoisingPolicy(emoji)
    assert policy.moves_latents
    assert policy.reference_is_free
    assert policy.model is emoji
    assert policy.max_steps is None


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_is_the_untrained_policy_and_free(make_env, adaptation, dtype):
    model = load_model("emoji", dtype=dtype)
    observation = batch(make_env(model=model, num_envs=2))
    policy = DenoisingPolicy(model, adaptation=adaptation, seed=0)
    with torch.no_grad():
        before = policy.distribution(observation).mean
        perturb(policy)
        reference = policy.reference()
        assert torch.equal(reference.distribution(observation).mean, before)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    shared = {p.data_ptr() for p in reference.parameters()} == {p.data_ptr() for p in model.denoiser.parameters()}
    assert shared is (dtype == "float32" or adaptation == LoRA())


# Files.


@pytest.mark.parametrize("adaptation", [Full(), LoRA(rank=2, alpha=8.0), Only("bias", "norm")], ids=repr)
def test_saved_policy_comes_back_the_same(emoji, make_env, tmp_path, adaptation):
    observation = batch(make_env())
    policy = DenoisingPolicy(emoji, sampler=CPS(0.5), adaptation=adaptation, guidance_scale=3.0, seed=0)
    perturb(policy)
    policy.save(tmp_path / "p")
    for model in (emoji, None):
        again = DenoisingPolicy.load(tmp_path / "p", model=model)
        assert (again.sampler, again.adaptation) == (CPS(0.5), policy.adaptation)
        assert again.guidance_scale == 3.0
        with torch.no_grad():
            assert torch.equal(again.distribution(observation).mean, policy.distribution(observation).mean)
    with pytest.raises(FileNotFoundError, match="is not a saved policy"):
        DenoisingPolicy.load(tmp_path)


def test_a_saved_policy_keeps_the_precision_of_the_text_encoder(tmp_path):
    model = load_model(make_tiny_stable_diffusion(tmp_path / "model"), text_encoder_dtype="bfloat16")
    DenoisingPolicy(model, adaptation=LoRA(rank=1)).save(tmp_path / "policy")
    assert DenoisingPolicy.load(tmp_path / "policy").model.text_encoder_dtype == torch.bfloat16


def test_weights_of_another_adaptation_are_refused(emoji, tmp_path):
    DenoisingPolicy(emoji, adaptation=LoRA(alpha=16)).save(tmp_path)
    for other in (LoRA(alpha=4), LoRA(alpha=16, targets=["to_q"]), LoRA(rank=2, alpha=16), Full(), Only("bias")):
        with pytest.raises(ValueError, match=r"was saved with adaptation=LoRA\(alpha=16\.0, .* this policy has "):
            DenoisingPolicy(emoji, adaptation=other).load_weights(tmp_path)
    DenoisingPolicy(emoji, adaptation=LoRA(4, 16, emoji.lora_targets)).load_weights(tmp_path)
    DenoisingPolicy(emoji).save(tmp_path)
    with pytest.raises(ValueError, match=r"was saved with adaptation=Full\(\), this policy has LoRA"):
        DenoisingPolicy(emoji, adaptation=LoRA()).load_weights(tmp_path)
    DenoisingPolicy(emoji, adaptation=Only("bias")).load_weights(tmp_path)  # it is a whole network too


@BOTH
def test_trained_weights_open_in_a_plain_pipeline_and_draw_the_policys_images(emoji, make_env, tmp_path, adaptation):
    is_lora = isinstance(adaptation, LoRA)
    policy = DenoisingPolicy(emoji, sampler=DDIM(0.0), adaptation=LoRA(alpha=8) if is_lora else adaptation, seed=0)
    perturb(policy, 0.03 if is_lora else 1e-3)
    policy.save(tmp_path)
    if is_lora:
        pipeline = StableDiffusionPipeline.from_pretrained(EMOJI)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft and diffusers talk about missing text-encoder layers
            pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(
            EMOJI, unet=UNet2DConditionModel.from_pretrained(tmp_path / "unet")
        )
    pipeline.set_progress_bar_config(disable=True)

    env = make_env(num_envs=2, num_steps=4, autoreset_mode="DISABLED")
    prompts = ["a cat", "a fox"]
    observation, info = env.reset(seed=0, options={"prompt": prompts})
    start = observation["latents"]
    while not info["ended"].all():
        observation, *_, info = env.step(policy.act(observation))
    arguments = {"num_inference_steps": 4, "guidance_scale": 4.0, "eta": 0.0, "latents": start, "output_type": "pt"}
    images = pipeline(prompts, **arguments).images
    torch.testing.assert_close(images, info["images"], rtol=0, atol=5e-4)
    base = StableDiffusionPipeline.from_pretrained(EMOJI)
    base.set_progress_bar_config(disable=True)
    assert (base(prompts, **arguments).images - images).abs().mean() > 0.01


def test_only_the_weights_that_are_named_are_trained_and_saved_with_the_rest(emoji, make_env, tmp_path):
    named = ("bias", "time_emb")
    policy = DenoisingPolicy(emoji, adaptation=Only(*named), seed=0)
    names = {name: parameter.requires_grad for name, parameter in policy.denoiser.named_parameters()}
    assert {any(part in name for part in named) is trained for name, trained in names.items()} == {True}
    assert 0 < sum(names.values()) < len(names)
    before = {name: parameter.detach().clone() for name, parameter in policy.denoiser.named_parameters()}
    parts = {"rollouts": Rollouts(4), "advantages": Batch()}
    DDPOSF(policy, make_env(), learning_rate=1e-3, seed=0, **parts).learn(12, log_interval=0)
    moved = {name: not torch.equal(before[name], p) for name, p in policy.denoiser.named_parameters()}
    assert moved == names
    policy.save(tmp_path)
    again = DenoisingPolicy.load(tmp_path, emoji)
    assert again.adaptation == Only(*named)
    assert all(torch.equal(one, other) for one, other in zip(policy.parameters(), again.parameters(), strict=True))


def test_names_that_no_weight_has_leave_nothing_to_train(emoji, make_env):
    with pytest.raises(ValueError, match="nothing to train"):
        DDPOSF(DenoisingPolicy(emoji, adaptation=Only("attention_of_another_model")), make_env())


# Arguments.


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sampler": 1.0}, TypeError, r"sampler must be a Sampler, such as DDIM\(eta=1\.0\); got 1\.0"),
        ({"sampler": DDIM}, TypeError, "sampler must be a Sampler"),
        ({"sampler": FlowSDE()}, ValueError, "FlowSDE is a sampler of rectified flows, got a DiscreteVPSchedule"),
        ({"adaptation": "lora"}, TypeError, r"adaptation must be an Adaptation, such as LoRA\(rank=4\); got 'lora'"),
        ({"adaptation": LoRA}, TypeError, "adaptation must be an Adaptation"),
        ({"precision": "fp8"}, ValueError, r"precision must be None, 'auto' or one of \('fp16', 'bf16'\), got 'fp8'"),
        ({"prompts": "a cat"}, TypeError, "prompts must be a sequence of texts"),
        ({"negative_prompt": "a cat"}, ValueError, "has no effect: it needs prompts"),
        ({"guidance_scale": float("inf")}, ValueError, "guidance_scale must be a finite number"),
        ({"guidance_scale": -1.0}, ValueError, "guidance_scale must be a finite number"),
    ],
)
def test_arguments_out_of_range_are_said_at_once(emoji, settings, error, message):
    with pytest.raises(error, match=message):
        DenoisingPolicy(emoji, **settings)


def test_a_model_by_its_name_is_no_model():
    with pytest.raises(TypeError, match=r"model must be a DiffusionModel, such as env\.unwrapped\.model; got str"):
        DenoisingPolicy("emoji")


def test_precisions_that_do_not_mix_are_said_at_once():
    model = load_model("emoji", dtype="float16")
    with pytest.raises(ValueError, match=r"precision='bf16' does not go with a model in torch\.float16"):
        DenoisingPolicy(model, precision="bf16")


@pytest.mark.parametrize(
    ("fast", "dtype", "precision"), [(True, "float32", "bf16"), (True, "float16", None), (False, "float32", None)]
)
def test_auto_is_bf16_where_the_device_has_it(monkeypatch, fast, dtype, precision):
    monkeypatch.setattr(denoising, "has_fast_bf16", lambda device: fast)
    assert DenoisingPolicy(load_model("mixture", dtype=dtype), precision="auto").precision == precision


def test_an_observation_of_a_single_environment_is_named(emoji):
    import gymnasium as gym

    policy = DenoisingPolicy(emoji, seed=0)
    observation, _ = gym.make("DenoisingMDP-v0", model=emoji, num_steps=2).reset(seed=0)
    with pytest.raises(TypeError, match=r"must be of torch tensors .* an algorithm's predict takes such ones too"):
        policy.act(observation)
    with pytest.raises(ValueError, match=r"must be of a batch, latents of 4 dimensions"):
        policy.act({key: torch.as_tensor(value) for key, value in observation.items()})
    assert policy.act({key: torch.as_tensor(value)[None] for key, value in observation.items()}).shape[0] == 1


def test_prompts_that_are_looked_up_in_another_order_are_refused(emoji):
    import gymnasium as gym

    texts = ["a cat", "a dog"]
    arguments = {"model": emoji, "num_steps": 1, "prompts": texts, "observe_embeds": False, "reward": "brightness"}
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, **arguments)
    seen = gym.make_vec("DenoisingMDP-v0", num_envs=2, **{**arguments, "observe_embeds": True})
    for prompts in (texts[::-1], []):
        policy = DenoisingPolicy(emoji, prompts=prompts)
        with pytest.raises(ValueError, match="the policy's prompts are not those that the environment counts"):
            collect(env, policy)
        collect(seen, policy)  # it observes the embeddings, and looks nothing up
    policy = DenoisingPolicy(emoji, prompts=texts)
    collect(env, policy)
    observation, _ = env.reset(seed=0)
    outside = observation | {"prompt_id": torch.full((2, 1), -1)}
    assert policy.act(outside).isnan().all()  # rather than the last prompt's


def test_a_policy_on_another_device_than_the_environment_is_named(emoji, monkeypatch):
    import gymnasium as gym

    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, model=emoji, num_steps=1)
    policy = DenoisingPolicy(emoji)
    policy.device = torch.device("cuda:1")
    with pytest.raises(ValueError, match="the policy is on cuda:1, the environment on cpu"):
        collect(env, policy)
