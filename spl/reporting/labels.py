"""Where the labels of points stand, so that none hides a point or another label."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Box = tuple[float, float, float, float]  # left, top, right, bottom, pixels


class Place(NamedTuple):
    """A place beside a point: how text is aligned there, and how far it is moved, in pixels."""

    align: Literal["left", "right"]
    dx: int
    dy: int


PLACES = {
    "above right": Place("left", 6, -8),
    "below right": Place("left", 6, 9),
    "above left": Place("right", -6, -8),
    "below left": Place("right", -6, 9),
}
_LETTER, _LINE, _POINT = 5.4, 11.0, 4.0  # pixels of a letter, a line of text and half a point


def place_labels(
    points: Sequence[tuple[float, float, str]],
    domains: tuple[tuple[float, float], ...],
    size: tuple[int, int],
) -> list[str]:
    """A place for the label of every point, the first that is free; "" where none is.

    Args:
        points: x, y and the label.
        domains: ends of both axes.
        size: of the chart, pixels.
    """
    (left, right), (bottom, top) = domains
    spots = [((x - left) / (right - left) * size[0], (top - y) / (top - bottom) * size[1]) for x, y, _ in points]
    taken: list[Box] = [(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in spots]
    found = []
    for (x, y), (_, _, label) in zip(spots, points, strict=True):
        boxes = {name: _box(x, y, place, label) for name, place in PLACES.items()}
        free = [name for name, box in boxes.items() if _inside(box, size) and not any(_meet(box, b) for b in taken)]
        found.append(free[0] if free else "")
        taken += [boxes[free[0]]] if free else []
    return found


def _box(x: float, y: float, place: Place, label: str) -> Box:
    left = x + place.dx - (_LETTER * len(label) if place.align == "right" else 0)
    return left, y + place.dy - _LINE / 2, left + _LETTER * len(label), y + place.dy + _LINE / 2


def _inside(box: Box, size: tuple[int, int]) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= size[0] and box[3] <= size[1]


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
