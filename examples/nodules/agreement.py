"""How well clusters that saw no rating follow one: adjusted Rand, Spearman, permutation."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata


@dataclass(frozen=True)
class Agreement:
    """How well clusters follow a rating.

    Attributes:
        rating: its name.
        n: nodules that have it.
        rand: adjusted Rand index between clusters and the rating in whole numbers.
        rand_p: share of shuffled ratings whose index is as large.
        rho: Spearman's, between rating and its mean in the nodule's cluster.
        rho_chance: its mean over shuffled ratings; the mean looks at the rating, so it is not 0.
        rho_p: share of shuffled ratings whose rho is as large.
        size_p: the same where ratings are shuffled among nodules of similar size only, in quarters
            of them: what is left of it when large nodules are rated otherwise than small ones.
    """

    rating: str
    n: int
    rand: float
    rand_p: float
    rho: float
    rho_chance: float
    rho_p: float
    size_p: float


def agreement(
    clusters: np.ndarray,
    name: str,
    values: np.ndarray,
    *,
    diameters_mm: np.ndarray,
    shuffles: int,
    seed: int,
) -> Agreement | None:
    """Hold clusters against a rating; None where fewer than ten nodules or one value have it."""
    known = ~np.isnan(values)
    found, said = clusters[known], values[known]
    if len(said) < 10 or len(np.unique(said)) == 1:
        return None
    rng = np.random.default_rng(seed)
    sizes = diameters_mm[known]
    quarters = np.searchsorted(np.quantile(sizes, (0.25, 0.5, 0.75)), sizes)
    classes = quarters if name == "diameter_mm" else np.rint(said)
    orders = [rng.permutation(len(said)) for _ in range(shuffles)]
    alike = [_within(quarters, rng) for _ in range(shuffles)]
    rand, rho = adjusted_rand(found, classes), follows(found, said)
    rands = np.array([adjusted_rand(found, classes[order]) for order in orders])
    rhos, sized = (
        np.array([follows(found, said[order]) for order in some]) for some in (orders, alike)
    )
    return Agreement(
        rating=name,
        n=len(said),
        rand=rand,
        rand_p=_share(rands >= rand - 1e-12),
        rho=rho,
        rho_chance=float(rhos.mean()),
        rho_p=_share(rhos >= rho - 1e-12),
        size_p=_share(sized >= rho - 1e-12),
    )


def _within(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An order that moves nothing out of its group."""
    order = np.arange(len(groups))
    for group in np.unique(groups):
        (members,) = np.nonzero(groups == group)
        order[members] = rng.permutation(members)
    return order


def _share(as_large: np.ndarray) -> float:
    """The one that was found counts among the shuffled ones: p is never 0."""
    return float((1 + as_large.sum()) / (1 + len(as_large)))


def adjusted_rand(one: np.ndarray, other: np.ndarray) -> float:
    """Of two partitions: 1 if they are the same, 0 on average by chance.

    Hubert and Arabie, "Comparing partitions", Journal of Classification 2:193-218, 1985. Two
    partitions of one part each, or of single members only, are the same: 1.
    """

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    rows, columns = (np.unique(part, return_inverse=True)[1] for part in (one, other))
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)
    a, b = pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    expected, most = a * b / pairs(np.array([len(one)])), (a + b) / 2
    return 1.0 if most == expected else (pairs(table) - expected) / (most - expected)


def follows(clusters: np.ndarray, values: np.ndarray) -> float:
    """Spearman's rho between values and their means by cluster; 0 where all means are one."""
    sums, sizes = np.bincount(clusters, values), np.bincount(clusters)
    ranks = [rankdata(part) for part in (values, (sums / np.maximum(sizes, 1))[clusters])]
    if min(np.ptp(part) for part in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])
