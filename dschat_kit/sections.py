"""What the sections of the configuration share: fields with bounds, strict types, errors that say what to change."""

import dataclasses
import difflib
import json
import math
import operator
import types
import typing


class ConfigError(ValueError):
    """A setting that cannot work. The message is meant for the user and is shown without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for this: a cell shows the message alone
        return [f"error: {self}"]


def error(path: str, got: str, expected: str, change: str = "") -> ConfigError:
    """The one form of a configuration error."""
    return ConfigError(f"{path}: got {got}\n  expected: {expected}\n  change:   {change or f'--set {path}=...'}")


_BOUNDS = {"least": ("at least {}", operator.ge), "above": ("above {}", operator.gt),
           "most": ("at most {}", operator.le), "below": ("below {}", operator.lt),
           "one_of": ("one of {}", lambda value, allowed: value in allowed)}


def bounded(default, *, why: str = "", **bounds):
    """A dataclass field with bounds: least=, above=, most=, below=, one_of=. `why` joins the message."""
    return dataclasses.field(default=default, metadata={"bounds": bounds, "why": f" ({why})" if why else ""})


class Section:
    """Base of every section: checks the types and bounds of all fields, however the section was made."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            path = f"{type(self).__name__.lower()}.{item.name}".removeprefix("pipeline.")
            value = _typed(getattr(self, item.name), hints[item.name], path)
            object.__setattr__(self, item.name, value)
            bounds = item.metadata.get("bounds", {})
            if not all(_BOUNDS[name][1](value, bound) for name, bound in bounds.items()):
                said = [_BOUNDS[name][0].format(" | ".join(map(str, bound)) if name == "one_of" else bound)
                        for name, bound in bounds.items()]
                raise error(path, repr(value), " and ".join(said) + item.metadata["why"])

    def divides(self, small: str, large: str) -> None:
        """Raises ConfigError unless field `small` divides field `large`."""
        unit, whole, section = getattr(self, small), getattr(self, large), type(self).__name__.lower()
        if whole % unit:
            raise error(f"{section}.{small}", repr(unit), f"a divisor of {section}.{large} ({whole})")


def build(cls, tree: dict, prefix: str = ""):
    """A section out of nested dictionaries. Raises ConfigError on unknown names and wrong types."""
    if not isinstance(tree, dict):
        raise error(prefix.rstrip(".") or "configuration", repr(tree), "a section (an object)", "give its fields")
    hints, values = typing.get_type_hints(cls), {}
    for name, value in tree.items():
        if name not in hints:
            raise unknown(f"{prefix}{name}", cls, prefix)
        values[name] = build(hints[name], value, f"{name}.") if dataclasses.is_dataclass(hints[name]) else value
    return cls(**values)


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested settings on one level: {"ppo.kl_coef": 0.1, "seed": 0}."""
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def unknown(path: str, cls, prefix: str) -> ConfigError:
    """The error for a name that section `cls`, whose fields begin with `prefix`, does not have."""
    names = [f"{prefix}{item.name}" for item in dataclasses.fields(cls)]
    near = difflib.get_close_matches(path, names, n=1)
    return error("configuration", f"{path!r}, which is no setting", f"one of {', '.join(names)}",
                 f"did you mean {near[0]}?" if near else "the name")


def parse(text: str, hint):
    """JSON where it is JSON (`0.1`, `true`, `null`), otherwise the text itself; a field of text takes it as it is."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return text if hint is str and not isinstance(value, str) else value


def finite(text: str) -> float | None:
    """The finite number that a text spells, else None."""
    try:
        return float(text) if math.isfinite(float(text)) else None
    except ValueError:
        return None


def _typed(value, hint, path: str):
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and type(value) is int:
        value = float(value)
    if type(value) not in allowed or isinstance(value, float) and not math.isfinite(value):
        names = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in allowed)
        raise error(path, repr(value), f"a finite {names}" if float in allowed else names)
    return value
