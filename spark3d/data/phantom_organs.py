"""The thirteen organs of BTCV for a phantom: where they lie, their shape, their Hounsfield units.

Mean values follow a contrast phase drawn by case; neighbours are close enough (pancreas, bowel,
adrenals, unopacified veins) that intensity alone does not tell them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spark3d.data.layouts import BTCV_LABELS
from spark3d.data.phantom_body import Body
from spark3d.data.phantom_canvas import Canvas, Point, Shape, turn

PHASES = {
    "spleen": (135, 122, 105),
    "kidney": (165, 180, 165),
    "gallbladder": (10, 10, 12),
    "oesophagus": (45, 55, 55),
    "liver": (72, 106, 96),
    "stomach": (85, 82, 75),
    "aorta": (270, 155, 122),
    "inferior_vena_cava": (85, 132, 120),
    "portal_and_splenic_veins": (115, 160, 122),
    "pancreas": (108, 96, 82),
    "adrenal_gland": (85, 78, 66),
}
"""Hounsfield units in the late arterial, portal venous and late phase."""


@dataclass(frozen=True)
class Variation:
    """How one case differs from the standard anatomy.

    Attributes:
        hu: Mean of every organ of `PHASES`.
        missing: Organs taken out.
        rng: Source of chance.
    """

    hu: dict[str, float]
    missing: frozenset[str]
    rng: np.random.Generator

    def moved(self, *points: Point, own_mm: float = 2.0, shift_mm: float = 4.0) -> list[np.ndarray]:
        """Points of one organ, displaced together and a little each (standard deviations)."""
        shift = self.rng.normal(0, shift_mm, 3)
        return [np.add(p, shift) + self.rng.normal(0, own_mm, 3) for p in points]

    def scaled(self, radii: Sequence[float], spread: float = 0.1) -> np.ndarray:
        """Radii, changed together and a little each."""
        factor = np.exp(self.rng.normal(0, spread)) * np.exp(self.rng.normal(0, 0.05, len(radii)))
        return np.clip(factor, 0.75, 1.3) * np.asarray(radii)

    def tilt(self, degrees: float = 9.0) -> np.ndarray:
        """A small random rotation."""
        return turn(self.rng.normal(0, degrees, 3))


def draw_variation(rng: np.random.Generator, phase: float) -> Variation:
    """Draw mean values for a phase (0 arterial, 0.5 portal venous, 1 late) and what is missing."""
    hu = {
        name: float(np.interp(phase, (0, 0.5, 1), values) + rng.normal(0, 6))
        for name, values in PHASES.items()
    }
    chance = {"gallbladder": 0.12, "right_adrenal_gland": 0.04, "left_adrenal_gland": 0.04}
    missing = frozenset(name for name, p in chance.items() if rng.random() < p)
    return Variation(hu, missing, rng)


def paint_organs(canvas: Canvas, body: Body, case: Variation) -> None:
    """Paint the organs from the far to the near, so that each one keeps its surface."""
    ducts = _duodenum(canvas, case)
    _liver(canvas, body, case)
    _spleen(canvas, body, case)
    _stomach(canvas, body, case)
    _kidneys(canvas, body, case)
    canvas.paint(ducts.within(body.abdomen, 2), 70, 0, 10)
    canvas.paint(ducts.grown(-4), case.rng.normal(30, 12), texture=12)
    _pancreas(canvas, body, case)
    _gallbladder(canvas, body, case)
    _adrenals(canvas, case)
    _veins(canvas, case)
    _arteries(canvas, case)


def _duodenum(canvas: Canvas, case: Variation) -> Shape:
    path = case.moved((44, 40, -14), (58, 26, -20), (56, 12, -48), (20, 2, -60), (-14, 6, -54))
    return canvas.tube(path, case.scaled((11, 12, 12, 11, 10))).rough(canvas.fine, 1)


def _liver(canvas: Canvas, body: Body, case: Variation) -> None:
    rng = case.rng
    right, left, tip = case.moved((74, 2, 22), (10, 44, 46), (86, -2, -26), own_mm=4)
    lobes = [
        canvas.ellipsoid(right, case.scaled((56, 72, 74)), case.tilt()),
        canvas.ellipsoid(left, case.scaled((74, 32, 32)), turn((0, 16, -14)) @ case.tilt()),
        canvas.ellipsoid(tip, case.scaled((34, 46, 40)), case.tilt()),
    ]
    shape = canvas.union(lobes, blend_mm=25).rough(canvas.coarse, 1.5)
    hilum = canvas.ellipsoid((22, 4, 2), (24, 22, 26), case.tilt(20)).rough(canvas.coarse, 4)
    shape = shape.without(hilum).within(body.abdomen, 1.5)
    canvas.paint(shape.grown(2.5).within(body.abdomen, 0), -60)
    canvas.paint(shape, case.hu["liver"], BTCV_LABELS["liver"], texture=7)
    inside = np.full(canvas.size, 1e3, dtype=np.float32)
    inside[shape.box] = shape.distance
    for _ in range(9):
        start = np.array([48, 4, 36]) + rng.normal(0, 8, 3)
        path = [start, start + rng.normal(0, 24, 3), start + rng.normal(0, 44, 3)]
        vein = canvas.tube(path, [4.5, 3.2, 1.5]).within(inside, 3)
        canvas.paint(vein, case.hu["inferior_vena_cava"] + 8)
    for _ in range(int(rng.integers(0, 4)) if rng.random() < 0.4 else 0):
        lesion = canvas.ellipsoid(right + rng.normal(0, 28, 3), rng.uniform(5, 15, 3))
        canvas.paint(lesion.within(inside, 1), rng.choice([12, case.hu["liver"] - 40]), texture=8)


def _spleen(canvas: Canvas, body: Body, case: Variation) -> None:
    (centre,) = case.moved((-92, -24, 32))
    radii = case.scaled((34, 46, 48), 0.15)
    shape = canvas.ellipsoid(centre, radii, turn((-18, 12, 8)) @ case.tilt())
    shape = shape.without(canvas.ellipsoid(np.add(centre, (46, 14, -8)), (34, 36, 48)))
    shape = shape.rough(canvas.coarse, 1.5).within(body.abdomen, 2)
    canvas.paint(shape.grown(2.5).within(body.abdomen, 0), -85, 0)
    early = 30 if case.hu["aorta"] > 220 else 8  # stripes of the arterial phase
    canvas.paint(shape, case.hu["spleen"], BTCV_LABELS["spleen"], texture=early)


def _stomach(canvas: Canvas, body: Body, case: Variation) -> None:
    rng = case.rng
    full = rng.uniform(0.7, 1.15)
    path = case.moved(
        (-52, 8, 64), (-60, 34, 34), (-48, 56, 0), (-8, 62, -22), (30, 52, -16), own_mm=4
    )
    radii = case.scaled((31, 29, 23, 17, 11)) * full
    shape = canvas.tube(path, radii).rough(canvas.coarse, 2).within(body.abdomen, 2.5)
    canvas.paint(shape.grown(2), -85, 0)
    canvas.paint(shape, case.hu["stomach"], BTCV_LABELS["stomach"], texture=10)
    inner = shape.grown(-4.5)
    canvas.paint(inner, rng.choice([15, 40, 140], p=[0.5, 0.35, 0.15]), texture=25)
    level = path[2][1] + rng.uniform(-8, 16)
    air = np.broadcast_to(level - canvas.y, canvas.size).astype(np.float32)
    canvas.paint(inner.grown(-1).within(air + 2 * canvas.fine), -900)


def _kidneys(canvas: Canvas, body: Body, case: Variation) -> None:
    rng, cortex = case.rng, case.hu["aorta"] > 190
    for side, name, z in ((1, "right_kidney", -22), (-1, "left_kidney", -8)):
        (centre,) = case.moved((side * 62, -38, z), own_mm=3)
        radii = case.scaled((27, 25, 50))
        axis = turn((14, side * -10, side * 22)) @ case.tilt(7)
        whole = canvas.ellipsoid(centre, radii, axis)
        hilum = centre + axis @ (-side * 24.0, 4.0, 0.0)
        sinus = canvas.ellipsoid(hilum, (17, 10, 20), axis)
        shape = whole.without(sinus).rough(canvas.fine, 0.8).within(body.cavity, 2)
        canvas.paint(whole.grown(rng.uniform(4, 9)).within(body.cavity, 0), -100, 0, texture=10)
        canvas.paint(shape, case.hu["kidney"], BTCV_LABELS[name], texture=10)
        medulla = shape.grown(-7).rough(canvas.fine, 3)
        canvas.paint(medulla, case.hu["kidney"] - (60 if cortex else 12), texture=14)
        if rng.random() < 0.2:
            cyst = canvas.ellipsoid(centre + axis @ (side * 20.0, 0, rng.normal(0, 22)), (9, 9, 9))
            canvas.paint(cyst, 8, BTCV_LABELS[name])


def _pancreas(canvas: Canvas, body: Body, case: Variation) -> None:
    path = case.moved((34, 16, -34), (32, 18, -14), (10, 26, 2), (-22, 18, 14), (-58, -8, 26))
    radii = case.scaled((11, 15, 9, 10.5, 9), 0.12)
    shape = canvas.tube(path, radii).rough(canvas.fine, 2).within(body.abdomen, 4)
    canvas.paint(shape.grown(2), -75, 0)
    canvas.paint(shape, case.hu["pancreas"], BTCV_LABELS["pancreas"], texture=18)


def _gallbladder(canvas: Canvas, body: Body, case: Variation) -> None:
    if "gallbladder" in case.missing:
        return
    (centre,) = case.moved((58, 46, -20))
    axis = turn((-35, 20, 0)) @ case.tilt(14)
    shape = canvas.ellipsoid(centre, case.scaled((13, 13, 27), 0.2), axis).within(body.abdomen, 3)
    canvas.paint(shape.grown(2), 60, 0)
    canvas.paint(shape, case.hu["gallbladder"], BTCV_LABELS["gallbladder"], texture=4)


def _adrenals(canvas: Canvas, case: Variation) -> None:
    limbs = {
        "right_adrenal_gland": ((42, -29, 44), (45, -39, 30), (51, -54, 22), (36, -53, 24)),
        "left_adrenal_gland": ((-35, -20, 38), (-39, -30, 28), (-49, -46, 24), (-33, -47, 22)),
    }
    for name, places in limbs.items():
        if name in case.missing:
            continue
        apex, fork, outer, inner = case.moved(*places, own_mm=1.5, shift_mm=2)
        thick = float(case.scaled((5.4,), 0.08)[0])
        shape = canvas.union(
            [canvas.tube([apex, fork], thick), canvas.tube([fork, outer], thick),
             canvas.tube([fork, inner], thick)],
            blend_mm=3,
        )  # fmt: skip
        canvas.paint(shape.grown(5), -98, 0)
        canvas.paint(shape, case.hu["adrenal_gland"], BTCV_LABELS[name], texture=10)


def _veins(canvas: Canvas, case: Variation) -> None:
    path = case.moved((20, 6, 104), (26, -4, 72), (27, -12, 40), (22, -16, 0), (17, -20, -60),
                      (14, -22, -165), shift_mm=3)  # fmt: skip
    wide = case.scaled((12, 12.5, 12, 11, 10.5, 9), 0.12)
    cava = canvas.tube(path, wide)
    canvas.paint(cava.grown(1.5), 20, None)
    canvas.paint(cava, case.hu["inferior_vena_cava"], BTCV_LABELS["inferior_vena_cava"], texture=14)
    splenic = case.moved((-80, -18, 32), (-46, -2, 22), (-14, 10, 8), (14, 12, 4), (30, 10, 22),
                         (48, 8, 40))  # fmt: skip
    portal = canvas.tube(splenic, case.scaled((4.5, 5.5, 6, 8, 8, 6), 0.08))
    fork = canvas.tube([splenic[-1], splenic[-1] + (20, 4, 12)], [6, 4])
    portal = canvas.union([portal, fork])
    name = "portal_and_splenic_veins"
    mesenteric = canvas.tube([splenic[3] + (0, 1, -9), (12, 18, -50), (16, 20, -100)], [6, 6, 4])
    canvas.paint(mesenteric, case.hu[name], 0, texture=6)
    canvas.paint(portal.grown(1.5), -40, None)
    canvas.paint(portal, case.hu[name], BTCV_LABELS[name], texture=8)


def _arteries(canvas: Canvas, case: Variation) -> None:
    gullet = case.moved((-4, -14, 170), (-8, -10, 110), (-16, -6, 84), (-32, 0, 70))
    shape = canvas.tube(gullet, case.scaled((9, 9, 9, 10), 0.12))
    canvas.paint(shape.grown(2), -60, None)
    canvas.paint(shape, case.hu["oesophagus"], BTCV_LABELS["oesophagus"], texture=8)
    if case.rng.random() < 0.3:
        canvas.paint(shape.grown(-8), -300)
    path = case.moved(
        (-24, -30, 170), (-16, -26, 90), (-8, -22, 20), (-7, -20, -60), (-6, -20, -112)
    )
    aorta = canvas.tube(path, case.scaled((12.5, 11.5, 10.5, 9.5, 9), 0.12))
    hu = case.hu["aorta"]
    small = [
        [path[2] + (0, 0, 18), path[2] + (2, 26, 14), path[2] + (-24, 34, 16)],
        [path[2] + (0, 0, 4), path[2] + (2, 24, -8), path[2] + (6, 36, -60)],
        *[[path[2] + (0, 0, -14), path[2] + (side * 44, -14, -24)] for side in (1, -1)],
        *[[path[4], path[4] + (side * 26, 2, -50)] for side in (1, -1)],
    ]
    for branch, thick in zip(small, (3, 3.5, 3, 3, 6, 6), strict=True):
        canvas.paint(canvas.tube(branch, thick), hu)
    canvas.paint(aorta.grown(1.5), 10, None)
    canvas.paint(aorta, hu, BTCV_LABELS["aorta"], texture=8)
    if case.rng.random() < 0.5:
        plaque = canvas.ellipsoid(path[3] + (8, -3, 10), (2.5, 5, 9))
        canvas.paint(plaque, 500)
