"""An unsupervised look at nodules: a generative network's codes, clustered, beside the ratings.

    python examples/nodules/cluster.py --out clusters                      # rendered nodules
    python examples/nodules/cluster.py --out clusters --cubes FOLDER       # real ones

Writes clusters.png, clusters.csv (each nodule's cluster and ratings) and agreement.csv. An encoder
learns, together with a generator that fools a discriminator, a short code of each nodule's cube;
nobody's rating is seen. Whether the clusters of these codes follow what readers say is told with a
permutation test: how often shuffled ratings agree as well.
"""

import argparse
import csv
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn import functional as F

from agreement import Agreement, agreement
from cubes import SIDE, Cubes, read_cubes, render_cubes
from effseg import DataError
from lidc import find_database

CODE = 16
"""Numbers of a code."""

RESTARTS = 20
"""Of k-means, the best of which counts."""


class Codec(nn.Module):
    """Encoder, generator and discriminator of cubes with 32 voxels an edge.

    Strided convolutions, no pooling, norm and activations as in Radford, Metz and Chintala,
    "Unsupervised representation learning with deep convolutional generative adversarial networks",
    ICLR 2016, in three dimensions.

    Args:
        width: channels at 16 voxels an edge; twice and four times as many below.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = (1, width, 2 * width, 4 * width)
        self.bottom = (widths[-1], *(SIDE // 8,) * 3)
        n_bottom = int(np.prod(self.bottom))
        self.encoder = nn.Sequential(*_down(widths), nn.Flatten(), nn.Linear(n_bottom, CODE))
        self.generator = nn.Sequential(
            nn.Linear(CODE, n_bottom), nn.Unflatten(1, self.bottom), *_up(widths[::-1])
        )
        self.discriminator = nn.Sequential(*_down(widths), nn.Flatten(), nn.Linear(n_bottom, 1))


def _down(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv3d(before, after, 4, stride=2, padding=1)]
        layers += [nn.BatchNorm3d(after)] if before > 1 else []
        layers += [nn.LeakyReLU(0.2)]
    return layers


def _up(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.BatchNorm3d(before), nn.ReLU()]
        layers += [nn.ConvTranspose3d(before, after, 4, stride=2, padding=1)]
    return [*layers, nn.Tanh()]


def learn(voxels: Tensor, *, steps: int, batch: int, seed: int, width: int = 16) -> Codec:
    """Train on cubes, mirrored at random.

    The discriminator tells cubes from what the generator makes of random codes. Generator and
    encoder learn against it, to give a cube back from its code (as the autoencoder in Larsen et
    al., "Autoencoding beyond pixels using a learned similarity metric", ICML 2016, by the mean
    absolute difference), and to give a random code back from what is made of it, so that codes of
    cubes lie where random codes do.

    Args:
        voxels: (n, 1, 32, 32, 32), -1 to 1.
        steps: of both optimizers.
        batch: cubes a step.
        seed: of weights, cubes and codes.
        width: see `Codec`.
    """
    torch.manual_seed(seed)
    codec = Codec(width)
    makers = [*codec.encoder.parameters(), *codec.generator.parameters()]
    # the discriminator's rate and both betas are Radford et al.'s; telling apart is learnt sooner
    making = torch.optim.Adam(makers, lr=1e-3, betas=(0.5, 0.999))
    telling = torch.optim.Adam(codec.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    for step in range(steps):
        real = voxels[torch.randint(len(voxels), (batch,))]
        real = real.flip([axis for axis in (2, 3, 4) if torch.rand(()) < 0.5])
        code = torch.randn(batch, CODE)
        made = codec.generator(code)
        # labels of 0.9 keep it from being too sure
        of_real, of_made = (codec.discriminator(cubes) for cubes in (real, made.detach()))
        told = _judged(of_real, 0.9) + _judged(of_made, 0.0)
        telling.zero_grad()
        told.backward()
        telling.step()
        again = codec.generator(codec.encoder(real))
        fooled = _judged(codec.discriminator(made), 1.0)
        kept = F.l1_loss(again, real)
        read = F.mse_loss(codec.encoder(made), code)
        making.zero_grad()
        (fooled + 20 * kept + read).backward()
        making.step()
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1}: told apart {told.item():.2f}, "
                f"given back to {kept.item():.3f}, codes to {read.item():.2f}"
            )
    return codec.eval()


def _judged(logits: Tensor, truth: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth))


@torch.no_grad()
def codes_of(codec: Codec, voxels: Tensor) -> np.ndarray:
    """(n, CODE): the mean over a cube's eight mirror images, so that mirrors are alike."""
    total = torch.zeros(len(voxels), CODE)
    for mirror in range(8):
        axes = [axis + 2 for axis in range(3) if mirror >> axis & 1]
        total += torch.cat([codec.encoder(part.flip(axes)) for part in voxels.split(32)])
    return (total / 8).numpy()


def cluster(codes: np.ndarray, *, k: int, seed: int) -> np.ndarray:
    """(n,) numbers of clusters by k-means, the largest cluster first.

    Codes stay as they are: their numbers were learnt to be of one scale.
    """
    best, least = np.zeros(len(codes), int), np.inf
    for restart in range(RESTARTS):
        rng = np.random.default_rng((seed, restart))
        centres, found = kmeans2(codes, k, minit="++", rng=rng)
        spread = float(np.square(codes - centres[found]).sum())
        if len(np.unique(found)) == k and spread < least:
            best, least = found, spread
    order = np.argsort(-np.bincount(best, minlength=k), kind="stable")
    return np.argsort(order)[best]


def draw(path: Path, cubes: Cubes, codec: Codec, codes: np.ndarray, clusters: np.ndarray) -> None:
    """A row a cluster: what the generator makes of its mean code, then its most typical nodules."""
    n_shown, k = 10, int(clusters.max()) + 1
    figure = Figure(figsize=(1.1 * (n_shown + 2), 1.25 * k + 0.4), layout="constrained")
    axes = figure.subplots(k, n_shown + 1, squeeze=False)
    for row, number in zip(axes, range(k), strict=True):
        members = np.flatnonzero(clusters == number)
        mean = codes[members].mean(axis=0)
        with torch.no_grad():
            typical = codec.generator(torch.from_numpy(mean)[None].float())[0, 0].numpy()
        nearest = members[np.square(codes[members] - mean).sum(axis=1).argsort()][:n_shown]
        pictures = [typical, *cubes.voxels[nearest, 0]]
        names = ["generated", *(cubes.names[i].removesuffix("_ann0") for i in nearest)]
        for axis in row:
            axis.set_axis_off()
        for axis, picture, name in zip(row, pictures, names, strict=False):
            axis.imshow(picture[SIDE // 2], cmap="gray", vmin=-1, vmax=1)
            axis.set_title(name, fontsize=6)
        diameter = np.median(cubes.ratings["diameter_mm"][members])
        row[0].text(
            -0.1, 0.5, f"{len(members)} nodules\n{diameter:.0f} mm", fontsize=7, ha="right",
            va="center", transform=row[0].transAxes,
        )  # fmt: skip
    figure.savefig(path, dpi=130)


def write_tables(out: Path, cubes: Cubes, clusters: np.ndarray, found: Sequence[Agreement]) -> None:
    """clusters.csv and agreement.csv."""
    with (out / "clusters.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["nodule", "cluster", *cubes.ratings])
        for i, name in enumerate(cubes.names):
            said = (f"{values[i]:g}" for values in cubes.ratings.values())
            table.writerow([name, clusters[i], *said])
    with (out / "agreement.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(Agreement.__dataclass_fields__)
        for one in found:
            table.writerow([f"{v:.4f}" if isinstance(v, float) else v for v in vars(one).values()])


def main() -> None:
    """Read or render cubes, learn codes, cluster them, draw and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("clusters"), help="a folder")
    parser.add_argument("--cubes", type=Path, help="images/ and labels/ of real cubes")
    parser.add_argument("--n", type=int, default=150, help="nodules to render without --cubes")
    parser.add_argument("--margin-mm", type=float, default=2.0, help="shown around the outline")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--batch", type=int, default=16, help="cubes a step")
    parser.add_argument("--clusters", type=int, default=4)
    parser.add_argument("--shuffles", type=int, default=2000, help="of the permutation test")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.cubes is None:
        cubes = render_cubes(
            find_database(), n=options.n, seed=options.seed, margin_mm=options.margin_mm
        )
    else:
        try:
            database = find_database()
        except DataError as error:
            print(f"without ratings: {error}")
            database = None
        cubes = read_cubes(options.cubes, database, margin_mm=options.margin_mm)
    voxels = torch.from_numpy(cubes.voxels)
    codec = learn(voxels, steps=options.steps, batch=options.batch, seed=options.seed)
    codes = codes_of(codec, voxels)
    clusters = cluster(codes, k=options.clusters, seed=options.seed)
    sizes = cubes.ratings["diameter_mm"]
    held = (
        agreement(
            clusters, name, values, diameters_mm=sizes, shuffles=options.shuffles, seed=options.seed
        )
        for name, values in cubes.ratings.items()
    )
    found = [one for one in held if one is not None]
    options.out.mkdir(parents=True, exist_ok=True)
    draw(options.out / "clusters.png", cubes, codec, codes, clusters)
    write_tables(options.out, cubes, clusters, found)
    print(f"{len(cubes.names)} nodules in clusters of {np.bincount(clusters).tolist()}")
    print(f"{'rating':>18}    n   Rand     p    rho  chance     p  p, size alike")
    for one in found:
        print(
            f"{one.rating:>18} {one.n:4d} {one.rand:6.3f} {one.rand_p:5.3f} "
            f"{one.rho:6.3f}  {one.rho_chance:6.3f} {one.rho_p:5.3f} {one.size_p:14.3f}"
        )
    print(f"picture: {(options.out / 'clusters.png').resolve()}")


if __name__ == "__main__":
    main()
