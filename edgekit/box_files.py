"""Detection data: the boxes of each image, as one of three formats has them.

Pascal VOC (voc_files.py), COCO (coco_files.py) or YOLO (yolo_files.py). `list_boxes` reads what is written;
`fit_boxes` checks it against the image. Boxes are meant for the photo as one sees it: upright.
"""

from __future__ import annotations

from pathlib import Path

from edgekit.coco_files import has_coco, list_coco
from edgekit.errors import DataError
from edgekit.listings import DrawnBoxes, Listing, Problem, refused_once
from edgekit.samples import Box
from edgekit.voc_files import has_voc, list_voc
from edgekit.yolo_files import has_yolo, list_yolo

OUTSIDE_PX = 2.0  # a box that reaches further beyond the image is a mistake; nearer, it is cut
ROUNDING_PX = 0.5  # nearer than this nothing is said: shares and whole pixels are rounded

WANTED = "a folder with Pascal VOC, COCO or YOLO annotations"


def has_boxes(path: Path) -> bool:
    """Whether the path looks like detection data."""
    return has_voc(path) or has_coco(path) or has_yolo(path)


def list_boxes(path: Path) -> Listing:
    """A folder, a COCO .json or a YOLO .yaml → its images and their boxes. Raises DataError for anything else."""
    if has_voc(path):
        return list_voc(path)
    if has_coco(path):
        return list_coco(path)
    if has_yolo(path):
        return list_yolo(path)
    raise DataError(
        f"{path} has no boxes that edgekit can read: expected Annotations/*.xml (Pascal VOC), a .json with images and "
        "annotations (COCO), or data.yaml or labels/*.txt (YOLO)"
    )


def fit_boxes(
    drawn: DrawnBoxes, size: tuple[int, int], class_names: tuple[str, ...], name: str
) -> tuple[tuple[Box, ...], tuple[Problem, ...]]:
    """The boxes in pixels of an image of size (height, width), cut at its edges; and what is wrong with them.

    name: the image's, for the problems.
    """
    height, width = size
    by_x, by_y = (width, height) if drawn.in_shares else (1, 1)
    boxes: list[Box] = []
    problems: list[Problem] = []
    if drawn.size not in (None, size):
        detail = f"the annotation is of {drawn.size[1]} x {drawn.size[0]} pixels, the image has {width} x {height}"
        problems.append(Problem(name, "size differs", detail, False))
    for box in drawn.boxes:
        left, right, top, bottom = box.left * by_x, box.right * by_x, box.top * by_y, box.bottom * by_y
        where = f"{box.place}: {left:.5g}, {top:.5g}, {right:.5g}, {bottom:.5g} in {width} x {height}"
        beyond = max(-left, -top, right - width, bottom - height)
        if not (left < right and top < bottom):
            problems.append(Problem(name, "empty box", f"{where}; left out", False))
            continue
        if beyond > OUTSIDE_PX or left >= width or top >= height or right <= 0 or bottom <= 0:
            problems.append(Problem(name, "box outside the image", where, True))
            continue
        if beyond > ROUNDING_PX:
            problems.append(Problem(name, "clipped box", where, False))
        edges = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
        boxes.append(Box(class_names.index(box.class_name), *edges))
    if not boxes and not any(problem.fatal for problem in problems):
        problems.append(Problem(name, "no boxes", "kept, as an image with nothing to find", False))
    return tuple(boxes), tuple(refused_once(problems))
