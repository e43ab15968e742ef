"""Records to JSON files and back: strict, finite, atomic."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec

from autoseg.errors import PlanError
from autoseg.schema.comparisons import Ranking
from autoseg.schema.facts import ClassTable, Fingerprint, Hardware
from autoseg.schema.plans import Plan
from autoseg.schema.records import SCHEMA_VERSION, Artifact, Record
from autoseg.schema.results import CheckpointHeader, Scores, TunedDecode

AnyArtifact = ClassTable | Fingerprint | Hardware | Plan | CheckpointHeader | TunedDecode | Scores | Ranking
A = TypeVar("A", bound=Artifact)
REMOVED = {"conv_gflops": "it is of an earlier version, and held another speed: write it anew"}
_TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "array": "a list",
    "object": "an object in braces",
    "null": "null",
}


def encode(record: Record) -> bytes:
    """Return indented JSON, the same bytes for the same record."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def sha256(record: Record) -> str:
    """Return the hash of the record's JSON, as hexadecimal."""
    return hashlib.sha256(encode(record)).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write the file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save(record: Artifact, path: Path) -> None:
    """Write the artifact; refuse numbers that JSON cannot hold, naming the field."""
    for field, value in _numbers(msgspec.to_builtins(record)):
        if not math.isfinite(value):
            raise PlanError(path, f"{field} is {value}", "this is a fault of autoseg, please report it")
    write_atomically(path, encode(record))


def load(path: Path | str) -> AnyArtifact:
    """Read any artifact; its `kind` says which record it is."""
    artifact: AnyArtifact = decode(_read(Path(path)), AnyArtifact, path)
    return artifact


def load_as(path: Path | str, record_type: type[A]) -> A:
    """Read an artifact of that type, or raise PlanError."""
    artifact: A = decode(_read(Path(path)), record_type, path)
    return artifact


def decode(content: bytes, record_type: Any, where: object) -> Any:
    """Parse strictly and check that every number is finite; PlanError names the field and the nearest name."""
    try:
        raw = json.loads(content, parse_constant=_refuse_constant)
        if not isinstance(raw, dict):
            raise PlanError(where, f"holds {type(raw).__name__}, not an object", "pass a file written by autoseg")
        version = raw.get("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            what = f"schema_version {version!r}, and this autoseg reads {SCHEMA_VERSION}"
            raise PlanError(where, what, _write_anew(raw.get("kind")))
        _refuse_what_json_cannot_hold(raw)
        return msgspec.convert(raw, record_type)
    except msgspec.ValidationError as error:
        raise PlanError(where, *explain(str(error), record_type)) from None
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(where, f"is not valid JSON ({error})", "repair it, or write it anew") from None


def _write_anew(kind: object) -> str:
    """Return how to make an artifact of that kind again."""
    commands = {"fingerprint": "autoseg fingerprint DATA --out F", "plan": "autoseg plan DATA --out PLAN"}
    return f"write it anew: {commands.get(str(kind), 'with the command that wrote it')}"


def explain(message: str, record_type: Any, given: str = "it") -> tuple[str, str]:
    """Turn a validation message into (what, remedy); suggest the nearest name for an unknown key or choice.

    `given` is what was wrong as the user wrote it, for a message that names no field.
    """
    message = " ".join(message.replace("Object", "object").replace("`", "'").split())
    message, _, at = message.partition(" - at ")
    field = at.strip("'").removeprefix("$").removeprefix(".")
    if found := re.fullmatch(r"Expected '(.*?)'(?: of length (\d+))?, got (.*)", message):
        subject = f"{field} of {given}" if field and given != "it" else field or given
        return f"{subject} is {_wanted(found[1], found[2], found[3])}", "correct the value"
    if found := re.fullmatch(r"Invalid enum value '(.*)'", message):
        names = [name for name in _types_at(record_type, re.findall(r"[^.[\]]+", field)) if isinstance(name, str)]
        where = f" at {field}" if field else ""
        return f"{found[1]!r}{where} is none of {', '.join(names)}", _did_you_mean(found[1], names, "use one of them")
    what = f"{message} - at '{field}'" if field else message
    if found := re.search(r"unknown field '([^']*)'", message):
        if found[1] in REMOVED:
            return what, REMOVED[found[1]]
        return what, _did_you_mean(found[1], sorted(_field_names(record_type)), "remove it")
    return what, "correct the value"


def _wanted(types: str, length: str | None, got: str) -> str:
    """Return what a value should have been, of the types' names in a validation message, and what it is instead."""
    wanted = " or ".join(_TYPE_WORDS.get(name, name) for name in types.split(" | "))
    if length:
        return f"not {wanted} of {length} values (it has {got})"
    return f"not {wanted}" + (f" (it is {_TYPE_WORDS[got]})" if (got := got.strip("'")) in _TYPE_WORDS else "")


def _did_you_mean(name: str, known: list[str], otherwise: str) -> str:
    near = nearest(name, known)
    return f"did you mean {near}?" if near else otherwise


def _types_at(kind: Any, path: list[str]) -> Iterator[Any]:
    """Yield the types that a value may have at that path of field names, and the choices where it is one of some."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for field in msgspec.structs.fields(kind):
            if path[:1] == [field.encode_name]:
                yield from _types_at(field.type, path[1:])
        return
    if not path:
        yield kind
    for argument in get_args(kind):
        yield from _types_at(argument, path[1:] if path and path[0].isdecimal() else path)


def nearest(name: str, known: list[str]) -> str | None:
    """Return the most similar known name, quoted, or None."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"'{found[0]}'" if found else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; a torn last line is dropped, a missing file is empty."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def used_plan(run: Path) -> Plan:
    """Return the plan of a run with what training had to change of it for its machine (adaptations.jsonl)."""
    plan = load_as(run / "plan.json", Plan)
    changes = [event["changes"] for event in read_json_lines(run / "adaptations.jsonl") if event["event"] == "machine"]
    return msgspec.structs.replace(plan, **changes[-1]) if changes else plan


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_what_json_cannot_hold(raw: Any) -> None:
    """Raise ValueError for what Python's reader lets through: 1e999, integers above 64 bits, half a surrogate pair."""
    for field, value in _numbers(raw):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{field} is beyond 64 bits")
        if not math.isfinite(value):
            raise ValueError(f"{field} is {value}")
    msgspec.json.encode(raw)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PlanError(path, error.strerror or "cannot be read", "check the path") from None


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{name}[{index}]")
    elif isinstance(value, int | float):
        yield name, value


def _field_names(record_type: Any) -> set[str]:
    """Every field name reachable from the type, so that a near miss is found at any depth."""
    names: set[str] = set()
    if isinstance(record_type, type) and issubclass(record_type, msgspec.Struct):
        for field in msgspec.structs.fields(record_type):
            names.add(field.encode_name)
            names |= _field_names(field.type)
    for argument in get_args(record_type):
        names |= _field_names(argument)
    return names
