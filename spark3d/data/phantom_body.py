"""The body around the organs of a phantom: skin, fat, muscle, bones, lungs, heart and bowel.

Lengths are millimetres; the anatomy is drawn in a standard pose of an adult and varied by case.
"""

from dataclasses import dataclass

import numpy as np

from spark3d.data.phantom_canvas import Canvas, Grid, Shape

CAVITY = (125.0, 82.0)
"""Half width and half depth of the abdominal cavity."""
SPINE_Y = -50.0
VERTEBRA = 32.0


@dataclass(frozen=True)
class Body:
    """Distances on the whole grid, negative inside.

    Attributes:
        skin: The body's surface.
        cavity: The inner side of the wall of muscle and ribs.
        abdomen: The cavity below the diaphragm.
        diaphragm: Height above the dome.
    """

    skin: Grid
    cavity: Grid
    abdomen: Grid
    diaphragm: Grid


def paint_body(canvas: Canvas, phase: float) -> Body:
    """Paint all that is not one of the thirteen organs and lies around or behind them.

    Args:
        canvas: Empty; gets the body.
        phase: Of the contrast agent, 0 early arterial .. 1 late.
    """
    body = _walls(canvas)
    _muscles(canvas, body)
    _chest(canvas, body, phase)
    _bowel(canvas, body)
    return body


def _walls(canvas: Canvas) -> Body:
    rng, (x, y, z) = canvas.rng, (canvas.x, canvas.y, canvas.z)
    fat, muscle = rng.uniform(6, 24), rng.uniform(9, 13)
    exponent = rng.uniform(2.1, 2.7)
    waist = 1 - 0.05 * np.exp(-(((z + 50) / 55) ** 2)) - 0.1 * np.clip((z - 90) / 100, 0, 1)
    norm = np.abs(x / (CAVITY[0] * waist)) ** exponent + np.abs(y / (CAVITY[1] * waist)) ** exponent
    norm = np.maximum(norm ** (1 / exponent), 1e-3)
    cavity = (np.sqrt(x * x + y * y + 1e-6) * (1 - 1 / norm)).astype(np.float32)
    flank = 1 + 0.35 * np.tanh(np.abs(x) / 60) - 0.35 * np.exp(-((x / 30) ** 2)) * (y > 0)
    thick = fat * flank * (1 - 0.5 * np.clip(z / 160, 0, 1))
    skin = cavity - muscle - thick.astype(np.float32)
    canvas.paint(canvas.whole(skin), rng.normal(10, 15), texture=10)
    canvas.paint(canvas.whole(skin + 2.5), rng.normal(-104, 4), texture=7)
    canvas.paint(canvas.whole(cavity - muscle), rng.normal(52, 5), texture=14)
    canvas.paint(canvas.whole(cavity), rng.normal(-98, 5), texture=16)
    diaphragm = _dome(canvas)
    return Body(skin, cavity, np.maximum(cavity + 1, diaphragm), diaphragm)


def _dome(canvas: Canvas) -> Grid:
    """Height above the diaphragm: two domes, the right one (the liver's) the higher."""
    rng, (x, y, z) = canvas.rng, (canvas.x, canvas.y, canvas.z)
    breath = rng.normal(0, 7)
    domes = []
    for side, top in ((1, 96), (-1, 86)):
        centre = side * 60 + rng.normal(0, 4)
        fall = 85 * ((x - centre) / 75) ** 2 + 62 * ((y - 8) / 80) ** 2
        domes.append(top + breath - fall)
    ridge = 72 + breath - 30 * (y / 80) ** 2 - 200 * (x / 75) ** 4
    return (z - np.maximum(np.maximum(domes[0], domes[1]), ridge)).astype(np.float32)


def _muscles(canvas: Canvas, body: Body) -> None:
    rng, hu = canvas.rng, canvas.rng.normal(55, 5)
    bulk = rng.uniform(0.85, 1.2)
    for side in (1, -1):
        back = canvas.ellipsoid((side * 36, -84, -10), (30 * bulk, 19, 260))
        canvas.paint(back.rough(canvas.fine, 1.5).within(body.skin, 6), hu, texture=16)
        psoas = [(side * a, b, c) for a, b, c in ((24, -44, 10), (34, -42, -50), (46, -30, -160))]
        canvas.paint(canvas.tube(psoas, [5, 15 * bulk, 19 * bulk]), hu, texture=10)
        crus = [(side * 12, -30, 60), (side * 16, -36, 0), (side * 12, -36, -40)]
        canvas.paint(canvas.tube(crus, [5, 6, 3]), hu, texture=10)


def _chest(canvas: Canvas, body: Body, phase: float) -> None:
    rng, x, y = canvas.rng, canvas.x, canvas.y
    above = canvas.whole(np.maximum(body.cavity + 2, -body.diaphragm))
    canvas.paint(above.grown(3.5), rng.normal(50, 6), texture=8)
    middle = 24 + 14 * np.exp(-(((y - 30) / 45) ** 2)) - np.hypot(x, 0.15 * (y + 20))
    lungs = canvas.whole(np.maximum(above.distance, middle.astype(np.float32)))
    canvas.paint(
        canvas.whole(np.maximum(above.distance, -middle.astype(np.float32))), -85, None, 12
    )
    canvas.paint(lungs, rng.normal(-840, 25), texture=20)
    vessels = canvas.whole(1.5 * (1.9 - canvas.fine - 0.4 * canvas.coarse))
    canvas.paint(vessels.within(lungs.distance, 4), rng.normal(-150, 60))
    blood = 130 + 90 * np.exp(-(((phase - 0.15) / 0.25) ** 2))
    heart = canvas.ellipsoid((-18, 22, 128 + rng.normal(0, 6)), (62, 52, 52))
    canvas.paint(heart.grown(4), -80, texture=12)
    canvas.paint(heart.rough(canvas.coarse, 2), 95, texture=14)
    for shift in ((-28, 10, 0), (16, 14, 6)):
        chamber = canvas.ellipsoid(np.add((-18, 18, 130), shift), (24, 24, 26))
        canvas.paint(chamber.rough(canvas.coarse, 2), blood, texture=8)


def paint_bones(canvas: Canvas, body: Body) -> None:
    """Paint spine, ribs and the wings of the pelvis, over all else."""
    _spine(canvas, body)
    _ribs(canvas, body)
    rng = canvas.rng
    top = -112 + rng.normal(0, 8)
    for side in (1, -1):
        wing = [(side * a, b, top + c) for a, b, c in ((70, -62, 0), (98, -25, 5), (108, 20, -12))]
        lower = [(side * a, b, top - c) for a, b, c in ((55, -66, 50), (80, -30, 50), (95, 15, 50))]
        lines = [canvas.tube(wing, 6)] + [
            canvas.tube([p, q], 5) for p, q in zip(wing, lower, strict=True)
        ]
        lines += [canvas.tube([wing[0], lower[1]], 5), canvas.tube([wing[1], lower[2]], 5)]
        bone = canvas.union(lines, blend_mm=12)
        canvas.paint(bone.grown(1), 480, 0, texture=60)
        canvas.paint(bone.grown(-3), 230, texture=60)


def _spine(canvas: Canvas, body: Body) -> None:
    rng, (x, y, z) = canvas.rng, (canvas.x, canvas.y, canvas.z)
    lordosis = 7 * np.cos((z + 60) / 60) - 7
    curve = rng.normal(0, 3) * np.sin(z / 70)
    y0, x0 = y - SPINE_Y - lordosis, x - curve
    height = np.abs((z + rng.uniform(0, VERTEBRA)) % VERTEBRA - VERTEBRA / 2)
    column = (np.sqrt((x0 / 22) ** 2 + (y0 / 17) ** 2) - 1) * 19
    dense = rng.uniform(0.75, 1.25)
    canvas.paint(canvas.whole(column.astype(np.float32) + 1), 85, 0, texture=8)
    bodies = np.maximum(column, height - 12.5).astype(np.float32)
    canvas.paint(canvas.whole(bodies), 420 * dense, texture=50)
    canvas.paint(canvas.whole(bodies + 4), 190 * dense, texture=35)
    arch = np.abs(np.hypot(x0, y0 + 27) - 12) - 3.5
    process = np.maximum(np.abs(x0) - 3.5, np.abs(y0 + 46) - 11)
    wings = np.maximum(
        np.hypot(np.abs(y0 + 24) - 2, np.maximum(np.abs(x0) - 38, 0)) - 4, 12 - np.abs(x0)
    )
    behind = np.maximum(np.minimum(np.minimum(arch, process), wings), height - 9)
    rear = canvas.whole(behind).within(body.skin, 6)
    canvas.paint(rear, 450 * dense, texture=50)
    canal = np.hypot(x0, y0 + 27) - 8.5 + 0 * z
    canvas.paint(canvas.whole(canal.astype(np.float32)), 22, texture=6)


def _ribs(canvas: Canvas, body: Body) -> None:
    """Ribs run along the wall and sink towards the front; the last end at the flank."""
    rng, (x, y, z) = canvas.rng, (canvas.x, canvas.y, canvas.z)
    turned = np.arctan2(np.abs(x), -(y + 10))
    sinking = z + 130 * np.sin(turned / 2) ** 2
    pitch = 33.0
    across = np.abs((sinking + rng.uniform(0, pitch)) % pitch - pitch / 2)
    shell = (np.hypot((body.cavity - 5) / 3.5, across / 4.0) - 1) * 3.7
    margin = -42 - 12 * np.sin(turned) + 80 * np.clip((turned - 1.5) / 1.3, 0, 1)
    ribs = np.maximum(np.maximum(shell, margin - z), (turned - 2.6) * 60)
    shape = canvas.whole(ribs.astype(np.float32))
    canvas.paint(shape, 430, 0, texture=60)
    canvas.paint(shape.grown(-2.5), 230, texture=40)


def _bowel(canvas: Canvas, body: Body) -> None:
    """Colon with gas and stool, coils of small bowel, mesenteric vessels: all unlabelled."""
    rng = canvas.rng
    frame = [(88, -8, -135), (92, 2, -80), (86, 22, -42), (55, 55, -58), (5, 66, -70),
             (-50, 58, -48), (-92, 12, -22), (-96, -12, -75), (-88, -10, -140)]  # fmt: skip
    colon = canvas.tube([np.add(p, rng.normal(0, 7, 3)) for p in frame], rng.uniform(13, 22, 9))
    colon = colon.rough(canvas.coarse, 2.5).within(body.abdomen, 2)
    canvas.paint(colon, 45, texture=8)
    inner = colon.grown(-4)
    canvas.paint(inner, rng.normal(20, 20), texture=40)
    gas = canvas.whole(6 * (rng.uniform(0, 0.8) - canvas.coarse - canvas.y / 60))
    canvas.paint(_both(inner, gas), -850)
    filled = rng.random() < 0.4
    for _ in range(int(rng.integers(12, 18))):
        point = np.array([rng.uniform(-75, 75), rng.uniform(-15, 55), rng.uniform(-165, -40)])
        coil = [point]
        for _ in range(4):
            coil.append(coil[-1] + rng.normal(0, 16, 3))
        loop = canvas.tube(coil, rng.uniform(8, 12)).rough(canvas.fine, 1).within(body.abdomen, 3)
        canvas.paint(loop, rng.normal(75, 12), texture=10)
        canvas.paint(loop.grown(-3.5), 190 if filled else rng.normal(25, 10), texture=15)
    for _ in range(25):
        start = np.array([rng.uniform(-15, 15), 10, rng.uniform(-80, 0)])
        end = np.add(start, (rng.normal(0, 50), rng.uniform(5, 45), rng.normal(-25, 30)))
        canvas.paint(canvas.tube([start, end], [2.5, 1.2]).within(body.abdomen, 3), 110)


def _both(one: Shape, everywhere: Shape) -> Shape:
    return one.within(np.asarray(everywhere.distance))
