"""The learners find the exact function, resume bit for bit, and save what diffusers opens."""

import pytest
import torch
from diffusers import ConsistencyModelPipeline, LatentConsistencyModelPipeline
from stable_baselines3.common.callbacks import ConvertCallback

from agents import AdamW, Checkpoints, LoRA, Only
from agents.consistency import (
    L2,
    Averaged,
    ConsistencyDistillation,
    ConsistencyTraining,
    DrawnGuidance,
    Euler,
    EveryIndex,
    FixedGuidance,
    GrowingLevels,
    InverseGap,
    KarrasLevels,
    Latents,
    PseudoHuber,
    Trajectories,
    TrajectoryRegression,
    easy,
    improved,
)
from agents.training.learner import Cosine
from diffusion_gym.models import load_model
from tests.tiny import make_tiny_consistency_model

DISTILLED = {"metric": PseudoHuber(0.03), "weighting": InverseGap()}
QUICK = {
    "CD, Heun": (ConsistencyDistillation, DISTILLED, 0.1),
    "CD, Euler": (ConsistencyDistillation, {"solver": Euler(), "metric": L2()}, 0.15),
    "CT": (ConsistencyTraining, {"discretisation": GrowingLevels(2, 12), "metric": L2()}, 0.6),
    "iCT": (ConsistencyTraining, improved(last=40), 0.25),
    "ECT": (ConsistencyTraining, easy(), 0.25),
}
# The errors of f = E[x_0|x_t] and of f = 0 on the mixture are 1.3 and 2.
LONG = {
    "CD, Heun": (ConsistencyDistillation, DISTILLED, 5e-3, 4000, 0.1),
    "CD, Euler": (ConsistencyDistillation, {**DISTILLED, "solver": Euler()}, 5e-3, 4000, 0.25),
    "CT": (ConsistencyTraining, {"discretisation": GrowingLevels(2, 40), "metric": L2()}, 2e-3, 12_000, 0.5),
    "iCT": (ConsistencyTraining, improved(last=160), 5e-3, 4000, 0.25),
    "ECT": (ConsistencyTraining, easy(), 5e-3, 4000, 0.25),
}


@pytest.mark.parametrize("name", QUICK)
def test_the_closed_form_of_a_gaussian_is_found(gaussian, name):
    kind, settings, bound = QUICK[name]
    run = gaussian.learner(kind, learning_rate=Cosine(2e-3, 0.01), **settings)
    before = gaussian.error(run)
    run.learn(256 * 600, log_interval=0)
    assert gaussian.error(run) < bound < before / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_the_exact_function_of_the_mixture_is_found(circle, name):
    kind, settings, rate, updates, bound = LONG[name]
    run = circle.learner(kind, learning_rate=Cosine(rate, 0.01), **settings)
    run.learn(256 * updates, log_interval=0)
    assert circle.error(run) < bound


def weights(run):
    return [parameter.detach().clone() for parameter in run.trained_of(run.network)]


def latent_learner(latent, **settings):
    fixed = {"batch_size": 4, "seed": 3, "precision": None, "learning_rate": Cosine(1e-3)}
    return ConsistencyDistillation(
        latent.student,
        data=latent.data,
        teacher=latent.teacher,
        **{"solver": Euler(), "discretisation": EveryIndex(50), **fixed, **settings},
    )


@pytest.mark.parametrize("adaptation", [None, LoRA(rank=2), Only("conv_out")], ids=["full", "lora", "only"])
def test_a_run_that_is_cut_off_goes_on_bit_for_bit(latent, tmp_path, adaptation):
    settings = {} if adaptation is None else {"adaptation": adaptation}
    whole = latent_learner(latent, **settings).learn(4 * 6)
    half = latent_learner(latent, **settings)

    stop = ConvertCallback(lambda local_variables, global_variables: half.iteration < 3)
    half.learn(4 * 6, [Checkpoints(tmp_path / "run"), stop])
    assert half.num_timesteps == 12
    again = ConsistencyDistillation.load(tmp_path / "run", latent.student, data=latent.data, teacher=latent.teacher)
    again.learn(4 * 6 - again.num_timesteps, reset_num_timesteps=False)
    assert again.num_timesteps == whole.num_timesteps == 24
    assert all(torch.equal(*pair) for pair in zip(weights(whole), weights(again), strict=True))
    with whole.averaged_weights(), again.averaged_weights():
        assert all(torch.equal(*pair) for pair in zip(weights(whole), weights(again), strict=True))
    assert all(torch.equal(*pair) for pair in zip(whole._target_weights(), again._target_weights(), strict=True))


def plain(folder, prompts, *, num_steps, lora=None):
    pipeline = LatentConsistencyModelPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline(
        prompts,
        num_inference_steps=num_steps,
        guidance_scale=8.5,
        height=16,
        width=16,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        output_type="pt",
    ).images


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_diffusers_opens_what_is_saved_and_draws_the_same_image(latent, tmp_path, num_steps):
    run = latent_learner(latent).learn(4 * 3)
    folder = run.save_pipeline(tmp_path / "pipeline")
    images = run.draw(["a cat", "a dog"], num_steps=num_steps, seeds=[0, 1])
    untrained = latent_learner(latent).draw(["a cat", "a dog"], num_steps=num_steps, seeds=[0, 1])
    assert (images - untrained).abs().max() > 1e-3
    torch.testing.assert_close(plain(folder, ["a cat", "a dog"], num_steps=num_steps), images, atol=1e-4, rtol=0)
    with pytest.raises(FileExistsError, match="give a new folder"):
        run.save_pipeline(folder)
    assert load_model(folder).boundary_time == 0.0


def test_diffusers_opens_lora_layers_over_the_student(latent, tmp_path):
    run = latent_learner(latent, adaptation=LoRA(rank=2), learning_rate=1e-2).learn(4 * 4)
    lora = run.save_pipeline(tmp_path / "lora")
    images = run.draw(["a cat", "a dog"], num_steps=2, seeds=[0, 1])
    drawn = plain(latent.student.path, ["a cat", "a dog"], num_steps=2, lora=lora)
    untrained = plain(latent.student.path, ["a cat", "a dog"], num_steps=2)
    assert (drawn - untrained).abs().max() > 1e-3
    torch.testing.assert_close(drawn, images, atol=1e-4, rtol=0)


def test_a_fixed_scale_is_folded_in_and_a_drawn_one_is_told(latent):
    fixed = latent_learner(latent).learn(4 * 2)
    assert bool((fixed.network.time_embedding.cond_proj.weight == 0).all())
    drawn = latent_learner(latent, guidance=DrawnGuidance(1.0, 6.0)).learn(4 * 2)
    assert bool((drawn.network.time_embedding.cond_proj.weight != 0).any())


def test_the_first_goal_is_the_target_at_the_teacher_s_step(latent):
    run = latent_learner(latent, guidance=FixedGuidance(3.0), metric=L2())
    seen = {}
    plain_step = run.earlier

    def earlier(x, t, s, **rest):
        seen.update(x=x, t=t, s=s, x_s=plain_step(x, t, s, **rest), indices=rest["step"].indices)
        return seen["x_s"]

    run.earlier = earlier
    losses, _ = run.losses(range(4), torch.Generator().manual_seed(0))
    prompts = [latent.data.prompts[index] for index in seen["indices"].tolist()]
    guided = latent.teacher.denoise(seen["x"], seen["t"], latent.teacher.encode_prompts(prompts), guidance_scale=3.0)
    schedule = latent.teacher.schedule
    alpha, sigma = (level(seen["s"])[:, None, None, None] for level in (schedule.alpha, schedule.sigma))
    torch.testing.assert_close(seen["x_s"], alpha * guided.x0 + sigma * guided.epsilon)
    conditioning = latent.student.encode_prompts(prompts)
    f_t, f_s = (
        latent.student.denoise(x, t, conditioning, guidance_scale=3.0).x0
        for x, t in ((seen["x"], seen["t"]), (seen["x_s"], seen["s"]))
    )
    torch.testing.assert_close(losses.detach(), (f_t - f_s).square().flatten(1).sum(1), rtol=1e-3, atol=1e-4)


def test_shares_of_a_batch_are_the_batch(latent):
    """What many processes compute is what one does."""
    run = latent_learner(latent, batch_size=6)
    whole, _ = run.losses(range(6), torch.Generator().manual_seed(1))
    parts = [run.losses(range(*part), torch.Generator().manual_seed(1))[0] for part in ((0, 2), (2, 6))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_the_target_follows_slowly(latent):
    run = latent_learner(latent, target=Averaged(0.9))
    before = [weight.clone() for weight in run._target_weights()]
    run.learn(4, log_interval=0)
    for old, target, new in zip(before, run._target_weights(), weights(run), strict=True):
        torch.testing.assert_close(target, 0.9 * old + 0.1 * new)


def test_regression_goes_to_the_ends_of_trajectories(latent):
    times = torch.cat([torch.arange(799, 0, -200), torch.zeros(1)])
    trajectories = Trajectories.draw(latent.teacher, ["a cat", "a dog"], times=times, guidance_scale=4.0)
    settings = {"precision": None, "seed": 0, "batch_size": 4, "learning_rate": 3e-3}
    run = TrajectoryRegression(latent.student, data=trajectories, **settings)
    losses = [run.losses(range(4), torch.Generator().manual_seed(seed))[0].mean().item() for seed in range(8)]
    run.learn(4 * 40, log_interval=0)
    after = [run.losses(range(4), torch.Generator().manual_seed(seed))[0].mean().item() for seed in range(8)]
    assert sum(after) < 0.7 * sum(losses)


def test_at_the_noisiest_time_distillation_starts_from_pure_noise(latent):
    run = latent_learner(latent)
    clean, noise, t = torch.ones(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([799.0, 749.0])
    start = run.start(clean, t, noise)
    assert torch.equal(start[0], noise[0])
    assert torch.equal(start[1], run.noised(clean, t, noise)[1])


def test_what_does_not_fit_is_refused(latent, gaussian):
    with pytest.raises(ValueError, match="no consistency function"):
        ConsistencyTraining(latent.teacher, data=latent.data)
    with pytest.raises(ValueError, match="latents are"):
        ConsistencyTraining(latent.student, data=gaussian.data)
    with pytest.raises(ValueError, match="two processes"):
        ConsistencyDistillation(gaussian.student, data=gaussian.data, teacher=load_model("mixture"))
    with pytest.raises(ValueError, match="not told the guidance scale"):
        gaussian.learner(ConsistencyDistillation, guidance=DrawnGuidance())
    with pytest.raises(TypeError, match="teacher must be a DiffusionModel"):
        ConsistencyDistillation(latent.student, data=latent.data, teacher="emoji")
    with pytest.raises(TypeError, match="data must be Trajectories"):
        TrajectoryRegression(latent.student, data=latent.data)
    with pytest.raises(ValueError, match="leaves nothing to train"):
        latent_learner(latent, adaptation=Only("cond_proj"))
    with pytest.raises(ValueError, match="discrete process"):
        gaussian.learner(ConsistencyDistillation, discretisation=EveryIndex(50)).learn(256)


def test_training_with_a_learner_on_latents_without_a_teacher(latent):
    run = ConsistencyTraining(latent.student, data=latent.data, seed=0, batch_size=4, **easy(stages=2))
    run.learn(8)
    assert run.num_updates == 2


def test_a_pixel_model_learns_without_a_teacher(tmp_path):
    student = load_model(make_tiny_consistency_model(tmp_path / "model", clip_denoised=False))
    data = Latents(torch.rand(4, 3, 8, 8) * 2 - 1, ["anything"] * 4)
    run = ConsistencyTraining(
        student, data=data, seed=0, batch_size=4, precision=None, optimizer=AdamW(), discretisation=KarrasLevels(8),
        target=Averaged(),
    )  # fmt: skip
    run.learn(8)
    folder = run.save_pipeline(tmp_path / "trained")
    pipeline = ConsistencyModelPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(generator=torch.Generator().manual_seed(5), num_inference_steps=1, output_type="pt").images
    torch.testing.assert_close(run.draw(["anything"], num_steps=1, seeds=[5]), images, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="no LoRA layers"):
        ConsistencyTraining(student, data=data, adaptation=LoRA())
