"""Augmentation: the seed decides alone, geometry is right in mm, each change does what it says."""

import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import get_track_meta, set_track_meta
from pydantic import BaseModel, ValidationError
from scipy.ndimage import gaussian_filter

from effseg.augment import BLUR, BRIGHTNESS, NOISE, Augmentation, build_augmentation
from effseg.errors import DataError, GeometryError
from effseg.plans import CHANGES, AugmentConfig

IGNORE = 255


def _policy(spacing=(1.0, 1.0, 1.0), fill_label=None, **chances) -> Augmentation:
    """Only what is named happens."""
    config = AugmentConfig(**(dict.fromkeys(CHANGES, 0.0) | chances))
    return build_augmentation(config, spacing=spacing, fill_label=fill_label)


def _all(spacing=(1.0, 1.0, 1.0), **rest) -> Augmentation:
    return _policy(spacing, **(dict.fromkeys(CHANGES, 1.0) | rest))


def _patch(shape=(8, 9, 10), n_channels=2):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(n_channels, *shape, generator=generator)
    return image, torch.randint(0, 3, shape, generator=generator, dtype=torch.uint8)


def _ball(shape, spacing, radius_mm):
    axes = [(np.arange(n) - (n - 1) / 2) * length for n, length in zip(shape, spacing, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    label = (np.sqrt(z**2 + y**2 + x**2) <= radius_mm).astype(np.uint8)
    return label[None].astype(np.float32), label


def _dice(a, b) -> float:
    a, b = np.asarray(a) > 0.5, np.asarray(b) > 0.5
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def _same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_seed_alone_decides():
    image, label = _patch()
    first = [_all()(image, label, seed=seed) for seed in range(6)]
    policy = pickle.loads(pickle.dumps(_all()))
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - the global state is what must not matter
    for seed in reversed(range(6)):
        assert _same(policy(image, label, seed=seed), first[seed])
    assert not _same(first[0], first[1])
    several = [policy(image, label, seed=(0, 3, index)) for index in (1, 2, 1)]
    assert _same(several[0], several[2])
    assert not _same(several[0], several[1])


@pytest.mark.parametrize("tracking", [True, False])
def test_nothing_global_is_read_or_changed(tracking):
    image, label = _patch()
    expected = _all()(image, label, seed=4)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), get_track_meta()  # noqa: NPY002
    set_track_meta(tracking)
    try:
        result = _all()(image, label, seed=4)
        assert get_track_meta() is tracking
    finally:
        set_track_meta(before[2])
    assert [type(part) for part in result] == [torch.Tensor, torch.Tensor]
    assert _same(result, expected)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_patch_is_left_alone_and_copied():
    image, label = _patch()
    kept = image.clone(), label.clone()
    for policy in (_all(), _all(probability=0.0), _policy()):
        changed, moved = policy(image, label, seed=0)
        assert _same((image, label), kept)
        assert changed.data_ptr() != image.data_ptr()
        assert moved.data_ptr() != label.data_ptr()
        assert changed.is_contiguous()
        assert moved.is_contiguous()
    assert _same((changed, moved), kept)


def test_probability_zero_turns_all_off():
    image, label = _patch()
    for seed in range(5):
        assert _same(_all(probability=0.0)(image, label, seed=seed), (image, label))


def test_each_chance_is_scaled_by_the_overall_probability():
    image, label = _patch((3, 3, 3), 1)
    for change in CHANGES:
        policy = _policy(**{change: 0.6, "probability": 0.5, "flip_axes": ("x",)})
        changed = sum(
            not torch.equal(policy(image, label, seed=seed)[0], image) for seed in range(200)
        )
        assert 34 <= changed <= 86, change  # 60 +- 4 standard deviations of 6.5


def test_the_probability_follows_the_run():
    def at(*shares, **times):
        config = AugmentConfig(**times)
        return [config.probability_at(share) for share in shares]

    assert at(0, 0.5, 1) == [1, 1, 1]
    assert at(0, 0.5, 1, probability=0.5) == [0.5, 0.5, 0.5]
    assert at(0, 0.25, 1, probability=0.2, final_probability=1.0) == pytest.approx([0.2, 0.4, 1])
    assert at(0, 0.79, 0.8, 1, off_for_last=0.2) == [1, 1, 0, 0]
    assert at(0, 0.25, 0.5, final_probability=0.0, off_for_last=0.5) == [1, 0.5, 0]
    assert at(0, 1, off_for_last=1) == [0, 0]
    assert AugmentConfig(probability=0, final_probability=0.3).highest_probability == 0.3
    assert AugmentConfig(off_for_last=1).highest_probability == 0
    image, label = _patch()
    late = replace(_all(off_for_last=0.1), share=0.9)
    assert _same(late(image, label, seed=1), (image, label))
    # the same chance, the same patch: times alone change nothing
    assert _same(
        replace(_all(probability=0.5), share=0.7)(image, label, seed=3),
        _all(probability=0.5)(image, label, seed=3),
    )


@pytest.mark.parametrize("name", ["light", "default", "strong"])
def test_each_policy_changes_more_than_the_one_before(name):
    """How often a patch stays as it is, by the chances."""

    def untouched(policy):
        config = AugmentConfig(policy=policy)
        return np.prod([1 - getattr(config, change) for change in CHANGES])

    weaker = {"light": "off", "default": "light", "strong": "default"}[name]
    assert untouched(name) < untouched(weaker)


def test_off_leaves_patches_as_they_are():
    image, label = _patch()
    config = AugmentConfig(policy="off")
    for seed in range(5):
        result = build_augmentation(config, spacing=(1.0, 1.0, 1.0))(image, label, seed=seed)
        assert _same(result, (image, label))


def test_a_policy_is_a_name_and_what_is_changed_of_it():
    class Holder(BaseModel):
        augment: AugmentConfig = AugmentConfig()

    strong = AugmentConfig(policy="strong")
    assert Holder.model_validate({"augment": "strong"}).augment == strong
    assert Holder.model_validate({"augment": {"policy": "strong"}}).augment == strong
    mine = Holder.model_validate({"augment": {"policy": "strong", "gamma": 0.05}}).augment
    assert (mine.gamma, mine.blur) == (0.05, strong.blur)
    assert mine.model_dump() == {"policy": "strong", "flip_axes": ("x",), "gamma": 0.05}
    assert AugmentConfig.model_validate(mine.model_dump()) == mine
    with pytest.raises(ValidationError, match="policy"):
        Holder.model_validate({"augment": "wild"})
    with pytest.raises(ValidationError, match="gama"):
        Holder.model_validate({"augment": {"policy": "light", "gama": 0.1}})


def test_plans_from_before_policies_mean_what_they_meant():
    """As a plan.json of version 0.1 has it."""
    old = {
        "probability": 1.0,
        "flip_axes": ["z", "y", "x"],
        "flip": 0.5,
        "rotate90": 0.0,
        "affine": 0.2,
        "rotate_degrees": 15.0,
        "scale": [0.85, 1.18],
        "gamma": 0.15,
        "brightness": 0.15,
        "contrast": 0.15,
        "noise": 0.1,
        "blur": 0.1,
        "low_resolution": 0.1,
    }
    config = AugmentConfig.model_validate(old)
    assert config == AugmentConfig(flip_axes=("z", "y", "x"))
    assert config.policy == "default"
    assert AugmentConfig.model_validate(old | {"gamma": 0.9}).gamma == 0.9


def test_flips_reverse_the_named_axes():
    image, label = _patch()
    changed, moved = _policy(flip=1.0, flip_axes=("z", "x"))(image, label, seed=0)
    assert torch.equal(changed, image.flip(1, 3))
    assert torch.equal(moved, label.flip(0, 2))


def test_quarter_turns_stay_in_planes_of_equal_spacing():
    image, label = _patch((4, 6, 6), 1)
    image[0] = label
    seen = set()
    for seed in range(30):
        changed, moved = _policy((3.0, 0.7, 0.7), rotate90=1.0)(image, label, seed=seed)
        assert torch.equal(changed[0], moved.float())
        turns = [k for k in (1, 2, 3) if torch.equal(moved, label.rot90(k, (1, 2)))]
        seen.update(turns)
        assert len(turns) == 1
    assert seen == {1, 2, 3}
    unequal = _policy((3.0, 1.0, 0.5), rotate90=1.0)
    assert _same(unequal(image, label, seed=0), (image, label))


def test_unequal_lengths_take_half_turns_only():
    image, label = _patch((4, 5, 6), 1)
    for seed in range(10):
        _, moved = _policy(rotate90=1.0)(image, label, seed=seed)
        assert any(torch.equal(moved, label.rot90(2, plane)) for plane in ((0, 1), (0, 2), (1, 2)))


def test_a_ball_stays_the_ball_it_is_in_mm():
    shape, spacing = (16, 40, 32), (2.0, 1.0, 1.0)
    image, label = _ball(shape, spacing, 12.0)
    policy = _policy(spacing, affine=1.0, rotate_degrees=180.0, scale=(1.0, 1.0))
    for seed in range(4):
        changed, moved = policy(image, label, seed=seed)
        assert not torch.equal(changed, torch.from_numpy(image))
        assert _dice(changed[0], label) > 0.95
        assert _dice(moved, label) > 0.95


def test_zoom_enlarges():
    image, label = _ball((32, 32, 32), (1.0, 1.0, 1.0), 6.0)
    _, moved = _policy(affine=1.0, rotate_degrees=0.0, scale=(2.0, 2.0))(image, label, seed=0)
    assert int(moved.sum()) / int(label.sum()) == pytest.approx(8.0, rel=0.1)


def test_image_and_label_move_together():
    image, label = _ball((24, 28, 26), (1.0, 1.0, 1.0), 7.0)
    image, label = (np.roll(part, (4, -3, 2), (-3, -2, -1)) for part in (image, label))
    for seed in range(5):
        changed, moved = _policy(affine=1.0, flip=0.5, rotate90=0.5)(image, label, seed=seed)
        assert _dice(changed[0], moved) > 0.95


def test_what_comes_from_outside_is_ignored_or_repeats_the_edge():
    image, label = torch.full((1, 8, 8, 8), 3.0), torch.ones(8, 8, 8, dtype=torch.int16)
    shrink = {"affine": 1.0, "rotate_degrees": 0.0, "scale": (0.5, 0.5)}
    changed, moved = _policy(fill_label=IGNORE, **shrink)(image, label, seed=0)
    expected = torch.full_like(label, IGNORE)
    expected[2:6, 2:6, 2:6] = 1
    assert torch.equal(moved, expected)
    assert torch.equal(changed, image)
    _, moved = _policy(**shrink)(image, label, seed=0)
    assert torch.equal(moved, label)
    still = {"affine": 1.0, "rotate_degrees": 0.0, "scale": (1.0, 1.0)}
    image, label = _patch()
    changed, moved = _policy(fill_label=IGNORE, **still)(image, label, seed=0)
    torch.testing.assert_close(changed, image, atol=1e-5, rtol=0)
    assert torch.equal(moved, label)


def test_thick_slices_are_neither_mixed_nor_coarsened():
    image = torch.arange(8.0).view(1, 8, 1, 1).expand(1, 8, 12, 12)
    label = torch.arange(8, dtype=torch.uint8).view(8, 1, 1).expand(8, 12, 12)
    policy = _policy((5.0, 0.8, 0.8), affine=1.0, low_resolution=1.0, rotate_degrees=90.0)
    for seed in range(4):
        changed, moved = policy(image, label, seed=seed)
        torch.testing.assert_close(changed, image, atol=1e-4, rtol=0)
        assert torch.equal(moved, label)


@pytest.mark.parametrize("change", ["gamma", "brightness", "contrast", "noise", "blur"])
def test_intensities_change_alone_and_differently_in_each_channel(change):
    image, label = _patch((8, 8, 8), 1)
    image = image.expand(2, -1, -1, -1)
    changed, moved = _policy(**{change: 1.0})(image, label, seed=1)
    assert torch.equal(moved, label)
    assert not torch.equal(changed[0], image[0])
    assert not torch.equal(changed[0], changed[1])
    assert (changed.mean((1, 2, 3)) - image.mean((1, 2, 3))).abs().max() < 0.3


def test_ranges_of_noise_and_brightness():
    image, label = _patch((16, 16, 16), 1)
    image = 100 + 20 * image
    for seed in range(10):
        noisy, _ = _policy(noise=1.0)(image, label, seed=seed)
        assert NOISE[0] <= float((noisy - image).std() / image.std()) <= NOISE[1] * 1.05
        shifted, _ = _policy(brightness=1.0)(image, label, seed=seed)
        shift = (shifted - image) / image.std(correction=0)
        assert float(shift.max() - shift.min()) < 1e-4
        assert BRIGHTNESS[0] <= float(shift.mean()) <= BRIGHTNESS[1]


def test_contrast_keeps_mean_nearly_and_range():
    image, label = _patch((16, 16, 16), 1)
    for seed in range(10):
        changed, _ = _policy(contrast=1.0)(image, label, seed=seed)
        assert image.min() <= changed.min()
        assert changed.max() <= image.max()
        assert 0.7 < float(changed.std() / image.std()) < 1.3
        assert float((changed - image).mean().abs()) < 0.02


def test_gamma_keeps_mean_deviation_and_order():
    image, label = _patch((8, 8, 8), 1)
    changed, _ = _policy(gamma=1.0)(image, label, seed=0)
    assert float(changed.mean()) == pytest.approx(float(image.mean()), abs=1e-4)
    assert float(changed.std()) == pytest.approx(float(image.std()), abs=1e-4)
    assert torch.equal(changed.flatten().argsort(), image.flatten().argsort())


def test_blur_is_gaussian_in_mm_and_continues_the_edge():
    spacing = (2.0, 1.0, 1.0)
    image, label = _patch((10, 12, 14), 1)
    flat = torch.full_like(image, 5.0)
    for seed in range(4):
        policy = _policy(spacing, blur=1.0)
        torch.testing.assert_close(policy(flat, label, seed=seed)[0], flat, rtol=1e-3, atol=0)
        changed, _ = policy(image, label, seed=seed)
        in_mm, in_voxels = (
            min(
                np.abs(
                    gaussian_filter(image[0].numpy(), sigmas(s), mode="nearest")
                    - changed[0].numpy()
                ).mean()
                for s in np.linspace(*BLUR, 21)
            )
            for sigmas in (lambda s: (s / 2, s, s), lambda s: (s, s, s))
        )
        # not 0: MONAI's weights are the Gaussian's integral over a voxel, scipy's its centre value
        assert in_mm < 0.04
        assert in_mm < 0.6 * in_voxels


def test_low_resolution_smooths_but_keeps_the_coarse_picture():
    image, label = _patch((16, 16, 16), 1)
    ramp = torch.linspace(0, 1, 16).view(1, 16, 1, 1).expand(1, 16, 16, 16)
    for seed in range(4):
        changed, _ = _policy(low_resolution=1.0)(image, label, seed=seed)
        assert changed.std() <= image.std()
        smooth, _ = _policy(low_resolution=1.0)(ramp, label, seed=seed)
        assert float((smooth - ramp).abs().max()) <= 1.5 / 15


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    n_channels=st.integers(1, 3),
    seed=st.integers(0, 2**63),
    thick=st.sampled_from([1.0, 2.0, 6.0]),
)
@settings(max_examples=40, deadline=None)
def test_any_patch_comes_back_finite_in_its_shape_and_type(shape, n_channels, seed, thick):
    image, label = _patch(shape, n_channels)
    image[0] = 2.0  # a constant channel
    label = label[None].to(torch.int32)
    changed, moved = _all((thick, 1.0, 1.0), fill_label=IGNORE)(image, label, seed=seed)
    assert changed.shape == image.shape
    assert changed.dtype == torch.float32
    assert changed.isfinite().all()
    assert moved.shape == label.shape
    assert moved.dtype == label.dtype
    assert set(moved.unique().tolist()) <= {*label.unique().tolist(), IGNORE}


def test_takes_arrays_as_they_come():
    image, label = (part.numpy() for part in _patch())
    expected = _all()(image, label, seed=2)
    turned = np.ascontiguousarray(image[:, ::-1])[:, ::-1], label.copy()
    turned[1].setflags(write=False)
    assert _same(_all()(*turned, seed=2), expected)
    assert _same(_all()(image.astype(np.float64), label, seed=2), expected)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ((2, 8, 9, 10), (8, 9, 11)),
        ((2, 8, 9, 10), (2, 8, 9, 10)),
        ((8, 9, 10), (8, 9, 10)),
        ((2, 0, 9, 10), (0, 9, 10)),
    ],
)
def test_shapes_are_refused_at_the_door(image, label):
    with pytest.raises(GeometryError, match=r"image \("):
        _policy()(torch.zeros(image), torch.zeros(label, dtype=torch.uint8), seed=0)


def test_types_and_zooms_are_refused_at_the_door():
    image, label = _patch()
    with pytest.raises(DataError, match=r"label is torch\.float32"):
        _policy()(image, label.float(), seed=0)
    with pytest.raises(DataError, match=r"torch\.int8 .*fill_label 255"):
        _policy(fill_label=IGNORE)(image, label.to(torch.int8), seed=0)
    for scale in ((0.0, 1.0), (1.2, 0.8), (-1.0, 1.0)):
        with pytest.raises(ValidationError, match="expected two zooms above 0"):
            _policy(scale=scale)


def test_monai_is_not_needed_elsewhere():
    """Losses and plans must not pay for its import."""
    import subprocess

    code = "import sys, effseg, effseg.losses, effseg.plans; sys.exit('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
