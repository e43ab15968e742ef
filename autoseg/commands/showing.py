"""What all commands share: where they speak, their cache, their JSON."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from autoseg.data.codes import default_cache
from autoseg.plan import own_or_shipped
from autoseg.report import terminal
from autoseg.schema import Plan, load_as

EXIT_OK, EXIT_STOPPED = 0, 143


def consoles(options: argparse.Namespace) -> tuple[Console, Console]:
    """Return where to say what goes on (stderr; --quiet silences it), and results (stdout but for --json)."""
    return terminal.make_console(quiet=options.quiet), terminal.make_console(stdout=not options.json)


def cache_of(options: argparse.Namespace) -> Path:
    """Return the folder of the cache."""
    cache: Path = options.cache or default_cache()
    return cache


def find_plan(options: argparse.Namespace, console: Console) -> Plan:
    """Return the plan at the path of --plan, or the shipped one that it names, which is said."""
    path = own_or_shipped(options.plan, "plans")
    if path != options.plan:
        console.print(f"there is no {options.plan}: the shipped {path} is used")
    return load_as(path, Plan)


def tell_cache(options: argparse.Namespace, console: Console) -> None:
    """Say, at the end, where the cache is and how large what autoseg wrote there."""
    cache = cache_of(options)
    size = 0
    for part in ("codes", "checksums", "em"):
        for folder, _, files in os.walk(cache / part):
            for name in files:
                with contextlib.suppress(OSError):
                    size += os.stat(os.path.join(folder, name)).st_size
    console.print(f"code cache {cache}, {size / 2**20:.0f} MiB (deleting it is always safe)", style="dim")


def print_json(options: argparse.Namespace, value: Any) -> None:
    """Print one JSON object to stdout, where --json asks for it."""
    if options.json:
        print(msgspec.json.encode(value, enc_hook=str).decode())
