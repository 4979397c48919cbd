"""What was planned and why, and what the data set is: the plan as rows to read."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from effseg.plans import Config, Fingerprint, Plan, format_bytes
from effseg.report.wording import DASH, TIMES, spell, write_number

ALWAYS = (
    "spacing",
    "patch_size",
    "batch_size",
    "precision",
    "device",
    "network.encoder_layers",
    "network.growth_rate",
    "network.strides",
    "network.memory",
    "network.decoder",
    "network.head",
    "network.residual",
    "network.build",
    "network.arguments",
    "training.minutes",
    "training.epochs",
)
"""Choices a reader looks for, in this order, whether or not a reason was written down."""

UNITS = {"spacing": "mm", "patch_size": "voxels"}


@dataclass(frozen=True)
class Choice:
    """One choice of the plan, as written in the table."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Fact:
    """One line about the data set."""

    name: str
    value: str


def list_choices(plan: Plan) -> tuple[Choice, ...]:
    """The plan's choices with their reasons: the usual ones first, then what else has a reason."""
    rows = []
    reasons = {_full_name(plan, key): (key, reason) for key, reason in plan.reasons.items()}
    for name in (*ALWAYS, *(name for name in reasons if name not in ALWAYS)):
        found, value = _find(plan, name)
        key, reason = reasons.get(name, (name, ""))
        if (found and value is not None) or reason:
            shown = write_value(value, unit=UNITS.get(name.split(".")[-1], "")) if found else ""
            rows.append(Choice(name=spell(key), value=shown, reason=reason))
    return tuple(rows)


def list_facts(fingerprint: Fingerprint) -> tuple[Fact, ...]:
    """The data set in a few lines; (z, y, x) where there are three numbers."""
    spacings = list(zip(*fingerprint.spacings, strict=True))
    shapes = list(zip(*fingerprint.shapes, strict=True))
    extents = [
        [n * step for n, step in zip(lengths, steps, strict=True)]
        for lengths, steps in zip(shapes, spacings, strict=True)
    ]
    facts = [
        Fact("data set", fingerprint.dataset),
        Fact("cases", f"{fingerprint.n_cases}"),
        Fact("spacing (z, y, x)", f" {TIMES} ".join(_range(v) for v in spacings) + " mm"),
        Fact("shape (z, y, x)", f" {TIMES} ".join(_range(v) for v in shapes) + " voxels"),
        Fact("field of view", f" {TIMES} ".join(_range(v, digits=0) for v in extents) + " mm"),
    ]
    if fingerprint.ignore_label is not None:
        facts.append(Fact("left out of loss and score", f"label {fingerprint.ignore_label}"))
    return tuple(facts)


def write_value(value: Any, *, unit: str = "") -> str:
    """A plan's value as people write it."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if value is None:
        text = "none"
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, float):
        text = write_number(value)
    elif isinstance(value, dict):
        text = ", ".join(_write_entry(k, v) for k, v in value.items() if v is not None)
    elif isinstance(value, tuple | list):
        flat = all(isinstance(v, int | float) for v in value)
        text = (f" {TIMES} " if flat and len(value) == 3 else ", ").join(
            write_value(v) for v in value
        )
    else:
        text = str(value)
    return f"{text} {unit}".strip()


def _write_entry(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{spell(key.removesuffix('_bytes'))} {format_bytes(value)}"
    return f"{spell(key)} {write_value(value)}"


def _range(values: Sequence[float], *, digits: int | None = None) -> str:
    """The median, and the range where there is one."""

    def write(value: float) -> str:
        return write_number(value) if digits is None else f"{value:,.{digits}f}"

    low, middle, high = (write(f(values)) for f in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low}{DASH}{high})"


def _find(plan: Plan, name: str) -> tuple[bool, Any]:
    """Whether a dotted name leads somewhere in the plan, and what is there."""
    value: Any = plan
    for part in re.split(r"\.|\[|\]\.?", name):
        if isinstance(value, Config) and part in type(value).model_fields:
            value = getattr(value, part)
        elif isinstance(value, tuple) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif part:
            return False, None
    return True, value


def _full_name(plan: Plan, key: str) -> str:
    """A reason's key as a dotted name: `growth_rate` is `network.growth_rate`."""
    if _find(plan, key)[0]:
        return key
    for part in ("network", "training", "training.optimizer", "training.loss", "inference"):
        if _find(plan, f"{part}.{key}")[0]:
            return f"{part}.{key}"
    return key
