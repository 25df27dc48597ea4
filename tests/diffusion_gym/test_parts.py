import json
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from diffusion_gym.parts import GIVEN_AGAIN, Part, described, made


class Shape(Part):
    """What a part of this file is."""


@dataclass(frozen=True)
class Point(Shape):
    place: tuple[float, ...] = (0.0, 1.0)


@dataclass(frozen=True)
class Pair(Shape):
    first: Shape
    second: Shape | None = None
    names: tuple[str, ...] = ()
    color: Callable[[], str] | None = field(default=None, metadata=GIVEN_AGAIN)


@dataclass(frozen=True)
class Colour(Part):
    name: str


@pytest.mark.parametrize(
    "part", [Point(), Point((2.5,)), Pair(Point()), Pair(Pair(Point((1.0,))), Point(()), ("a", "b"))], ids=repr
)
def test_a_part_comes_back_from_json(part):
    assert made(json.loads(json.dumps(described(part))), Shape) == part


def test_a_description_names_the_class_and_the_fields():
    assert described(Pair(Point(), names=("a",))) == {
        "part": "Pair",
        "first": {"part": "Point", "place": [0.0, 1.0]},
        "second": None,
        "names": ["a"],
    }


def test_what_json_cannot_hold_is_not_written_down():
    pair = Pair(Point(), color=lambda: "red")
    assert "color" not in described(pair)
    assert made(described(pair), Shape).color is None


def test_other_values_are_described_by_themselves():
    assert described((1, (2, "x"), None)) == [1, [2, "x"], None]
    assert described({"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    "description", [{"part": "Poin"}, {"part": "Colour", "name": "red"}, {"place": []}, "Point", None]
)
def test_what_is_no_part_of_that_kind_is_refused(description):
    with pytest.raises(ValueError, match=r"unknown Shape .*Pair.*Point"):
        made(description, Shape)


def test_a_name_that_is_nearly_right_is_suggested():
    with pytest.raises(ValueError, match="Did you mean 'Point'"):
        made({"part": "Poin"}, Shape)
