"""What every record is: frozen, keyword-only, strict. An artifact carries `kind` and `schema_version`."""

from __future__ import annotations

import msgspec

SCHEMA_VERSION = 1


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen value; unknown keys are refused when it is read."""


class Artifact(Record, frozen=True, kw_only=True, tag_field="kind"):
    """A record that is a file of its own."""

    schema_version: int = SCHEMA_VERSION
