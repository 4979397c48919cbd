"""nnU-Net's default trainer for a number of minutes in place of 1000 epochs.

It runs in nnU-Net's own environment; `beside_nnunet.py` lays it where nnU-Net looks for trainers,
and a `minutes.json` beside the cases that nnU-Net has prepared.
"""

import json
import time
from pathlib import Path

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

POWER = 0.9
"""Of nnU-Net's polynomial schedule."""


class nnUNetTrainerMinutes(nnUNetTrainer):  # noqa: N801 - nnU-Net finds trainers by such names
    """The default trainer, that stops by the clock.

    Network, patch, batch, loss, augmentation, optimizer, first learning rate and the form of its
    decay are nnU-Net's. Changed are four things: training ends after `minutes.json`'s minutes, from
    the first step on; the rate falls to zero over exactly that time, step by step and not epoch by
    epoch; there are no epochs, so that no time goes into their validation and checkpoints; and the
    validation cases are not predicted in the end, as other cases are to be. The weights that are
    kept are the last, nnU-Net's own choice.
    """

    def run_training(self) -> None:
        """Train until the time is over."""
        record = Path(self.preprocessed_dataset_folder_base) / "minutes.json"
        limit = 60 * float(json.loads(record.read_text())["minutes"])
        self.on_train_start()
        self.network.train()
        batch = next(self.dataloader_train)  # the workers have begun by then
        n_steps, started = 0, time.monotonic()
        while (share := (time.monotonic() - started) / limit) < 1:
            for group in self.optimizer.param_groups:
                group["lr"] = self.initial_lr * (1 - share) ** POWER
            loss = self.train_step(batch)["loss"]
            n_steps += 1
            self.print_to_log_file(f"step {n_steps}, {share:.1%} of the time, loss {loss:.4f}")
            batch = next(self.dataloader_train)
        seconds = time.monotonic() - started
        self.on_train_end()
        done = {
            "minutes": seconds / 60,
            "steps": n_steps,
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "patch": list(self.configuration_manager.patch_size),
            "batch": self.batch_size,
        }
        record.with_name("done.json").write_text(json.dumps(done))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Nothing: cases that it has not seen are predicted instead."""
