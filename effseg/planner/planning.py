"""From a fingerprint and a budget to a plan, every number with its reason."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effseg.dataset import Dataset, read_dataset
from effseg.devices import device_kind
from effseg.errors import MemoryBudgetError, PlanError
from effseg.memory import MemoryReport, parse_budget
from effseg.networks import maker_of
from effseg.planner import reasons
from effseg.planner.facts import Progress, fingerprint
from effseg.planner.geometry import median_shape, target_spacing
from effseg.planner.host import planned_loader_bytes, training_peak
from effseg.planner.imported import imported_network, search_imported, why_imported
from effseg.planner.machine import choose_device, choose_precision
from effseg.planner.rates import machine_rates
from effseg.planner.recipe import (
    FOREGROUND,
    LESION_FOREGROUND,
    choose_flips,
    choose_loss,
    choose_postprocess,
    has_lesions,
    learning_rate,
    normalisation,
)
from effseg.planner.scaling import scale_of
from effseg.planner.wish import Wish, sized
from effseg.plans import (
    AugmentConfig,
    Channel,
    Fingerprint,
    InferenceConfig,
    Label,
    Memory,
    OptimizerConfig,
    Plan,
    PlannedNetwork,
    Policy,
    TrainingConfig,
    format_bytes,
    format_shape,
)


def plan(
    dataset: Dataset | str | Path | Fingerprint,
    *,
    memory: str | int,
    size: str | None = None,
    network: str | None = None,
    network_options: Mapping[str, Any] | None = None,
    device: str | None = None,
    augment: Policy = "default",
    progress: Progress | None = None,
) -> Plan:
    """Plan a training that fits a memory budget; nothing is trained or allocated for it.

    Args:
        dataset: a `Dataset`, its folder or CSV, or a fingerprint taken before.
        memory: the budget: of the GPU, or of this process beyond its imports on a CPU; "8GiB", or
            "auto": what is free, less a margin.
        size: of the network, "b0" to "b7"; None: the largest that fits and is quick once a patch
            shows the median case, else b0.
        network: "module:name" of a class or a function that makes a network, called with
            in_channels and out_channels; "monai:SegResNet" is MONAI's. None: effseg's own.
        network_options: what else it is called with; of effseg's own fields of `NetworkConfig`,
            {"decoder": "linknet", "head": "pyramid", "residual": True} for one.
        device: "cpu" or "cuda", which need not be here; None: CUDA where torch sees it.
        augment: the policy, by name, that training patches are changed by.
        progress: called after each case that is read.

    Returns:
        The plan; `plan.reasons` says why each choice was made.

    Raises:
        PlanError: if the budget is no size, the size or the device are unknown, or the network
            cannot be made, traced or has no such option.
        MemoryBudgetError: if nothing fits; says what would.
        DataError: if a case cannot be used.
    """
    if network is not None and size is not None:
        raise PlanError(f"size {size!r} beside network {network!r}; sizes are of effseg's own")
    if network is not None:
        maker_of(network)  # refuses what is not there before any case is read
    device, why_device = choose_device(device)
    kind = device_kind(device)
    budget, why_budget = parse_budget(memory, device)
    if isinstance(dataset, Fingerprint):
        facts = dataset
    else:
        if not isinstance(dataset, Dataset):
            dataset = read_dataset(dataset)
        facts = fingerprint(dataset, progress=progress)
    spacing, why_spacing = target_spacing(facts)
    precision, why_precision = choose_precision(kind)
    median = median_shape(facts, spacing)
    loss, why_loss = choose_loss(facts)
    wish = Wish(
        facts=facts,
        spacing=spacing,
        median=median,
        loss=loss,
        precision=precision,
        device=kind,
        budget_bytes=budget,
        rates=machine_rates(kind, precision),
        options={} if network is not None else network_options or {},
    )
    config: PlannedNetwork
    if network is not None:
        config = imported_network(network, network_options or {}, facts)
        answer, why_network = search_imported(wish, config), why_imported(config)
    else:
        scale = None if size is None else scale_of(size)
        scale, answer = sized(wish) if scale is None else (scale, wish.search(scale).run())
        config = wish.config(answer.step.patch, answer.step.mode, scale)
        why_network = reasons.why_network(config, scale, wish.options)
    step = answer.step
    rule, why_rule = choose_postprocess(facts)
    rate, why_rate = learning_rate(step.batch)
    flips, why_flips = choose_flips(facts)
    channels = tuple(Channel(name=c.name, normalisation=normalisation(c)) for c in facts.channels)
    labels = (
        Label(value=0, name="background"),
        *(Label(value=label.value, name=label.name) for label in facts.labels),
    )
    said = {
        "device": why_device,
        "precision": why_precision,
        "spacing": why_spacing,
        "patch_size": reasons.why_patch(answer, median, wish),
        "batch_size": reasons.why_batch(answer, wish),
        "network": why_network,
        "budget": why_budget,
        "memory": reasons.why_memory(step, budget),
        "recompute": reasons.why_recompute(step),
        "loss": why_loss,
        "learning_rate": why_rate,
        "augment": why_flips,
        "normalisation": "; ".join(
            f"{c.name}: {'CT' if c.is_ct else 'z-score'}, {c.why}" for c in facts.channels
        ),
        "postprocess": why_rule,
    }
    made = Plan(
        dataset=facts.dataset,
        channels=channels,
        labels=labels,
        ignore_label=facts.ignore_label,
        spacing=spacing,
        patch_size=step.patch,
        batch_size=step.batch,
        precision=precision,
        device=device,
        network=config,
        policies=dict(step.policies),
        sample_by_sample=step.split,
        training=TrainingConfig(
            loss=loss,
            foreground=LESION_FOREGROUND if has_lesions(facts) else FOREGROUND,
            augment=AugmentConfig(policy=augment, flip_axes=flips),
            optimizer=OptimizerConfig(learning_rate=rate),
        ),
        inference=InferenceConfig(postprocess=rule),
        memory=Memory(
            budget_bytes=budget,
            peak_bytes=step.peak_bytes,
            saved_bytes=step.report.saved_bytes,
            heap=step.heap,
        ),
        reasons=said,
        alternatives=answer.alternatives,
        fingerprint=facts,
    )
    return _with_all_memory(made, step.report)


def _with_all_memory(plan: Plan, report: MemoryReport) -> Plan:
    """The plan with what loading and scoring patches take.

    Raises:
        MemoryBudgetError: if these do not fit although the step does.
    """
    memory = plan.memory.model_copy(update={"loader_bytes": planned_loader_bytes(plan)})
    plan = plan.model_copy(update={"memory": memory})
    peak = training_peak(plan, report)
    if peak > memory.budget_bytes:
        raise MemoryBudgetError(
            f"a step fits into {format_bytes(memory.budget_bytes)}, but scoring or loading patches "
            f"of {format_shape(plan.patch_size)} with {len(plan.labels)} classes takes "
            f"{format_bytes(peak)}: --memory {-(-peak // 2**20)}MiB would do"
        )
    return plan.model_copy(update={"memory": memory.model_copy(update={"peak_bytes": peak})})
