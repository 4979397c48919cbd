"""A segmenter and a discriminator: what a step of either does, and how good they are."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from effseg.devices import AUTOCAST
from effseg.errors import CheckpointError, DataError
from effseg.networks.freezing import freeze_for_start
from effseg.plans import AdversarialConfig, Plan
from effseg.training.discriminator import Discriminator, probabilities_of, surprise
from effseg.training.frozen import Frozen, evaluating
from effseg.training.module import SegmentationModule
from effseg.training.snapshot import State, random_state, restore_random
from effseg.training.stages import Stage

Labelled: TypeAlias = Iterable[tuple[Tensor, Tensor]]
"""Patches, image (C, z, y, x) and label (z, y, x)."""


class Pair:
    """Both networks with their optimizers.

    The segmenter's loss is the plan's plus `weight` times how surprised the discriminator is that
    it should know a scan that it never saw. The two parts are taken one after the other, gradients
    added up, so that their activations never live at once. Between steps there are no gradients.

    Args:
        plan: with its `adversarial` part, minutes or epochs set.
        device: to train on.
        fresh: leave the weights to start from alone: a state will take their place.
    """

    def __init__(self, plan: Plan, device: torch.device, *, fresh: bool = False) -> None:
        assert plan.adversarial is not None
        self.plan, self.config, self.device = plan, plan.adversarial, device
        module = self.module = SegmentationModule(plan, fresh=fresh).to(device)
        self.segmenter = module.network
        self.averaged = module.averaged.eval()
        self._by_labels = module.rescue.step
        self.discriminator = build_discriminator(plan, self.config).to(device)
        self.optimizers: dict[str, Optimizer] = {
            "segmenter": module.configure_optimizers(),
            "discriminator": AdamW(self.discriminator.parameters(), lr=self.config.learning_rate),
        }
        self.n_segmenter_steps = 0
        # samples see nothing of each other here, so that they may go one after the other
        self._at_once = 1 if plan.sample_by_sample else plan.batch_size
        kind, lower = device.type, AUTOCAST[plan.precision]
        self._autocast = partial(torch.autocast, kind, dtype=lower, enabled=lower is not None)

    def enter(self, stage: Stage) -> Frozen:
        """Whoever's turn it is learns; the other is frozen, and returned as such."""
        players = {"segmenter": self.segmenter, "discriminator": self.discriminator}
        learner: nn.Module = players.pop(stage.player)
        ((name, other),) = players.items()
        learner.train().requires_grad_(requires_grad=True)
        if learner is self.segmenter:  # parts of it may stand still all the time
            freeze_for_start(self.segmenter, self.plan.training.start)
        return Frozen(other, name=name, stage=stage.name)

    def learn_labels(self, image: Tensor, label: Tensor) -> float:
        """Gradients of the plan's loss on an annotated batch; the loss."""
        with self._autocast():
            loss = self._by_labels.loss(image.to(self.device), label.to(self.device))
        self._by_labels.backward(loss)
        return _finite(float(loss.detach()))

    def learn_verdict(self, scans: Tensor) -> float:
        """Add the segmenter's gradients of the discriminator's verdict on a batch of scans."""
        scans, total = scans.to(self.device), 0.0
        for part in scans.split(self._at_once):
            weight = self.config.weight * len(part) / len(scans)
            with self._autocast():
                verdicts = self.discriminator(part, probabilities_of(self.segmenter(part)))
                loss = weight * surprise(verdicts, known=True)
            loss.backward()
            total += float(loss.detach())
        return _finite(total)

    def move_segmenter(self) -> None:
        """The segmenter's step along its gradients; the averaged weights follow."""
        optimizer, planned = self.optimizers["segmenter"], self.plan.training.optimizer
        self.n_segmenter_steps += 1
        share = min(1.0, self.n_segmenter_steps / max(self.config.warmup_steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = planned.learning_rate * share
        nn.utils.clip_grad_norm_(self.segmenter.parameters(), planned.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.averaged.update_parameters(self.segmenter)

    def learn_to_tell(self, scans: Tensor, *, known: bool) -> float:
        """Add the discriminator's gradients on a batch that the segmenter knows, or does not."""
        scans, total = scans.to(self.device), 0.0
        for part in scans.split(self._at_once):
            with self._autocast():
                with torch.no_grad():
                    made = probabilities_of(self.segmenter(part))
                verdicts = self.discriminator(part, made)
                loss = surprise(verdicts, known=known) * len(part) / (2 * len(scans))
            loss.backward()
            total += float(loss.detach())
        return _finite(total)

    def move_discriminator(self) -> None:
        """The discriminator's step along its gradients."""
        optimizer = self.optimizers["discriminator"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def voe(self, patches: Labelled) -> float:
        """Volumetric overlap error, 1 - Jaccard, of the segmenter over all patches together.

        The mean over the foreground classes that occur in label or answer; 0 where none does.
        """
        hits, either = self._overlap(self.segmenter, patches)
        errors = 1 - hits / (either - hits)
        return float(errors.nanmean().nan_to_num(0.0))

    def dice(self, patches: Labelled) -> Tensor:
        """Dice of each foreground class over all patches together, of the averaged weights.

        NaN where a class occurs neither in label nor in answer.
        """
        hits, either = self._overlap(self.averaged, patches)
        return 2 * hits / either

    def accuracy(self, known: Iterable[Tensor], unknown: Iterable[Tensor]) -> float:
        """Share of rightly told patches, the mean over both kinds.

        Args:
            known: patches, (C, z, y, x), of cases that the segmenter was trained on.
            unknown: of cases that it never saw.
        """
        shares = []
        with evaluating(self.segmenter, self.discriminator), self._autocast():
            for patches, above in ((known, True), (unknown, False)):
                right = [(self._verdict(patch) > 0) == above for patch in patches]
                shares.append(sum(right) / len(right))
        return sum(shares) / 2

    def _verdict(self, patch: Tensor) -> float:
        image = patch[None].to(self.device)
        return float(self.discriminator(image, probabilities_of(self.segmenter(image))))

    def _overlap(self, network: nn.Module, patches: Labelled) -> tuple[Tensor, Tensor]:
        """Voxels of each foreground class: in both, and in label and answer counted apart."""
        n_classes = len(self.plan.labels)
        counts = torch.zeros(2, n_classes, dtype=torch.float64)
        with evaluating(network), self._autocast():
            for image, label in patches:
                made = probabilities_of(network(image[None].to(self.device)))
                guess = made[0].argmax(dim=0).cpu()
                valid = label < n_classes
                guess, label = guess[valid], label[valid].long()
                counts[0] += torch.bincount(guess[guess == label], minlength=n_classes)
                counts[1] += torch.bincount(guess, minlength=n_classes)
                counts[1] += torch.bincount(label, minlength=n_classes)
        return counts[0, 1:], counts[1, 1:]

    def state(self) -> dict[str, State]:
        """All that the next step depends on."""
        return {
            "segmenter": self.segmenter.state_dict(),
            "averaged": self.averaged.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "loss": self.module.loss.state_dict(),
            "optimizers": {name: one.state_dict() for name, one in self.optimizers.items()},
            "n_segmenter_steps": self.n_segmenter_steps,
            "random": random_state(self.device),
        }

    def load_state(self, state: Mapping[str, State]) -> None:
        """Go back to where `state` was taken.

        Raises:
            CheckpointError: if it is of other networks than the plan's.
        """
        try:
            for name in ("segmenter", "averaged", "discriminator"):
                getattr(self, name).load_state_dict(state[name])
            self.module.loss.load_state_dict(state["loss"])
            for name, one in self.optimizers.items():
                one.load_state_dict(state["optimizers"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            said = str(error).partition("\n")[0]
            raise CheckpointError(
                f"what was saved does not fit the plan's networks ({said}); undo what was edited "
                "in the run's plan.json, or train again in a new folder"
            ) from error
        self.n_segmenter_steps = state["n_segmenter_steps"]
        restore_random(state["random"], self.device)


def build_discriminator(plan: Plan, config: AdversarialConfig) -> Discriminator:
    """The discriminator for a plan's images and labels, with fresh weights."""
    return Discriminator(len(plan.channels), len(plan.labels), config)


def _finite(loss: float) -> float:
    """A loss that something can be learnt from.

    Raises:
        DataError: if it is not finite.
    """
    if loss - loss != 0:
        raise DataError(
            f"the loss became {loss}; what was saved before is kept. A lower learning_rate or "
            "precision float32 in plan.json may help, `effseg check` looks at the data"
        )
    return loss
