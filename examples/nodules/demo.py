"""Lung nodules from outlines to a scored report: copy it and put your own data in.

    python examples/nodules/demo.py --out demo

With `--lidc FOLDER` it trains on real CT: a folder of LIDC-IDRI's DICOM series and XML files.
"""

import argparse
import shutil
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

import effseg
from lidc import convert_lidc, find_database
from nnunet import IGNORE, NODULE
from nodule import reader_agreement
from render import render_dataset

RENDERED = (
    "The CT is rendered; the nodules' outlines are real: radiologists drew them in LIDC-IDRI. "
    "A score here shows that the way works, not how well a network does on patients."
)


def main() -> None:
    """Render (or convert), plan, train, predict the held-out volumes, score, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="a folder, made anew")
    parser.add_argument("--memory", default="2GiB", help="the budget")
    parser.add_argument("--minutes", type=float, default=6.0, help="of training")
    parser.add_argument("--train", type=int, default=60, help="volumes to render and learn from")
    parser.add_argument("--test", type=int, default=12, help="volumes to render and hold out")
    parser.add_argument(
        "--min-diameter-mm",
        type=float,
        default=8.0,
        help="of the nodules to find; with 6 the small ones take a longer training",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lidc", type=Path, help="a folder of LIDC-IDRI's DICOM and XML files")
    options = parser.parse_args()
    data, run = options.out / "data", options.out / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(data, ignore_errors=True)

    notes: tuple[str, ...] = ()
    if options.lidc is not None:
        print(f"converting {options.lidc}")
        convert_lidc(options.lidc, data)
    else:
        print(f"rendering {options.train} + {options.test} volumes around real outlines")
        findings = render_dataset(
            data,
            find_database(),
            n_train=options.train,
            n_test=options.test,
            seed=options.seed,
            min_diameter_mm=options.min_diameter_mm,
        )
        held_out = [f.nodule for f in findings if f.held_out and f.is_target]
        agreement = reader_agreement(held_out)
        notes = (
            RENDERED,
            f"The radiologists who outlined the {len(held_out)} held-out nodules agree with each "
            f"other to a mean Dice of {agreement:.3f}.",
        )

    plan = effseg.plan(data, memory=options.memory)
    for choice, why in plan.reasons.items():
        print(f"  {choice}: {why}")
    with bar() as progress:
        task = progress.add_task("training", total=1.0, state="")

        def show(state: effseg.TrainingState) -> None:
            dice = "" if state.dice is None else f", Dice {state.dice:.3f}"
            progress.update(
                task,
                completed=state.fraction,
                state=f"loss {state.loss:.3f}{dice}, {state.seconds_left:.0f} s left",
            )

        effseg.train(plan, data, out=run, minutes=options.minutes, notes=notes, progress=show)
    effseg.validate(run)

    images = sorted((data / "imagesTs").glob("*.nii.gz"))
    for image in images:
        case = image.name.removesuffix("_0000.nii.gz")
        effseg.predict(run, image, out=run / "test" / f"{case}.nii.gz")
    if images:
        scores = effseg.evaluate(
            run / "test",
            data / "labelsTs",
            images=data / "imagesTs",
            labels={NODULE: "nodule"},
            ignore_label=IGNORE,
            out=run / "test" / "metrics.json",
        )
        print(
            f"held out: mean Dice of a nodule {scores.mean_lesion_dice:.3f}, "
            f"sensitivity {scores.sensitivity:.3f} "
            f"at {scores.false_positives_per_case:.2f} false positives a volume"
        )
    for note in notes:
        print(note)
    print(f"report: {effseg.write_report(run).resolve()}")


def bar() -> Progress:
    """A bar with the loss, the Dice and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[state]}"),
    )


if __name__ == "__main__":
    main()
