"""What differs between two runs, in words that a person would use for it."""

from collections.abc import Iterator, Mapping
from typing import Any

from effseg.plans import Plan, format_bytes
from effseg.record import RunRecord

FOLLOWS = frozenset(
    {
        "alternatives",
        "dataset",
        "fingerprint",
        "format",
        "memory.loader_bytes",
        "memory.peak_bytes",
        "memory.saved_bytes",
        "reasons",
    }
)
"""Of a plan: what follows from its choices, or is said of the data by the record."""

MOST_STAGES = 3
"""Whose policies are named one by one."""


def list_changes(
    parent: tuple[Plan, RunRecord | None], run: tuple[Plan, RunRecord | None]
) -> tuple[str, ...]:
    """Data first, then the plan's choices in its order, then versions; empty if nothing differs.

    Args:
        parent: plan and record of the run that came before.
        run: plan and record of the one that is told about.

    Returns:
        Phrases such as `training.loss.focal_gamma 0 -> 2`; `-` where one has no such choice.
    """
    (old_plan, old), (new_plan, new) = parent, run
    changes = list(_of_plans(old_plan, new_plan))
    if old is None or new is None:
        return tuple(changes)
    return (*_of_data(old, new), *changes, *_of_versions(old, new))


def _of_data(old: RunRecord, new: RunRecord) -> Iterator[str]:
    if old.dataset != new.dataset:
        yield f"data {old.dataset} -> {new.dataset}"
        return
    if old.fold != new.fold:
        yield f"fold {_written('', old.fold)} -> {_written('', new.fold)}"
        return
    for what, before, after in (
        ("training", old.train, new.train),
        ("validation", old.validation, new.validation),
    ):
        more, fewer = len(set(after) - set(before)), len(set(before) - set(after))
        if more or fewer:
            yield f"{what} cases +{more} -{fewer}"


def _of_plans(old: Plan, new: Plan) -> Iterator[str]:
    before, after = (dict(_leaves(plan.model_dump())) for plan in (old, new))
    policies = []
    for name in dict.fromkeys((*after, *before)):
        ours, theirs = (_written(name, leaves.get(name, "-")) for leaves in (before, after))
        if ours == theirs:
            continue
        phrase = f"{name} {ours} -> {theirs}"
        if name.startswith("policies."):
            policies.append(phrase)
        else:
            yield phrase
    if len(policies) > MOST_STAGES:
        yield f"policies of {len(policies)} stages"
    else:
        yield from policies


def _of_versions(old: RunRecord, new: RunRecord) -> Iterator[str]:
    for name in ("effseg", "torch", "lightning", "monai", "python", "n_devices"):
        before, after = getattr(old, name), getattr(new, name)
        if before and after and before != after:
            yield f"{name} {before} -> {after}"


def _leaves(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all that is no mapping; parts in a list go by their names."""
    for key, value in content.items():
        name = f"{path}{key}"
        if name in FOLLOWS:
            continue
        if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            value = {str(part.get("name", i)): part for i, part in enumerate(value)}
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _written(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return f"({', '.join(_written('', part) for part in value)})"
    return str(value)
