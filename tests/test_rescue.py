"""Steps that run out of memory: done again with less, and the optimizer notices nothing."""

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from effseg.errors import MemoryBudgetError
from effseg.losses import DeepSupervisionLoss, build_loss
from effseg.memory import apply_policy, stage_policies
from effseg.networks import DenseUNet, build_network
from effseg.plans import LossConfig, NetworkConfig
from effseg.training.rescue import Rescue, is_out_of_memory
from effseg.training.step import SampleBySample

CONFIG = NetworkConfig(
    in_channels=1,
    out_channels=3,
    stem_channels=4,
    growth_rate=4,
    encoder_layers=(1, 2, 1),
    decoder_layers=(1, 1),
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    kernels=((3, 3, 3),) * 3,
    dropout=0.3,
)
N_STEPS = 3


def refused(*calls: bool) -> Callable[[], None]:
    """Raises as CUDA does, at each call that is marked; later ones go well."""
    left = list(calls)

    def refuse() -> None:
        if left and left.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nadvice")

    return refuse


@contextmanager
def refusing(network: DenseUNet, where: str, refuse: Callable[[], None]) -> Iterator[None]:
    """Memory is refused in the middle of forward or of backward, whenever `refuse` says so."""

    def look(module: nn.Module, inputs: object, output: Tensor) -> None:
        del module, inputs
        if where == "forward":
            refuse()
        elif output.requires_grad:
            output.register_hook(lambda _: refuse())

    hook = network.encoder[1].register_forward_hook(look)
    try:
        yield
    finally:
        hook.remove()


def build(**changes: object) -> Rescue:
    torch.manual_seed(0)
    deep = bool(changes.get("deep_supervision", False))
    over_batch = bool(changes.pop("dice_over_batch", True))
    dtype = changes.pop("dtype", torch.float32)
    batch_size = changes.pop("batch_size", 3)
    network = build_network(CONFIG.model_copy(update=changes)).to(dtype)
    config = LossConfig(dice_over_batch=over_batch)
    loss = build_loss(config, ignore_label=3, n_classes=3)
    return Rescue(network, DeepSupervisionLoss(loss) if deep else loss, batch_size=batch_size)


def trained(rescue: Rescue, optimizer: torch.optim.Optimizer) -> list[float]:
    """Some steps on random batches; the losses."""
    network, losses = rescue.network, []
    dtype = next(network.parameters()).dtype
    torch.manual_seed(1)
    shape = (rescue.batch_size, 1, 8, 8, 8)
    batches = [
        (torch.randn(shape).to(dtype), torch.randint(0, 4, (shape[0], *shape[2:])).byte())
        for _ in range(N_STEPS)
    ]
    torch.manual_seed(2)
    for i, (image, label) in enumerate(batches):

        def closure(image: Tensor = image, label: Tensor = label) -> float:
            loss = rescue.step.loss(image, label)
            rescue.step.backward(loss)
            return float(loss.detach())

        losses.append(rescue.run(closure, epoch=0, step=i))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


LOSSES = {
    "deep": {"deep_supervision": True},
    "over-batch": {"dice_over_batch": True},
    "by-sample": {"dice_over_batch": False},
}


@pytest.mark.parametrize(
    ("memory", "where", "loss"),
    [
        *itertools.product(("plain", "shared"), ("forward", "backward"), ("deep", "over-batch")),
        ("shared", "backward", "by-sample"),
    ],
)
def test_the_optimizer_notices_nothing(memory, where, loss) -> None:
    """Refused in step 1 and, recomputing, in step 2; AdamW would make much of a little."""
    undisturbed, disturbed = (
        build(memory=memory, dtype=torch.float64, **LOSSES[loss]) for _ in range(2)
    )
    expected = trained(undisturbed, torch.optim.AdamW(undisturbed.network.parameters(), lr=1e-3))
    optimizer = torch.optim.AdamW(disturbed.network.parameters(), lr=1e-3)
    with refusing(disturbed.network, where, refused(False, True, False, True)):
        losses = trained(disturbed, optimizer)
    assert [event.step for event in disturbed.events] == [1, 2]
    assert isinstance(disturbed.step, SampleBySample)
    assert losses == pytest.approx(expected, abs=1e-12)
    same_weights(disturbed.network, undisturbed.network, atol=1e-12)


@pytest.mark.parametrize("memory", ["plain", "shared", "checkpoint"])
def test_in_float32_weights_are_the_same_to_rounding(memory) -> None:
    """By gradient descent: AdamW takes a rounded zero for a direction."""
    undisturbed, disturbed = (build(memory=memory) for _ in range(2))
    trained(undisturbed, torch.optim.SGD(undisturbed.network.parameters(), lr=1e-3))
    optimizer = torch.optim.SGD(disturbed.network.parameters(), lr=1e-3)
    with refusing(disturbed.network, "backward", refused(True, True)):
        trained(disturbed, optimizer)
    assert isinstance(disturbed.step, SampleBySample)
    same_weights(disturbed.network, undisturbed.network, atol=1e-6)


def same_weights(one: nn.Module, other: nn.Module, *, atol: float) -> None:
    for name, weight in other.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], weight, rtol=0, atol=atol)


def test_batch_norm_is_recomputed_but_never_split() -> None:
    rescue, undisturbed = (build(norm="batch", dtype=torch.float64) for _ in range(2))
    trained(undisturbed, torch.optim.AdamW(undisturbed.network.parameters(), lr=1e-3))
    optimizer = torch.optim.AdamW(rescue.network.parameters(), lr=1e-3)
    with refusing(rescue.network, "backward", refused(False, True)):
        trained(rescue, optimizer)
    # running statistics too: the step that was given up had moved them
    same_weights(rescue.network, undisturbed.network, atol=1e-12)
    with (
        refusing(rescue.network, "forward", refused(True)),
        pytest.raises(MemoryBudgetError, match="cannot be split: batch norm needs it whole"),
    ):
        trained(rescue, optimizer)


def test_when_nothing_is_left_it_says_what_was_tried() -> None:
    rescue = build()
    optimizer = torch.optim.AdamW(rescue.network.parameters(), lr=1e-3)
    with (
        refusing(rescue.network, "backward", refused(True, True, True)),
        pytest.raises(MemoryBudgetError) as caught,
    ):
        trained(rescue, optimizer)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        "step 0 ran out of memory (CUDA out of memory. Tried to allocate 2.00"
    )
    assert "change: 9 more stages are recomputed in backward; 3 samples of a batch go" in message
    assert "smaller --memory" in message
    assert [event.changed for event in rescue.events][-1] == "nothing was left to change"
    assert all(parameter.grad is None for parameter in rescue.network.parameters())


def test_one_sample_cannot_be_split() -> None:
    rescue = build(batch_size=1)
    optimizer = torch.optim.AdamW(rescue.network.parameters(), lr=1e-3)
    with (
        refusing(rescue.network, "forward", refused(True, True)),
        pytest.raises(MemoryBudgetError, match="cannot be split: the batch is one sample"),
    ):
        trained(rescue, optimizer)


def test_stages_that_are_offloaded_stay_so() -> None:
    rescue = build()
    apply_policy(
        rescue.network,
        {"encoder.0": "offload", "decoder.0.denselayer1.conv2": "offload", "up.0": "recompute"},
    )
    with refusing(rescue.network, "forward", refused(True)):
        trained(rescue, torch.optim.SGD(rescue.network.parameters(), lr=1e-3))
    policies = stage_policies(rescue.network)
    assert policies["encoder.0"] == policies["decoder.0.denselayer1.conv2"] == "offload"
    assert "decoder.0" not in policies
    assert policies["encoder.1"] == policies["up.0"] == policies["down.1"] == "recompute"
    assert rescue.events[0].changed == "from now on 6 more stages are recomputed in backward"


def test_the_dead_graph_is_gone_before_the_step_is_done_again() -> None:
    rescue, alive = build(), []
    seen: list[weakref.ref[Tensor]] = []

    def look(module: nn.Module, inputs: object, output: Tensor) -> None:
        del module, inputs
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(output))

    rescue.network.encoder[0].register_forward_hook(look)
    with refusing(rescue.network, "forward", refused(True)):
        trained(rescue, torch.optim.SGD(rescue.network.parameters(), lr=1e-3))
    assert alive[1] == 0


def test_mixed_precision_holds_in_a_samples_second_forward() -> None:
    rescue = build()
    step = SampleBySample(rescue.network, rescue.batch_loss)
    dtypes = []
    rescue.network.encoder[1].register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    image, label = torch.randn(3, 1, 8, 8, 8), torch.zeros(3, 8, 8, 8, dtype=torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = step.loss(image, label)
    step.backward(loss)
    assert dtypes == [torch.bfloat16] * 6


@pytest.mark.gpu
def test_a_card_that_refuses_memory_does_not_end_a_training() -> None:
    image = torch.randn(4, 1, 64, 64, 64, device="cuda")
    label = torch.randint(0, 3, (4, 64, 64, 64), dtype=torch.uint8, device="cuda")
    gradients, peak = [], 0
    for is_short in (False, True):
        rescue = build(memory="plain", batch_size=4)
        rescue.network.to("cuda")

        def closure(rescue: Rescue = rescue) -> None:
            rescue.step.backward(rescue.step.loss(image, label))

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_reserved()
        if is_short:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((held + 0.5 * (peak - held)) / total)
        try:
            torch.manual_seed(0)
            rescue.run(closure, epoch=0, step=0)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        peak = torch.cuda.max_memory_reserved()
        gradients.append([p.grad for p in rescue.network.parameters()])
    assert rescue.events
    assert "out of memory" in rescue.events[0].asked
    for got, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError("Unable to allocate 3 GiB for an array"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate"),
            False,
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes."), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried 8 bytes."), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_other_errors_pass_as_they_are() -> None:
    rescue = build()

    def closure() -> None:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        rescue.run(closure, epoch=0, step=0)
    assert not rescue.events
