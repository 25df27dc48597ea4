"""Parts: small frozen dataclasses that hold what varies; they are given to their owner, and can be written as JSON."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from inspect import isabstract
from typing import Any, TypeVar

from .naming import unknown_name

GIVEN_AGAIN: Mapping[str, object] = {"given_again": True}

_NAME = "part"

AnyPart = TypeVar("AnyPart", bound="Part")


class Part:
    """The base of all parts: frozen dataclasses whose fields are their keywords and whose methods are their facts.

    A part is shown by what differs from its defaults, `AdamW(weight_decay=0.0)`.

    A field with `metadata=GIVEN_AGAIN` holds what JSON cannot: it is not written down, and has to be given again.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__repr__ = Part.__repr__  # type: ignore[method-assign]  # which the dataclass decorator then leaves alone

    def __repr__(self) -> str:
        assert is_dataclass(self)
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        shown = (f"{name}={value!r}" for name, (value, default) in values.items() if value != default)
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def from_fields(cls: type[AnyPart], values: Mapping[str, Any]) -> AnyPart:
        """Return the part whose fields have these values."""
        return cls(**values)


def described(value: Any) -> Any:
    """Return a part as a dict that JSON can hold, `{"part": its class, field: value …}`; other values as they are."""
    if isinstance(value, Part):
        assert is_dataclass(value)
        written = {field.name: getattr(value, field.name) for field in fields(value) if is_written(field.metadata)}
        return {_NAME: type(value).__name__, **{name: described(field) for name, field in written.items()}}
    return [described(item) for item in value] if isinstance(value, tuple) else value


def is_written(metadata: Mapping[Any, Any]) -> bool:
    """Return whether a field with this metadata is written down."""
    return not metadata.get("given_again", False)


def made(description: Any, kind: type[AnyPart]) -> AnyPart:
    """Return the part that `described` wrote down.

    Args:
        description: The dict.
        kind: The part's base class: the part is of it or of a subclass, and no other name means anything.

    Raises:
        ValueError: it is no such part, or of a class that this process has not imported.
    """
    classes = {part.__name__: part for part in _subclasses(kind) if is_dataclass(part) and not isabstract(part)}
    if not isinstance(description, Mapping) or description.get(_NAME) not in classes:
        name = description.get(_NAME) if isinstance(description, Mapping) else description
        raise ValueError(unknown_name(kind.__name__, str(name), sorted(classes)))
    values = {name: _remade(value) for name, value in description.items() if name != _NAME}
    return classes[description[_NAME]].from_fields(values)


def _remade(value: Any) -> Any:
    if isinstance(value, Mapping) and _NAME in value:
        return made(value, Part)
    return tuple(_remade(item) for item in value) if isinstance(value, list) else value


def _subclasses(kind: type[AnyPart]) -> list[type[AnyPart]]:
    return [kind, *(part for child in kind.__subclasses__() for part in _subclasses(child))]


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings as one flat dict: a part that `described` wrote is its name, and its fields are "part/field"."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat[prefix + name] = value[_NAME]
            flat |= flattened({field: inner for field, inner in value.items() if field != _NAME}, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat
