"""Train the image-text scorer: two encoders whose embeddings of a picture and of its caption point the same way.

    python -m tools.emoji.train_scorer --pipeline diffusion_gym/models/emoji

takes an hour on one core and writes `build/emoji/scorer/scorer`, a folder for `tools.emoji.export`. Half of the
pictures are augmented as strongly as the classifier's; a sixth are spoilt: noised latents, decoded, and samples of the
pipeline after too few steps. A caption has to prefer its picture over these, so that noise and mush do not fool the
scorer at once.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, ResNetModel

from diffusion_gym.models import load_model
from diffusion_gym.prompts.base import with_article
from diffusion_gym.rewards.emoji_alignment import EmojiScorer

from .dataset import COLOURS, IconData, NameSampler, augment, draw_captions, draw_colours
from .distort import distort
from .samples import draw_samples
from .sources import WORK
from .train_classifier import plain, resnet_config
from .training import TrainingRun, autocast

logger = logging.getLogger(__name__)

MAX_SCALE = 50.0
SPOILT_STEPS = (1, 2, 3, 5, 8)
NOISE_LEVELS = (0.3, 1.0)


def new_scorer(tokenizer: CLIPTokenizer) -> EmojiScorer:
    """Return a scorer with random weights, 2.4 M parameters."""
    image = resnet_config()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=image.hidden_sizes[-1],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return EmojiScorer(ResNetModel(image), CLIPTextModelWithProjection(text), tokenizer, scale=1 / 0.07)


@dataclass(frozen=True)
class SpoiltPictures:
    """Pictures [N, 3, 64, 64] uint8 that look like what their name says, but badly."""

    images: Tensor
    names: Sequence[str]

    @classmethod
    def draw(cls, pipeline: Path, data: IconData, count: int, *, seed: int) -> "SpoiltPictures":
        """Return half noised latents of real pictures, half samples of too few steps."""
        generator, sampler = torch.Generator().manual_seed(seed), NameSampler(data)
        model = load_model(pipeline)
        names, parts = [], []
        for _ in range(math.ceil(count / 2 / 64)):
            batch = data.batch(sampler.draw(64, generator), generator)
            low, high = NOISE_LEVELS
            level = torch.rand(64, 1, 1, 1, generator=generator) * (high - low) + low
            latents = model.encode(batch.images)
            with autocast():
                noised = latents + level * torch.randn(latents.shape, generator=generator)
                parts.append(model.decode(noised).float())
            names.extend(batch.names)
        per_step = math.ceil(count / 2 / len(SPOILT_STEPS))
        for num_steps in SPOILT_STEPS:
            drawn = sampler.draw(per_step, generator)
            seeds = torch.randint(0, 2**31, (per_step,), generator=generator).tolist()
            parts.append(draw_samples(model, [with_article(name) for name in drawn], seeds, num_steps=num_steps))
            names.extend(drawn)
        return cls((torch.cat(parts) * 255).round().byte(), names)

    def __len__(self) -> int:
        return len(self.names)


class PairSampler:
    """Draws pictures, spoilt pictures and captions.

    Args:
        data: The icons.
        spoilt: The spoilt pictures.
    """

    def __init__(self, data: IconData, spoilt: SpoiltPictures) -> None:
        self.data = data
        self.spoilt = spoilt
        self.sampler = NameSampler(data)
        self._spoilt_of: dict[str, list[int]] = {}
        for row, name in enumerate(spoilt.names):
            self._spoilt_of.setdefault(name, []).append(row)

    def draw(self, pairs: int, spoilt: int, generator: torch.Generator) -> tuple[Tensor, list[str], list[str], Tensor]:
        """Return pictures, captions, other captions that are wrong only in the colour, and what may not be compared.

        Returns:
            images [pairs + spoilt, 3, 64, 64]; captions: `pairs` texts; wrong: texts with another background;
            same: [pairs, pairs], true where another row's picture may also bear the caption.
        """
        names = self.sampler.draw(pairs, generator)
        rows = self.data.draw(names, generator)
        colours = draw_colours(pairs, generator)
        half = pairs // 2
        mild = augment(self.data.rgba[rows[:half]], colours[:half], generator)
        strong = distort(self.data.rgba[rows[half:]], generator)
        captions = draw_captions(names[:half], colours[:half], generator, empty=0) + [
            with_article(name) for name in names[half:]
        ]
        wrong = []
        for name, colour, caption in zip(names, colours, captions[:half], strict=False):
            if caption.endswith("background"):
                other = COLOURS[(COLOURS.index(colour) + 1 + int(torch.randint(0, 11, (), generator=generator))) % 12]
                wrong.append(f"{with_article(name)} on {with_article(other)} background")
        # A spoilt cat is a choice beside a good cat.
        similar = [row for name in names for row in self._spoilt_of.get(name, ())] or list(range(len(self.spoilt)))
        chosen = torch.tensor(similar)[torch.randint(0, len(similar), (spoilt,), generator=generator)]
        images = torch.cat([mild, strong, self.spoilt.images[chosen] / 255])
        known = [set(self.data.icons[row].captions) for row in rows.tolist()]
        same = torch.tensor([[name in captions_of for captions_of in known] for name in names])
        return images, captions, wrong, same.fill_diagonal_(False)


def contrastive_loss(
    images: Tensor, texts: Tensor, wrong: Tensor, same: Tensor, scale: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return CLIP's symmetric cross-entropy, with spoilt pictures and wrong captions as further choices.

    Source: Radford et al., 2021, figure 3, https://arxiv.org/abs/2103.00020.

    Args:
        images: [B + S, E] normalised, the last S spoilt.
        texts: [B, E] normalised.
        wrong: [W, E] normalised captions that belong to no picture.
        same: [B, B] pairs of rows (caption, picture) that are not to be told apart.
        scale: The inverse temperature.
    """
    pairs = len(texts)
    target = torch.arange(pairs)
    unknown = torch.zeros(pairs, len(images) - pairs, dtype=torch.bool)
    by_text = (scale * texts @ images.T).masked_fill(torch.cat([same, unknown], 1), -torch.inf)
    choices = torch.cat([texts, wrong])
    by_image = scale * images[:pairs] @ choices.T
    by_image = by_image.masked_fill(F.pad(same.T, (0, len(wrong))), -torch.inf)
    loss = (F.cross_entropy(by_text, target) + F.cross_entropy(by_image, target)) / 2
    accuracy = (by_image.argmax(-1) == target).float().mean()
    return loss, {"loss": loss, "accuracy": accuracy, "scale": scale}


@torch.no_grad()
def retrieval_top1(scorer: EmojiScorer, data: IconData, names: Sequence[str], *, among: Sequence[str]) -> float:
    """Return the share of icons called one of `names` whose best caption among `among` is one of their own."""
    rows = [index for index, icon in enumerate(data.icons) if set(icon.captions) & set(names)]
    texts = scorer.embed_texts([with_article(name) for name in among])
    images = torch.cat([scorer.embed_images(part) for part in plain(data.rgba[rows]).split(128)])
    found = (images @ texts.T).argmax(-1).tolist()
    return sum(among[k] in data.icons[row].captions for row, k in zip(rows, found, strict=True)) / len(rows)


@dataclass
class Args:
    """Train the scorer."""

    work: Path = WORK
    """Where everything is read and written."""
    pipeline: Path = Path("diffusion_gym/models/emoji")
    """The pipeline that draws the spoilt pictures and whose tokenizer is used."""
    init: Path | None = None
    """A scorer's folder to go on from; none: random weights."""
    images: int = 400_000
    """How many pictures to train for."""
    batch_size: int = 192
    """Pictures of a step, a sixth of them spoilt."""
    spoilt: int = 4096
    """How many spoilt pictures are drawn, once, before training."""
    learning_rate: float = 2e-3
    """AdamW's, at its peak."""
    save_every: int = 100_000
    """Pictures between two checkpoints."""
    seed: int = 0
    """Of everything random."""


def main(args: Args) -> None:
    data, held_out = IconData(args.work / "icons"), IconData(args.work / "icons", held_out=True)
    torch.manual_seed(args.seed)
    tokenizer = args.pipeline / "tokenizer"
    scorer = (
        EmojiScorer.load(args.init, tokenizer) if args.init else new_scorer(CLIPTokenizer.from_pretrained(tokenizer))
    )
    scorer.requires_grad_(True)
    log_scale = nn.Parameter(torch.tensor(scorer.scale).log())
    network = nn.ModuleDict({"image": scorer.image_encoder, "text": scorer.text_encoder})
    network.register_parameter("log_scale", log_scale)
    network.to(memory_format=torch.channels_last).train()
    spoilt = SpoiltPictures.draw(args.pipeline, data, args.spoilt, seed=args.seed)
    logger.info("%d spoilt pictures", len(spoilt))
    pairs = PairSampler(data, spoilt)
    every_name = NameSampler(data).names

    def loss(run: TrainingRun) -> tuple[Tensor, dict[str, Tensor]]:
        num_spoilt = run.batch_size // 6
        images, captions, wrong, same = pairs.draw(run.batch_size - num_spoilt, num_spoilt, run.generator(args.seed))
        with autocast():
            image_embeds = scorer.embed_images(images).float()
            text_embeds = scorer.embed_texts([*captions, *wrong]).float()
        texts, others = text_embeds[: len(captions)], text_embeds[len(captions) :]
        return contrastive_loss(image_embeds, texts, others, same, log_scale.exp().clamp(max=MAX_SCALE))

    def save(run: TrainingRun) -> None:
        scorer.scale = float(log_scale.detach().exp().clamp(max=MAX_SCALE))
        scorer.save(run.folder / "scorer")
        animals = every_name[:45]
        report = {
            "held-out style, 45 animals": retrieval_top1(scorer, held_out, animals, among=animals),
            "held-out style, all captions": retrieval_top1(scorer, held_out, every_name, among=every_name),
        }
        (run.folder / "retrieval.json").write_text(json.dumps(report))
        logger.info("%s", report)

    run = TrainingRun(
        network,
        args.work / "scorer",
        images=args.images,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=0.05,
        ema_decay=0.998,
    )
    run.fit(loss, save=save, save_every=args.save_every, log_every=25)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(Args, description=__doc__))
