"""The flow-matching sibling of the embedded model: its loss, its network against diffusers' pipeline, a whole run."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from tests.tiny import EMOJI
from tools.emoji import train_flow
from tools.emoji.dataset import IconData
from tools.emoji.export import export_pipeline, megabytes
from tools.emoji.train_flow import JointAttention, as_pipeline, draw_zeros, flow_loss, load_network, new_network

CAPTIONS = ["a cat", "a dog on a blue background", ""]


@pytest.fixture(scope="module")
def parts():
    """`emoji`'s autoencoder, tokenizer and text encoder."""
    vae = AutoencoderKL.from_pretrained(EMOJI / "vae").eval().requires_grad_(False)
    vae.register_to_config(shift_factor=0.0)
    text_encoder = CLIPTextModel.from_pretrained(EMOJI / "text_encoder", dtype=torch.float32).eval()
    return vae, CLIPTokenizer.from_pretrained(EMOJI / "tokenizer"), text_encoder


def awake(network):
    """A network as if trained: nothing in it is 0."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.05, generator=generator)
    return network


def tokens(tokenizer, captions):
    return tokenizer(captions, padding="max_length", return_tensors="pt").input_ids


def test_flow_loss_is_zero_for_the_true_velocity_and_one_for_one_beside_it():
    x0 = torch.randn(64, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    times = []

    def oracle(noised, t):
        times.append(t)
        return (noised - x0) / t[:, None, None, None]

    loss, _ = flow_loss(oracle, x0, torch.Generator().manual_seed(0))
    assert loss < 1e-5
    assert torch.logit(times[0]).std() == pytest.approx(1.0, abs=0.2)
    off_by_one, logged = flow_loss(lambda *at: oracle(*at) + 1, x0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(off_by_one, torch.ones(()), rtol=1e-3, atol=0)
    assert logged["loss"] is off_by_one


def test_the_straight_line_is_the_schedulers():
    """At the scheduler's sigmas x_t, t and the velocity are what its Euler steps take for them."""
    scheduler = FlowMatchEulerDiscreteScheduler(**train_flow.SCHEDULER)
    scheduler.set_timesteps(7)
    x0, epsilon = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    latents = epsilon
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        torch.testing.assert_close(timestep, sigma * 1000)
        torch.testing.assert_close(latents, (1 - sigma) * x0 + sigma * epsilon)
        latents = scheduler.step(epsilon - x0, timestep, latents).prev_sample
    torch.testing.assert_close(latents, x0)


@pytest.mark.parametrize("zeros", [0, 1, 16, 256])
def test_the_network_is_what_the_pipeline_asks(parts, zeros):
    """Rows of zeros, computed once and counted, against the pipeline's own embeddings and diffusers' attention."""
    vae, tokenizer, text_encoder = parts
    torch.manual_seed(0)
    network = awake(new_network(tokenizer, text_encoder, heads=2, layers=3)).eval()
    latents, t = torch.randn(3, 4, 16, 16), torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        encoded = as_pipeline(network, vae, tokenizer).encode_prompt(
            CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=256
        )
        embeds = torch.cat([encoded[0][:, :16], torch.zeros(3, zeros, 192)], dim=1)
        assert not encoded[0][:, 16:].any()
        expected = network.transformer(
            latents,
            encoder_hidden_states=embeds,
            pooled_projections=encoded[2],
            timestep=t * 1000,
            return_dict=False,
        )[0]
        network.transformer.set_attn_processor(JointAttention())
        velocity = network(latents, t, token_ids=tokens(tokenizer, CAPTIONS), zeros=torch.full((3,), zeros))
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)


def test_counts_of_zeros_take_all_that_the_pipeline_allows():
    zeros = draw_zeros(20_000, torch.Generator().manual_seed(0))
    assert zeros.min() == 0
    assert zeros.max() == 512
    assert torch.equal(zeros, zeros.round())
    assert (zeros + 1).log().median() == pytest.approx(np.log(513) / 2, abs=0.1)


def test_a_new_network_reads_captions_as_emoji_does_and_starts_at_no_velocity(parts):
    _, tokenizer, text_encoder = parts
    network = new_network(tokenizer, text_encoder, heads=2, layers=2).eval()
    token_ids = tokens(tokenizer, CAPTIONS)
    with torch.no_grad():
        last = text_encoder(token_ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(network.encode(token_ids)[0][..., :128], last)
        velocity = network(torch.randn(3, 4, 16, 16), torch.rand(3), token_ids=token_ids, zeros=torch.ones(3))
    assert not velocity.any()


def test_every_layer_learns(parts):
    _, tokenizer, text_encoder = parts
    network = awake(new_network(tokenizer, text_encoder, heads=2, layers=3)).train()
    network.transformer.set_attn_processor(JointAttention())
    generator = torch.Generator().manual_seed(0)
    forward = partial(network, token_ids=tokens(tokenizer, CAPTIONS), zeros=torch.tensor([0, 16, 512]))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = flow_loss(forward, torch.randn(3, 4, 16, 16, generator=generator), generator)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    idle = {name for name, _ in network.named_parameters() if name not in gradients or not gradients[name].any()}
    # The last block passes no text on, so it asks nothing for the text.
    queries = ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")
    assert idle == {f"transformer.transformer_blocks.2.attn.{name}" for name in queries}


def test_a_run_ends_in_a_folder_that_diffusers_opens_and_that_can_be_trained_on(work, tmp_path):
    (tmp_path / "icons").symlink_to(work / "icons")
    args = train_flow.Args(
        tmp_path, emoji=EMOJI, images=64, pool=64, batch_size=32, heads=1, layers=2, per_prompt=1, save_every=1_000
    )
    train_flow.main(args)
    trained, package = tmp_path / "flow" / "pipeline", tmp_path / "package"
    with Image.open(tmp_path / "flow" / "grid_64.png") as grid:
        assert grid.size == (5 * (64 + 6), 9 * (64 + 14))
    export_pipeline(trained, package)
    for part in ("text_encoder", "text_encoder_2"):
        text = load_file(package / part / "model.safetensors")
        assert {weight.dtype for weight in text.values()} == {torch.float32}
        assert {name.split(".")[0] for name in text} == {"text_model", "text_projection"}
    transformer = load_file(package / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in transformer.values()} == {torch.float16}
    assert (package / "tokenizer_2" / "merges.txt").is_file()

    def draw(folder):
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.vae.config.shift_factor == 0.0
        generator = torch.Generator().manual_seed(0)
        keywords = {"num_inference_steps": 2, "generator": generator, "output_type": "np"}
        return pipeline("a cat", height=64, width=64, **keywords).images

    assert draw(package).shape == (1, 64, 64, 3)
    assert np.abs(draw(trained) - draw(package)).max() < 1e-2

    (tmp_path / "again" / "icons").parent.mkdir()
    (tmp_path / "again" / "icons").symlink_to(work / "icons")
    train_flow.main(train_flow.Args(tmp_path / "again", init=package, images=32, pool=32, batch_size=32, per_prompt=1))
    before, after = load_network(package), load_network(tmp_path / "again" / "flow" / "pipeline")
    moved = [(a - b).abs().max() for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert 0 < max(moved) < 0.01


def test_the_whole_has_less_than_30_megabytes(parts, tmp_path):
    vae, tokenizer, text_encoder = parts
    as_pipeline(new_network(tokenizer, text_encoder), vae, tokenizer).save_pretrained(tmp_path / "trained")
    export_pipeline(tmp_path / "trained", tmp_path / "package")
    assert megabytes(tmp_path / "package") < 30


def test_captions_and_latents_belong_together(parts, work):
    vae, tokenizer, _ = parts
    pool = train_flow.encode_pool(vae, IconData(work / "icons"), 32, seed=0)
    latents, token_ids = train_flow.draw_pairs(pool, tokenizer, 64, torch.Generator().manual_seed(0))
    assert latents.shape == (64, 4, 16, 16)
    assert token_ids.shape == (64, 16)
    for latent, ids in zip(latents, token_ids, strict=True):
        row = int((pool.latents.float() - latent).abs().sum((1, 2, 3)).argmin())
        caption = tokenizer.decode(ids, skip_special_tokens=True)
        assert caption == "" or pool.names[row] in caption
