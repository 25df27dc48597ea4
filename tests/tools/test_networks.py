"""What the stages train, against answers that are known."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTokenizer

from tests.tiny import EMOJI
from tools.emoji.dataset import IconData
from tools.emoji.icons import ANIMALS
from tools.emoji.tokenizer import build, words_of
from tools.emoji.train_classifier import labels_of, plain
from tools.emoji.train_scorer import PairSampler, SpoiltPictures, contrastive_loss
from tools.emoji.train_unet import SCHEDULER, draw_timesteps, epsilon_loss, load_network
from tools.emoji.train_vae import new_autoencoder, psnr, reconstruction_loss, whiten


@pytest.fixture(scope="module")
def data(work):
    return IconData(work / "icons")


def test_whitening_changes_the_latents_and_not_the_pictures(data):
    torch.manual_seed(0)
    vae = new_autoencoder().eval()
    images = data.batch(["cat", "key", "dog", "pizza"] * 8, torch.Generator().manual_seed(0)).images * 2 - 1
    with torch.no_grad():
        vae.quant_conv.weight.mul_(3).add_(0.1)
        whitened = whiten(vae, images)
        before, after = vae.encode(images).latent_dist, whitened.encode(images).latent_dist
        latents = after.mode() * vae.config.scaling_factor
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
        decoded = vae.decode(before.mode()).sample
        torch.testing.assert_close(whitened.decode(after.mode()).sample, decoded, atol=1e-4, rtol=1e-4)
        scale = 1 / (vae.config.scaling_factor * before.mode().std((0, 2, 3)))
        torch.testing.assert_close(after.std, before.std * scale[None, :, None, None], rtol=1e-3, atol=0)


def test_reconstruction_loss_and_psnr_are_zero_and_twenty_decibels():
    target = torch.zeros(2, 3, 8, 8)
    assert reconstruction_loss(target, target) == 0
    assert reconstruction_loss(target + 0.2, target).item() == pytest.approx(0.2 + 0.04)
    assert psnr(target + 0.2, target) == pytest.approx(20.0, abs=1e-4)


def test_epsilon_loss_weighs_as_v_prediction_does_and_is_zero_for_the_true_noise():
    alphas_cumprod = DDIMScheduler(**SCHEDULER).alphas_cumprod
    x0 = torch.randn(64, 4, 2, 2)

    def oracle(noised, t):
        alpha_bar = alphas_cumprod[t][:, None, None, None]
        return (noised - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    loss, _ = epsilon_loss(oracle, x0, alphas_cumprod, torch.Generator().manual_seed(0))
    assert loss < 1e-5

    seen = []

    def off_by_one(noised, t):
        seen.append(t)
        return oracle(noised, t) + 1

    loss, logged = epsilon_loss(off_by_one, x0, alphas_cumprod, torch.Generator().manual_seed(0))
    expected = (1 / alphas_cumprod[seen[0]]).clamp(max=20).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(logged["epsilon_mse"], torch.ones(()), rtol=1e-4, atol=0)


def test_every_layer_learns():
    """A compiled network once trained for hours with a gradient of exactly 0 in its inner layers."""
    network = load_network(EMOJI).train()
    network.unet.set_attn_processor(AttnProcessor())
    generator = torch.Generator().manual_seed(0)
    alphas_cumprod = DDIMScheduler(**SCHEDULER).alphas_cumprod
    tokens = torch.randint(0, 100, (4, 16), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        noise = torch.randn(4, 4, 16, 16, generator=generator)
        loss, _ = epsilon_loss(partial(network, token_ids=tokens), noise, alphas_cumprod, generator)
    loss.backward()
    idle = [name for name, parameter in network.named_parameters() if not parameter.grad.abs().max() > 0]
    assert idle == []


def test_noise_levels_are_log_normal():
    alphas_cumprod = DDIMScheduler(**SCHEDULER).alphas_cumprod
    t = draw_timesteps(50_000, alphas_cumprod, torch.Generator().manual_seed(0))
    log_snr = torch.logit(alphas_cumprod[t])
    assert float(log_snr.mean()) == pytest.approx(0.0, abs=0.05)
    assert float(log_snr.std()) == pytest.approx(2.0, abs=0.05)
    assert int(t.min()) >= 0
    assert int(t.max()) < 1000


def test_the_shipped_scheduler_is_the_one_that_training_used():
    shipped = DDIMScheduler.from_pretrained(EMOJI / "scheduler")
    assert {key: shipped.config[key] for key in SCHEDULER} == SCHEDULER


def test_the_network_of_a_pipeline_is_read_in_float32():
    network = load_network(EMOJI)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    tokens = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")(["a cat"], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        assert network(torch.zeros(1, 4, 16, 16), torch.tensor([500]), tokens.input_ids).shape == (1, 4, 16, 16)


def test_every_word_of_the_captions_is_one_token(data, tmp_path):
    tokenizer = build(data.icons, tmp_path)
    assert (tmp_path / "vocab.json").is_file()
    assert (tmp_path / "merges.txt").read_text().startswith("#version: 0.2\n")
    for word in words_of(data.icons):
        assert len(tokenizer(word).input_ids) == 3, word
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == tokenizer.pad_token_id
    assert tokenizer.model_max_length == 16


def test_the_shipped_tokenizer_knows_every_word_of_the_animals():
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    assert all(len(tokenizer(animal).input_ids) == 3 for animal in ANIMALS)


def test_the_classes_begin_with_the_animals(data):
    labels = labels_of(data)
    assert labels[:45] == list(ANIMALS)
    assert len(set(labels)) == len(labels)
    assert "honeybee" not in labels


def test_plain_icons_are_upright_on_white(data):
    images = plain(data.rgba[:2])
    assert images.shape == (2, 3, 64, 64)
    assert (images[:, :, 0, 0] == 1).all()


def embeddings(count, size=16, seed=0):
    return F.normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_contrastive_loss_is_clips_when_there_is_nothing_else():
    images, texts = embeddings(6), embeddings(6, seed=1)
    loss, _ = contrastive_loss(images, texts, texts[:0], torch.zeros(6, 6, dtype=torch.bool), torch.tensor(10.0))
    logits, target = 10 * images @ texts.T, torch.arange(6)
    torch.testing.assert_close(loss, (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)


def test_spoilt_pictures_and_wrong_captions_are_told_apart_and_the_same_are_not():
    texts = embeddings(6)
    none = torch.zeros(6, 6, dtype=torch.bool)
    scale = torch.tensor(20.0)
    apart, logged = contrastive_loss(texts, texts, texts[:0], none, scale)
    assert logged["accuracy"] == 1
    spoilt, _ = contrastive_loss(torch.cat([texts, texts[:1]]), texts, texts[:0], none, scale)
    wrong, _ = contrastive_loss(texts, texts, texts[:1], none, scale)
    assert spoilt > apart + 0.05
    assert wrong > apart + 0.05
    twins = torch.cat([texts[:1], texts[:1], texts[2:]])
    same = none.clone()
    same[0, 1] = same[1, 0] = True
    assert contrastive_loss(twins, twins, texts[:0], none, scale)[0] > apart + 0.1
    assert contrastive_loss(twins, twins, texts[:0], same, scale)[0] < apart + 0.01


def test_pairs_say_what_they_show_and_wrong_colours_are_wrong(data):
    pictures = torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 64, 64)
    spoilt = SpoiltPictures(pictures, ["cat", "dog", "never drawn"])
    sampler = PairSampler(data, spoilt)
    images, captions, wrong, same = sampler.draw(64, 8, torch.Generator().manual_seed(0))
    assert images.shape == (72, 3, 64, 64)
    assert (images[64:] == 0).all()
    assert len(captions) == 64
    assert "" not in captions
    coloured = [caption for caption in captions if caption.endswith("background")]
    assert len(wrong) == len(coloured) > 3
    for caption, other in zip(coloured, wrong, strict=True):
        assert caption != other
        assert caption.split(" on ")[0] == other.split(" on ")[0]
    assert not same.diagonal().any()
    names = [caption.split(" on ")[0].split(" ", 1)[-1] for caption in captions[32:]]
    pairs = [(i, j) for i in range(32) for j in range(i) if names[i] == names[j]]
    assert pairs
    assert all(same[32 + i, 32 + j] for i, j in pairs)


def test_spoilt_pictures_are_half_noise_and_half_too_few_steps(data):
    spoilt = SpoiltPictures.draw(EMOJI, data, 128, seed=0)
    assert len(spoilt) == len(spoilt.images) == 64 + 5 * 13
    clean = data.batch(spoilt.names[:64], torch.Generator().manual_seed(0)).images
    assert (spoilt.images[:64] / 255).diff(dim=-1).abs().mean() > 1.5 * clean.diff(dim=-1).abs().mean()
