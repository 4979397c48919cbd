"""`effseg predict`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effseg.cli.console import console, errors, plain
from effseg.cli.failures import explained
from effseg.cli.options import Device, Memory, RunPath
from effseg.cli.progress import bar

if TYPE_CHECKING:
    from effseg.inference import CaseResult


def predict(
    run: RunPath,
    inputs: Annotated[
        list[Path],
        typer.Argument(help="images, folders of images, DICOM folders or zips", metavar="INPUT..."),
    ],
    out: Annotated[Path, typer.Option("--out", help="folder for the label maps")],
    memory: Memory = None,
    tta: Annotated[
        bool, typer.Option("--tta", help="average over the mirrors that training saw")
    ] = False,
    device: Device = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard", help="only the i-th of n shares of the cases, from 1/n to n/n", metavar="i/n"
        ),
    ] = None,
    skip_existing: Annotated[
        bool,
        typer.Option("--skip-existing", help="keep label maps that are there; else: replace them"),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with cases where a run was stopped")
    ] = False,
    skip_constant: Annotated[
        bool, typer.Option("--skip-constant", help="pass windows of one value, air, only once")
    ] = False,
    coarse: Annotated[
        Path | None,
        typer.Option("--coarse", help="a run that finds the region to label", metavar="RUN"),
    ] = None,
    probabilities: Annotated[
        list[int] | None,
        typer.Option("--probabilities", help="a label whose probability is written too; repeat"),
    ] = None,
    suffix: Annotated[
        str,
        typer.Option(
            "--suffix", help="of the label maps: .nii.gz, .nii, .nrrd, .mha, .zarr", metavar=".EXT"
        ),
    ] = ".nii.gz",
    entropy: Annotated[
        bool, typer.Option("--entropy", help="write how unsure each voxel is too, in nats")
    ] = False,
    also: Annotated[
        list[Path] | None,
        typer.Option("--also", help="a run to average with the first; repeat", metavar="RUN"),
    ] = None,
    snapshots: Annotated[
        bool, typer.Option("--snapshots", help="average the weights a run kept on its way")
    ] = False,
) -> None:
    """Label images on their own grids; a case that fails is named and the others go on."""
    from effseg.inference import (
        CaseResult,
        find_images,
        load_run,
        load_runs,
        mirrored_axes,
        predict_cases,
        shard_of,
    )
    from effseg.memory import PeakResident
    from effseg.plans import format_bytes

    loaded = load_runs([run, *(also or ())], snapshots=snapshots)
    n_models = sum(one.n_models for one in loaded)
    if n_models > 1:
        console.print(f"{n_models} models are averaged")
    if tta:
        axes = ", ".join("zyx"[axis] for axis in mirrored_axes(loaded))
        trained = f"along {axes}" if axes else "along none: training flipped no patches"
        console.print(f"mirrors are averaged {trained}")
    rough = None if coarse is None else load_run(coarse)
    cases = list(find_images(inputs, n_channels=len(loaded[0].plan.channels)).values())
    n_all = len(cases)
    if shard is not None:
        cases = shard_of(cases, shard)
        console.print(f"shard {shard}: {len(cases) or 'none'} of {n_all} cases")
    results: list[CaseResult] = []
    codes: list[int] = []

    def report(result: CaseResult) -> None:
        results.append(result)
        if result.error is not None:
            message, code = explained(result.error)
            codes.append(code)
            errors.print(f"[red]failed[/] {plain(result.name)}: {message}", soft_wrap=True)

    resident = PeakResident().start()
    try:
        with bar("labelling", len(cases)) as advance:
            predict_cases(
                loaded,
                cases,
                out=out,
                memory=memory,
                tta=tta,
                device=device,
                skip_existing=skip_existing,
                resume=resume,
                skip_constant=skip_constant,
                coarse=rough,
                probabilities=probabilities or (),
                entropy=entropy,
                suffix=suffix,
                progress=advance,
                report=report,
            )
    finally:
        peak = format_bytes(resident.stop())
        if results:
            console.print(
                f"{plain(_counted(results, len(cases)))}; label maps in {plain(str(out))}; "
                f"peak memory {peak} above what the imports hold",
                soft_wrap=True,
            )
    if codes:
        raise typer.Exit(max(codes))


def _counted(results: "Sequence[CaseResult]", n_cases: int) -> str:
    """How many cases went which way, and the names of those that failed."""
    failed = [result.name for result in results if result.error is not None]
    kept = sum(result.kept for result in results)
    said = f"{len(results) - len(failed) - kept} predicted"
    if kept:
        said += f", {kept} kept as they were"
    said += f", {len(failed)} failed"
    if failed:
        said += f" ({', '.join(failed)})"
    if len(results) < n_cases:
        said += f", {n_cases - len(results)} not begun"
    return said
