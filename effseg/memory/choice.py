"""Which stages of a network to recompute or offload, so that a training step fits a budget."""

from collections.abc import Callable, Iterator, Mapping

from torch import nn

from effseg.errors import MemoryBudgetError
from effseg.memory.policy import Policy, can_run, replace_policies, stage_policies
from effseg.memory.report import MemoryReport
from effseg.plans import format_bytes

LEAST_SHARE = 0.01
"""A stage that saves less than this share of what the network saves is not worth a choice."""
FEW_STAGES = 3
MOST_WEIGHED = 12
"""Stages among whose combinations, 2 to that power at most, the best is looked for."""


def choose_policy(
    network: nn.Module, trace: Callable[[nn.Module], MemoryReport], *, budget_bytes: int
) -> dict[str, Policy]:
    """Find the least to recompute, or else to offload, for a step to fit into a budget.

    Recomputation is tried from the outside in: of the outermost modules those that together save
    just what is missing, since what is saved is about what is computed twice; where that is not
    enough, more of them, and then the same among their parts. If none of that fits, the outermost
    modules are offloaded, those that save most first, and last the network as a whole.

    Args:
        network: any module; policies it has are not counted, and are there again afterwards.
        trace: tells the memory of a step, for one `functools.partial(trace_peak,
            input_shape=(1, 4, 128, 128, 128), autocast=torch.bfloat16)`. It is called once for each
            choice that is looked at.
        budget_bytes: for the peak.

    Returns:
        What to give to `apply_policy`; empty where the network fits as it is.

    Raises:
        MemoryBudgetError: if no choice fits.
    """
    earlier = stage_policies(network)
    peaks: list[int] = []

    def missing(choice: dict[str, Policy]) -> int:
        replace_policies(network, choice)
        peaks.append(trace(network).peak_bytes)
        return peaks[-1] - budget_bytes

    try:
        replace_policies(network, {})
        plain = trace(network)
        lack = plain.peak_bytes - budget_bytes
        if lack <= 0:
            return {}
        levels = list(_levels(network, _saved_bytes(network, plain)))
        for stages in levels:
            if choice := _least_recomputed(stages, missing, lack):
                return choice
        for order in (*(list(stages) for stages in levels[:1]), [""]):
            for n in range(1, len(order) + 1):
                choice = dict.fromkeys(order[:n], "offload")
                if missing(choice) <= 0:
                    return choice
    finally:
        replace_policies(network, earlier)
    raise MemoryBudgetError(
        f"a training step of {type(network).__name__} takes {format_bytes(min(peaks))} at least, "
        f"whatever is recomputed or offloaded; the budget is {format_bytes(budget_bytes)}: shrink "
        "the patch or the batch"
    )


def outermost_stages(network: nn.Module, report: MemoryReport) -> list[str]:
    """The stages whose recomputation takes least memory, those that save most first.

    The outermost modules; their parts where there are but one or two of these, since a network that
    is recomputed as a whole keeps in backward what it would have kept before.

    Args:
        network: any module.
        report: of a step of it, with the policies it has.
    """
    stages: list[str] = []
    for level in _levels(network, _saved_bytes(network, report)):
        stages = list(level)
        if len(stages) >= FEW_STAGES:
            break
    return stages


def outermost_parts(network: nn.Module) -> list[str]:
    """The outermost modules that are worth a policy, by path, in the network's order.

    Of one that is never called (`nn.ModuleList`) its parts; none that is a single operator of
    torch.
    """
    first = {module: path for path, module in network.named_modules()}
    return list(dict.fromkeys(first[module] for module in _parts(network)))


def _least_recomputed(
    saved: Mapping[str, int], missing: Callable[[dict[str, Policy]], int], lack: int
) -> dict[str, Policy]:
    """Of stages that save so much, those to recompute; none where even all of them do not do.

    Args:
        saved: by path.
        missing: traces a choice and tells by how many bytes it does not fit.
        lack: by how many bytes nothing recomputed does not fit.
    """
    wanted = lack
    while True:
        stages = lightest(saved, wanted)
        choice: dict[str, Policy] = dict.fromkeys(stages, "recompute")
        lack = missing(choice)
        if lack <= 0:
            return choice
        if len(stages) == len(saved):
            return {}
        # the peak fell by less than is saved: ask for what is missing yet, and for another stage
        wanted = sum(saved[path] for path in stages) + lack


def lightest(weights: Mapping[str, int], least: int) -> list[str]:
    """The items of least total weight that together weigh so much; all where even they do not.

    Of equal totals that of fewer items, and of the earlier ones. Among more than `MOST_WEIGHED`
    the heaviest are looked at alone; where these do not do, the next heaviest are added one by one.
    """
    if sum(weights.values()) <= least:
        return list(weights)
    by_weight = sorted(weights, key=lambda name: -weights[name])
    heavy = set(by_weight[:MOST_WEIGHED])
    totals: dict[int, list[str]] = {0: []}  # the first of the shortest ways to each total
    for name in (name for name in weights if name in heavy):
        for total, taken in list(totals.items()):
            known = totals.get(total + weights[name])
            if known is None or len(taken) + 1 < len(known):
                totals[total + weights[name]] = [*taken, name]
    enough = [total for total in totals if total >= least]
    if enough:
        return totals[min(enough)]
    total = sum(weights[name] for name in heavy)
    taken = by_weight[:MOST_WEIGHED]
    for name in by_weight[MOST_WEIGHED:]:
        if total >= least:
            break
        taken.append(name)
        total += weights[name]
    return taken


def _saved_bytes(network: nn.Module, report: MemoryReport) -> dict[str, int]:
    """What each module of the network saves, parts aside, by its path."""
    saved: dict[str, int] = {}
    for event in report.timeline:
        outermost, _, path = event.module.partition(".")
        if outermost == type(network).__name__:
            saved[path] = saved.get(path, 0) + event.saved_bytes
    return saved


def _levels(network: nn.Module, saved: dict[str, int]) -> Iterator[dict[str, int]]:
    """What stages save, from the outside in; at each level those that save most come first."""
    first = {module: path for path, module in network.named_modules()}
    least = max(1, LEAST_SHARE * sum(saved.values()))

    def weight(path: str) -> int:
        return sum(n for part, n in saved.items() if f"{part}.".startswith(f"{path}."))

    level = list(_parts(network))
    while level:
        weights = {first[module]: weight(first[module]) for module in level}
        stages = [path for path in weights if weights[path] >= least]
        if stages:
            yield {path: weights[path] for path in sorted(stages, key=lambda path: -weights[path])}
        level = [
            part for module in level if weights[first[module]] >= least for part in _parts(module)
        ]


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules within that are called."""
    for part in module.children():
        if not can_run(part):
            yield from _parts(part)
        # a single operator of torch saves its input, as its recomputation would
        elif not type(part).__module__.startswith("torch.nn.modules") or any(part.children()):
            yield part
