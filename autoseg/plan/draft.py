"""The plan while it is being made: decided values by dotted field name, each with its reason."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args, get_origin

import msgspec

from autoseg.errors import PlanError
from autoseg.schema import Fingerprint, Hardware, Plan, Reason, explain, nearest

DERIVED = (
    "schema_version",
    "fingerprint_sha256",
    "hardware",
    "heads",
    "reasons",
    "disjoint",
    "normalization.volumes",
    "split.rule",
    "predicted_memory_bytes",
    "predicted_ram_bytes",
    "predicted_disk_bytes",
    "predicted_step_s",
)


FOLLOWS = {
    "dimensions": "set input_slices=1 (2D) or more (2.5D), or a patch_size_zyx of several sections (3D)",
    "resolution": "set split.voxel_edge_nm=FROM,TO",
}


class Choice(NamedTuple):
    """A decision: the value, why this one, and where the rule comes from.

    The value that a scored run advises may be a function of the draft.
    """

    value: Any
    because: str
    source: str


class Draft:
    """What the rules may look at: the facts, the user's settings, what was decided before, the Dice of a scored run."""

    def __init__(
        self,
        fingerprint: Fingerprint,
        hardware: Hardware,
        settings: Mapping[str, Any],
        advice: Mapping[str, Choice] | None = None,
        dice: Mapping[str, float | None] | None = None,
    ) -> None:
        self.fingerprint, self.hardware, self.settings, self.advice = fingerprint, hardware, settings, advice or {}
        self.dice = dice or {}
        self._values: dict[str, Any] = {}
        self.reasons: list[Reason] = []

    def __getitem__(self, field: str) -> Any:
        """Return a value that was decided before; KeyError is a fault in the order of the rules."""
        return self._values[field]

    def decide(self, field: str, choice: Choice) -> None:
        """Take the user's value, else what a scored run advises, else the rule's, and keep the reason."""
        choice = self._advised(field, choice)
        if field in self.settings:
            was = f"instead of {_short(choice.value)} ({choice.because})" if choice.because else ""
            choice = Choice(self.settings[field], f"set by the user {was}".strip(), "user")
        self._values[field] = choice.value
        self.reasons.append(Reason(field=field, because=choice.because, source=choice.source))

    def _advised(self, field: str, choice: Choice) -> Choice:
        advised = self.advice.get(field)
        if advised is None:
            return choice
        value = advised.value(self) if callable(advised.value) else advised.value
        if isinstance(value, dict):  # by class: those of this plan, and the user's word on each of them stands
            said = self.settings.get(f"{field}.*", {})
            value = {name: said.get(name, value.get(name, old)) for name, old in choice.value.items()}
        if value == choice.value:
            return choice
        return Choice(value, f"{advised.because}; instead of {_short(choice.value)} ({choice.because})", advised.source)

    def nested(self) -> dict[str, Any]:
        """Return the decided values as nested dictionaries, ready to become a Plan."""
        tree: dict[str, Any] = {}
        for field, value in self._values.items():
            *parents, leaf = field.split(".")
            branch = tree
            for parent in parents:
                branch = branch.setdefault(parent, {})
            branch[leaf] = value
        return tree


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """Turn `field=value` texts into typed values by dotted field; PlanError names the nearest field."""
    settings: dict[str, Any] = {}
    fields = dict(leaf_fields(Plan))
    for pair in pairs:
        field, equals, text = pair.partition("=")
        field = field.strip()
        if not equals:
            raise PlanError(f"--set {pair}", "has no '='", "write --set field=value")
        if field in DERIVED or field.split(".")[0] in DERIVED:
            raise PlanError(f"--set {field}", "is derived from other fields", "set what it depends on")
        parent, _, key = field.rpartition(".")
        keyed = get_origin(fields.get(parent)) is dict
        if field not in fields and not keyed:
            if field in FOLLOWS:
                raise PlanError(f"--set {field}", "follows from other fields", FOLLOWS[field])
            inside = sorted(name for name in fields if name.startswith(f"{field}."))
            near = nearest(field, sorted(fields))
            hint = (
                f"set one of {', '.join(inside)}"
                if inside
                else f"did you mean {near}?"
                if near
                else "autoseg plan prints every field"
            )
            raise PlanError(f"--set {field}", "is not a field of the plan", hint)
        value_type = get_args(fields[parent])[1] if keyed else fields[field]
        try:
            value = msgspec.convert(_parse(text, value_type), value_type)
        except msgspec.ValidationError as error:
            what, remedy = explain(str(error), value_type, repr(text))
            if field == "classes":
                what, remedy = "holds records of classes", f"use --classes {text}"
            raise PlanError(f"--set {field}", what, remedy) from None
        if not all(math.isfinite(number) for number in numbers(value)):
            raise PlanError(f"--set {field}", f"{text} is not a finite number", "correct the value")
        if keyed:
            settings.setdefault(f"{parent}.*", {})[key] = value
        else:
            settings[field] = value
    return settings


def leaf_fields(record: type[msgspec.Struct], prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted name, type) of every field that is not itself a record."""
    found: list[tuple[str, Any]] = []
    for field in msgspec.structs.fields(record):
        name = f"{prefix}{field.encode_name}"
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            found += leaf_fields(field.type, f"{name}.")
        else:
            found.append((name, field.type))
    return found


def numbers(value: Any) -> Iterator[float]:
    """Yield every number inside a value; truth values are none."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _parse(text: str, value_type: Any) -> Any:
    """Read JSON; else numbers and words separated by commas; else the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        parts = [part.strip() for part in text.split(",")]
        value = [_scalar(part) for part in parts] if len(parts) > 1 else text
    if get_origin(value_type) is tuple and not isinstance(value, list):
        value = [value] if text else []
    return float(value) if value_type in (float, float | None) and isinstance(value, int) else value


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _short(value: Any) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 40 else text[:37] + "..."
