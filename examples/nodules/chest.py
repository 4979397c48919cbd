"""Half a chest in HU: lung between its wall, the mediastinum and the diaphragm.

Shapes are smooth formulas in millimetres, so one function serves voxels and points alike:
x grows from the midline outwards, y from front to back, z upwards. Edges are blended over about one
voxel, which is what partial volume does to a smooth surface.

In HU: air -1000, lung -890 to -830, fat -100, muscle and soft tissue 45, blood 30 to 60 or with
the contrast agent 120 to 280, spongy bone 200, cortical bone 700.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from frame import Frame

AIR_HU, FAT_HU, TISSUE_HU = -1000.0, -100.0, 45.0


@dataclass(frozen=True)
class Waves:
    """A gently waving field: a sum of plane waves of 25 to 90 mm, standard deviation 1."""

    vectors: np.ndarray
    phases: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, *, n: int = 5) -> "Waves":
        """Draw directions, lengths and phases of `n` waves."""
        directions = rng.standard_normal((n, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        lengths = rng.uniform(25, 90, (n, 1))
        return cls(
            vectors=2 * math.pi * directions / lengths, phases=rng.uniform(0, 2 * math.pi, n)
        )

    def __call__(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The field's values where three broadcastable coordinates meet, float32."""
        total = 0.0
        for (kz, ky, kx), phase in zip(self.vectors, self.phases, strict=True):
            # A product of three lines costs a tenth of a cosine per voxel.
            lines = [
                np.exp(1j * k * v).astype(np.complex64) for k, v in ((kz, z), (ky, y), (kx, x))
            ]
            total = total + (lines[0] * lines[1] * lines[2] * np.complex64(np.exp(1j * phase))).real
        return np.asarray(total * np.float32(math.sqrt(2 / len(self.phases))))


@dataclass(frozen=True)
class Chest:
    """The shape and tissues of one half of a chest, drawn at random.

    Attributes:
        half_width_mm: of the inside of the rib cage, from the midline.
        half_depth_mm: of the inside of the rib cage, from its centre to the front or back.
        taper: how much the rib cage widens per mm downwards.
        wall_mm: from the pleura to the skin.
        muscle_mm: how deep under the pleura the outer fat begins.
        heart_mm: how far the heart bulges out.
        diaphragm_mm: the height of the diaphragm's dome.
        rib_phase: where along z the ribs are, in ribs.
        lung_hu: of the parenchyma in mid-height of a patient on the back.
        blood_hu: of the vessels, by the contrast agent.
        waves: what makes walls uneven.
    """

    half_width_mm: float
    half_depth_mm: float
    taper: float
    wall_mm: float
    muscle_mm: float
    heart_mm: float
    diaphragm_mm: float
    rib_phase: float
    lung_hu: float
    blood_hu: float
    waves: Waves

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Chest":
        """Draw a chest."""
        with_contrast = rng.random() < 0.5
        return cls(
            half_width_mm=rng.uniform(118, 138),
            half_depth_mm=rng.uniform(80, 98),
            taper=rng.uniform(0.0, 0.0015),
            wall_mm=rng.uniform(26, 45),
            muscle_mm=rng.uniform(14, 20),
            heart_mm=rng.uniform(5, 40),
            diaphragm_mm=rng.uniform(-60, 25),
            rib_phase=rng.uniform(0, 1),
            lung_hu=rng.uniform(-890, -830),
            blood_hu=rng.uniform(120, 280) if with_contrast else rng.uniform(30, 60),
            waves=Waves.draw(rng),
        )

    @cached_property
    def hilum_mm(self) -> tuple[float, float, float]:
        """Where vessels and airways enter the lung, (z, y, x)."""
        place = np.array([[50.0], [8.0]])
        return (50.0, 8.0, float(self._medial_mm(place[0], place[1])[0]) + 2)

    def depth_mm(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """How deep places lie in the lung: mm to its surface, to first order; negative outside."""
        wave = 1.5 * self.waves(z, y, x)
        lateral = -self._rib_cage_mm(z, y, x) + wave
        medial = (x - self._medial_mm(z, y)) * np.float32(0.9) + wave
        dome = 28 * np.exp(-(((x - 65) / 50) ** 2) - (y / 60) ** 2) - 28
        below = (z - self.diaphragm_mm - dome) * np.float32(0.85)
        return _smooth_minimum(_smooth_minimum(lateral, medial), below)

    def hu(self, frame: Frame, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The HU of lung and of everything else, two float32 arrays of the frame's shape.

        What a voxel holds of either is told by `depth_mm`.
        """
        z, y, x = frame.axes
        return self._lung_hu(frame, rng), self._body_hu(z, y, x, edge_mm=frame.spacing[2])

    def _rib_cage_mm(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Distance outwards from the inside of the rib cage, an ellipse at every height."""
        grow = 1 - self.taper * (z - 50)
        u, v = x / (self.half_width_mm * grow), y / (self.half_depth_mm * grow)
        radius = np.sqrt(u * u + v * v) + np.float32(1e-3)
        slope = np.sqrt((u / self.half_width_mm) ** 2 + (v / self.half_depth_mm) ** 2)
        return (radius - 1) * radius / (slope + np.float32(1e-4))

    def _medial_mm(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The x where the mediastinum ends: the heart in front, the spine behind."""
        heart = self.heart_mm * np.exp(-(((y + 28) / 34) ** 2)) / (1 + np.exp((z - 62) / 14))
        spine = 12 * np.exp(-(((y - 55) / 24) ** 2))
        return 20 + heart + spine

    def _lung_hu(self, frame: Frame, rng: np.random.Generator) -> np.ndarray:
        z, y, x = frame.axes
        fine = frame.noise(rng, sigma_mm=1.0)
        hu = self.lung_hu + 0.35 * y + 10 * frame.noise(rng, sigma_mm=4) + 12 * fine
        # Vessels and walls too small to be seen one by one.
        hu += 45 * np.maximum(fine - 1.8, 0)
        fissure = (z - 45) - 0.75 * (y - 5) + 4 * self.waves(y, z, x)
        return hu + 130 * np.exp(-((fissure / 0.9) ** 2))

    def _body_hu(
        self, z: np.ndarray, y: np.ndarray, x: np.ndarray, *, edge_mm: float
    ) -> np.ndarray:
        out = self._rib_cage_mm(z, y, x)
        wave = self.waves(x, z, y)
        # Mediastinum and liver: soft tissue, fat where the field is high, blood in heart and aorta.
        hu = TISSUE_HU + (FAT_HU - TISSUE_HU) * _inside(6 * (wave - 0.9), edge_mm)
        heart = self._medial_mm(z, y) - x - 4
        in_front = _inside(np.minimum(heart, -12 - y), edge_mm) * (out < -6)
        aorta = _inside(11 - np.hypot(y - 42, x - 14), edge_mm)
        hu += (self.blood_hu - hu) * np.maximum(in_front, aorta)
        spine = 19 - np.hypot((y - 66) * 0.9, x)
        hu += (200 - hu) * _inside(spine, edge_mm)
        hu += (600 - hu) * _inside(1.5 - np.abs(spine - 1), edge_mm)
        # The wall from inside to outside: muscle between the ribs, fat, skin, air.
        fat = _inside(out - self.muscle_mm - 3 * wave, edge_mm)
        fat = np.maximum(fat, _inside(1.3 - np.abs(out - 10 - 2 * wave), edge_mm))
        wall = TISSUE_HU + (FAT_HU - TISSUE_HU) * fat
        ring = self._rib_mm(z, y, x, out)
        wall += (180 - wall) * _inside(ring, edge_mm)
        wall += (700 - wall) * _inside(0.9 - np.abs(ring - 0.9), edge_mm)
        skin = out - self.wall_mm - 2 * wave
        wall += (20 - wall) * _inside(skin + 2, edge_mm)
        wall += (AIR_HU - wall) * _inside(skin, edge_mm)
        return hu + (wall - hu) * _inside(out, edge_mm)

    def _rib_mm(self, z: np.ndarray, y: np.ndarray, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        """How deep places lie in a rib; ribs are 27 mm apart and slope down to the front."""
        along = z / 27 + (-y / self.half_depth_mm) * 1.1 + x * 0.004 + self.rib_phase
        up = (along - np.round(along)) * 27
        return 4.0 - np.hypot(out - 5.5, up * np.float32(0.62))


def _inside(depth_mm: np.ndarray, edge_mm: float) -> np.ndarray:
    """Depth inside a surface to the part of a voxel that lies inside, 0 to 1."""
    return np.clip(depth_mm * np.float32(1 / edge_mm) + np.float32(0.5), 0, 1)


def _smooth_minimum(a: np.ndarray, b: np.ndarray, *, width: float = 10.0) -> np.ndarray:
    """The smaller of two, rounded where they are within `width` of each other."""
    near = np.maximum(width - np.abs(a - b), 0)
    return np.minimum(a, b) - near * near * np.float32(0.25 / width)
