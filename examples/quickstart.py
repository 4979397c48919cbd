"""From a data set to a scored prediction in a few lines.

python examples/quickstart.py DATASET --memory 1GiB --minutes 10
"""

import argparse
from pathlib import Path

import effseg


def main() -> None:
    """Plan, train, validate, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args()

    plan = effseg.plan(options.dataset, memory=options.memory)
    for choice, why in plan.reasons.items():
        print(f"{choice}: {why}")
    run = effseg.train(plan, options.dataset, out=options.out, minutes=options.minutes)
    scores = effseg.validate(run)
    print(f"mean Dice on the held-out fifth: {scores.mean_dice:.3f}")
    print(f"report: {effseg.write_report(run).resolve()}")


if __name__ == "__main__":
    main()
