"""The named prompt sets: those of the DDPO paper, and those that the embedded model can draw.

Source: Black et al., 2023, https://arxiv.org/abs/2305.13301; the lists that its codes ship,
https://github.com/jannerm/ddpo and https://github.com/kvablack/ddpo-pytorch; its page, https://rl-diffusion.github.io.
"""

from collections.abc import Sequence
from importlib.resources import files

from .base import PromptSet, with_article

ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")
"""The activities of the DDPO codes."""
PAPER_ACTIVITIES = ("washing dishes", *ACTIVITIES[1:])
"""The same as the paper spells them."""
UNSEEN_ACTIVITIES = (
    "doing laundry",
    "playing basketball",
    "driving a car",
    "taking an exam",
    "typing on a keyboard",
    "sewing clothes",
)
"""Further activities that the paper's page shows; the paper itself has no list."""

_COUNTED = (
    *("cat", "dog", "horse", "monkey", "rabbit", "spider", "bird", "sheep", "cow", "lion", "tiger"),
    *("bear", "raccoon", "fox", "wolf", "ant", "fish", "squirrel", "turtle", "frog", "chicken", "pig"),
)
_IRREGULAR = {"sheep": "sheep", "fox": "foxes", "wolf": "wolves", "fish": "fish"}
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")
_COLOURS = (
    *("white", "black", "gray", "red", "orange", "yellow"),
    *("green", "blue", "purple", "pink", "brown", "teal"),
)


def _lines(name: str) -> list[str]:
    return (files(__package__) / "data" / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def _with_articles(name: str) -> PromptSet:
    return PromptSet(tuple(with_article(noun) for noun in _lines(name)))


def simple_animals() -> PromptSet:
    """Return the 45 common animals of the DDPO paper, with their article: "a cat", "an ant"."""
    return _with_articles("simple_animals")


def imagenet_animals() -> PromptSet:
    """Return the 398 animal classes of ImageNet-1k, WordNet's synonyms joined by commas, as the DDPO codes use them."""
    return PromptSet(tuple(_lines("imagenet_animals")))


def animals_activities(activities: Sequence[str] = ACTIVITIES) -> PromptSet:
    """Return "a(n) [animal] [activity]" for the 45 animals and each activity: 135 prompts for the paper's three.

    Args:
        activities: The texts; the paper says "washing dishes" (`PAPER_ACTIVITIES`), its codes "washing the dishes".
    """
    animals = simple_animals()
    return PromptSet(tuple(f"{animal} {activity}" for animal in animals for activity in activities))


def counting() -> PromptSet:
    """Return "[n] [animals]" for n from two to eight and 22 animals: 154 prompts with the questions of the strict VQA.

    The metadata are {"questions": ["How many cats are there in this image?", "What animal is in this image?"],
    "answers": ["two", "cat"]}, as in the codes.
    """
    texts, metadata = [], []
    for animal in _COUNTED:
        plural = _IRREGULAR.get(animal, f"{animal}s")
        questions = [f"How many {plural} are there in this image?", "What animal is in this image?"]
        for number in _NUMBERS:
            texts.append(f"{number} {plural}")
            metadata.append({"questions": questions, "answers": [number, animal]})
    return PromptSet(tuple(texts), tuple(metadata))


def unseen_animals() -> PromptSet:
    """Return 38 animals that are not among the 45 (the codes' uncommon_animals.txt), with their article."""
    return _with_articles("unseen_animals")


def unseen_objects() -> PromptSet:
    """Return 50 everyday objects (the codes' everyday_objects.txt), with an article where they are one thing."""
    return PromptSet(tuple(_lines("unseen_objects")))


def unseen_activities() -> PromptSet:
    """Return the 45 animals with each of six activities that were not trained on: 270 prompts."""
    return animals_activities(UNSEEN_ACTIVITIES)


def emoji_animals() -> PromptSet:
    """Return 32 animals that are not among the 45, and that the embedded model was taught."""
    return _with_articles("emoji_animals")


def emoji_objects() -> PromptSet:
    """Return 32 foods and objects that the embedded model was taught."""
    return _with_articles("emoji_objects")


def emoji_backgrounds() -> PromptSet:
    """Return "a(n) [animal] on a(n) [colour] background" for the 45 animals and 12 colours: 540 prompts.

    The embedded model draws no activities; backgrounds are what it can combine an animal with.
    """
    scenes = [f"on {with_article(colour)} background" for colour in _COLOURS]
    return animals_activities(scenes)


NAMED = {
    function.__name__: function
    for function in (
        simple_animals,
        imagenet_animals,
        animals_activities,
        counting,
        unseen_animals,
        unseen_objects,
        unseen_activities,
        emoji_animals,
        emoji_objects,
        emoji_backgrounds,
    )
} | {"animals_activities_paper": lambda: animals_activities(PAPER_ACTIVITIES)}
"""Every set by its name; "animals_activities_paper" says "washing dishes"."""
