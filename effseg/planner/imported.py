"""Plans for networks of others: what one takes and gives, and the best step of it that fits."""

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from effseg.errors import PlanError
from effseg.files import name_places
from effseg.memory import trace_peak
from effseg.memory.trace import mean_of_outputs
from effseg.networks import build_network, why_whole
from effseg.planner.candidates import SMALLEST_BATCH, Candidates
from effseg.planner.geometry import patches_of_stride
from effseg.planner.search import Answer, Search
from effseg.planner.step import PlannedTraining, beside_training
from effseg.planner.tuning import COARSEST, network_stride
from effseg.planner.wish import Wish
from effseg.plans import Fingerprint, ImportedNetwork

logger = logging.getLogger("effseg")


def imported_network(
    build: str, arguments: Mapping[str, Any], facts: Fingerprint
) -> ImportedNetwork:
    """The network for a data set, asked on tensors without memory what it takes and gives.

    Args:
        build: module:name of a class or a function that makes it.
        arguments: what it is called with, beside channels.
        facts: of the data set.

    Raises:
        PlanError: if it cannot be made or traced, takes no patch, or gives no logits of the data
            set's classes.
    """
    try:
        config = ImportedNetwork(
            kind="imported",
            build=build,
            arguments=dict(arguments),
            in_channels=len(facts.channels),
            out_channels=1 + len(facts.labels),
        )
    except ValidationError as error:
        raise PlanError(f"network: {name_places(error, what='network')}") from error
    stride = network_stride(build_network(config), config.in_channels)
    config = config.model_copy(update={"stride": stride})
    return config.model_copy(update={"deep_supervision": len(_outputs(config)) > 1})


def search_imported(wish: Wish, config: ImportedNetwork) -> Answer:
    """The best step of such a network that fits the budget.

    Raises:
        MemoryBudgetError: if the smallest patch does not fit; says what would do.
        PlanError: if no step can be traced.
    """
    candidates = Candidates(
        subject=PlannedTraining(
            build_config=lambda *_: config,
            loss=wish.loss,
            ignored=wish.facts.ignore_label is not None,
            precision=wish.precision,
            device=wish.device,
            modes=("plain",),
            can_split=why_whole(build_network(config)) is None,
        ),
        patches=list(patches_of_stride(wish.median, wish.spacing, config.stride)),
        budget_bytes=wish.budget_bytes,
        device=wish.device,
        rates=wish.rates,
        beside_bytes=lambda report: beside_training(report, wish.device),
    )
    search = Search(candidates, longest=wish.pace if wish.device == "cpu" else None)
    try:
        return search.run()
    except (ArithmeticError, RuntimeError, ValueError) as error:  # whatever its own code raises
        said = str(error).partition("\n")[0]
        raise PlanError(
            f"{config.words} makes no training step of the data set's patches ({said}); the "
            "smallest may be too small for it"
        ) from error


def why_imported(config: ImportedNetwork) -> str:
    """What such a network is, and what does not hold of it; that is warned of as well."""
    why_not = why_whole(build_network(config))
    if why_not is not None:
        logger.warning(
            "%s: samples of a batch do not go through it one after the other (%s), in a budget or "
            "when memory is refused",
            config.build,
            why_not,
        )
    return (
        f"{config.words}, as asked; patches are multiples of {config.stride}; logits and their "
        "gradient exist in full, and counted"
        + ("" if why_not is None else f"; a batch is not split: {why_not}")
    )


def _outputs(config: ImportedNetwork) -> list[tuple[int, ...]]:
    """The shapes that the network gives in training, of a small batch.

    Raises:
        PlanError: if they are no logits, or the network cannot be traced.
    """
    side = COARSEST * config.stride
    given = (SMALLEST_BATCH, config.in_channels, side, side, side)
    found: list[Any] = []

    def tell(output: Any) -> Tensor:
        parts = output if isinstance(output, list | tuple) else [output]
        found.extend(tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in parts)
        return mean_of_outputs(output)

    try:
        trace_peak(build_network(config).train(), given, loss=tell, device="cpu")
    except PlanError:
        raise
    except Exception as error:  # whatever its own code raises
        said = str(error).partition("\n")[0]
        raise PlanError(f"{config.words} cannot be trained on {given}: {said}") from error
    logits = (SMALLEST_BATCH, config.out_channels)
    space = given[2:]
    if not (
        all(len(shape) == 5 and shape[:2] == logits for shape in found)
        and found[0][2:] == space
        and all(n % m == 0 for shape in found for n, m in zip(space, shape[2:], strict=True))
    ):
        raise PlanError(
            f"{config.words} gives {', '.join(map(str, found))} of {given}; expected logits "
            f"{(*logits, *space)}, or a list of them, the finest first: correct network.arguments"
        )
    return found
