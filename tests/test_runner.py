"""The device half, function by function: pixels, answers, sources, drawings, the bundle's proof."""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import cv2
import numpy as np
import pytest
from bundles import SPEC
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from edgekit import runner
from edgekit.runner import Frame, RunnerError

sizes = st.integers(1, 200)
small_sizes = st.integers(1, 64)
PHOTO = (480, 640)
logits = hnp.arrays(np.float32, st.integers(1, 12), elements=st.floats(-1e4, 1e4, width=32))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle to look at, not to change."""
    return bundles.write_bundle(tmp_path_factory.mktemp("built") / "bundle")


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


DETECT = replace(
    SPEC,
    task="detect",
    resize="letterbox",
    input_size=(64, 96),
    strides=(8, 16, 32),
    score_threshold=0.3,
    iou_threshold=0.6,
)
SEGMENT = replace(SPEC, task="segment", resize="letterbox", input_size=(64, 96))


def png(image: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".png", image)[1].tobytes())


def pil(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def some_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_video(path: Path, count: int, fps: float = 12.5, codec: str = "MJPG") -> Path:
    """64 x 48 pixels; frame i is grey, of level 30 * i."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (64, 48))
    for number in range(count):
        writer.write(np.full((48, 64, 3), 30 * number, np.uint8))
    writer.release()
    return path


# ---------------------------------------------------------------------------------------------------------------
# Spec


def test_a_spec_survives_json() -> None:
    raw = json.loads(json.dumps(SPEC.to_dict()))
    assert raw == {
        "task": "classify",
        "input_size": [32, 48],
        "resize": "stretch",
        "interpolation": "linear",
        "color_order": "rgb",
        "mean_255": [123.675, 116.28, 103.53],
        "std_255": [58.395, 57.12, 57.375],
        "class_names": ["pagoda", "flower", "roof", "Blüte", "sky", "leaf", "lake"],
        "temperature": 1.0,
    }
    assert runner.Spec.from_dict(raw) == SPEC
    assert runner.Spec.from_dict({**raw, "temperature": 2}) == replace(SPEC, temperature=2)


def test_a_spec_of_before_has_the_temperature_one() -> None:
    raw = SPEC.to_dict()
    del raw["temperature"]
    assert runner.Spec.from_dict(raw) == SPEC
    assert "temperature" not in raw, "what is read stays as it was"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task", "pose"),
        ("task", ["classify"]),
        ("resize", "pad"),
        ("interpolation", "cubic"),
        ("color_order", "RGB"),
        ("color_order", None),
        ("input_size", [0, 48]),
        ("input_size", [-32, 48]),
        ("input_size", [32]),
        ("input_size", [32, 48, 3]),
        ("input_size", 32),
        ("input_size", [32.0, 48.0]),
        ("input_size", [True, 48]),
        ("input_size", "32"),
        ("mean_255", [1.0, 2.0]),
        ("mean_255", [1.0, 2.0, math.nan]),
        ("mean_255", [1.0, 2.0, "3"]),
        ("std_255", [1.0, 0.0, 1.0]),
        ("std_255", [1.0, -1.0, 1.0]),
        ("std_255", [math.nan, 1.0, 1.0]),
        ("std_255", [1.0, 1.0, math.inf]),
        ("std_255", []),
        ("std_255", None),
        ("class_names", []),
        ("class_names", "cat"),
        ("class_names", ["cat", 2]),
        ("class_names", None),
        ("temperature", 0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        pytest.param("temperature", 10**400, id="temperature-more than a float"),
        ("temperature", True),
        ("temperature", "1"),
        ("temperature", [1.0]),
        ("temperature", None),
    ],
)
def test_an_impossible_spec_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(RunnerError, match=f"the spec's {key} "):
        runner.Spec.from_dict({**SPEC.to_dict(), key: value})


COMMON = {key: value for key, value in SPEC.to_dict().items() if key != "temperature"}
DETECTION = {"task": "detect", "strides": [8, 16, 32], "score_threshold": 0.3, "iou_threshold": 0.6}


def test_a_detections_spec_survives_json_and_the_others_have_no_such_keys() -> None:
    raw = {**COMMON, **DETECTION}
    spec = runner.Spec.from_dict(json.loads(json.dumps(raw)))
    assert spec == replace(SPEC, task="detect", strides=(8, 16, 32), score_threshold=0.3, iou_threshold=0.6)
    assert spec.to_dict() == raw
    for task in ("classify", "segment"):
        with pytest.raises(RunnerError, match=r"keys differ.*iou_threshold, score_threshold, strides"):
            runner.Spec.from_dict({**raw, "task": task})
    with pytest.raises(RunnerError, match=r"keys differ.*iou_threshold, score_threshold, strides"):
        runner.Spec.from_dict({**COMMON, "task": "detect"})


@pytest.mark.parametrize("others", [DETECTION, {"task": "segment"}])
def test_only_a_classification_has_a_temperature(others: dict[str, Any]) -> None:
    raw = {**COMMON, **others}
    assert runner.Spec.from_dict(raw).to_dict() == raw
    with pytest.raises(RunnerError, match=r"keys differ from this run\.py's: temperature\."):
        runner.Spec.from_dict({**raw, "temperature": 1.0})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("strides", []),
        ("strides", [0]),
        ("strides", [8.0]),
        ("strides", 8),
        ("score_threshold", 1.1),
        ("score_threshold", None),
        ("iou_threshold", -0.1),
        ("iou_threshold", True),
        ("iou_threshold", math.nan),
    ],
)
def test_an_impossible_detection_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(RunnerError, match=f"the spec's {key} cannot be"):
        runner.Spec.from_dict({**COMMON, **DETECTION, key: value})


def test_a_class_map_has_eight_bits() -> None:
    names = [f"class {i}" for i in range(256)]
    raw = {**COMMON, "class_names": names}
    assert len(runner.Spec.from_dict(raw).class_names) == 256
    assert len(runner.Spec.from_dict({**raw, "task": "segment", "class_names": names[:255]}).class_names) == 255
    with pytest.raises(RunnerError, match="the spec's class_names cannot be"):
        runner.Spec.from_dict({**raw, "task": "segment"})


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({key: value for key, value in SPEC.to_dict().items() if key != "std_255"}, "std_255"),
        ({**SPEC.to_dict(), "crop_fraction": 0.9}, "crop_fraction"),
        ({key: value for key, value in SPEC.to_dict().items() if key != "task"}, "task"),
        ({}, "class_names, color_order, input_size"),
    ],
)
def test_a_spec_with_other_keys_is_refused(raw: Any, named: str) -> None:
    with pytest.raises(RunnerError, match=f"keys differ.*{named}.*Build the bundle again"):
        runner.Spec.from_dict(raw)


@pytest.mark.parametrize(("raw", "kind"), [([], "list"), (None, "NoneType"), ("classify", "str")])
def test_what_is_no_object_is_no_spec(raw: Any, kind: str) -> None:
    with pytest.raises(RunnerError, match=rf"^the spec is a {kind}\. Build the bundle again$"):
        runner.Spec.from_dict(raw)


# ---------------------------------------------------------------------------------------------------------------
# decode

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_is_obeyed(orientation: int) -> None:
    picture = Image.fromarray(some_image(40, 24))
    exif = picture.getexif()
    exif[0x0112] = orientation
    plain, turned = pil(picture, "JPEG"), pil(picture, "JPEG", exif=exif)
    assert np.array_equal(runner.decode(turned), UPRIGHT[orientation](runner.decode(plain)))


def test_sixteen_bits_become_eight() -> None:
    wide = np.random.default_rng(1).integers(0, 65536, (7, 9, 3), np.uint16)
    assert np.array_equal(runner.decode(png(wide)), (wide >> 8).astype(np.uint8))


def test_alpha_is_left_out_and_the_colours_stay() -> None:
    image = some_image(6, 8)
    alpha = np.dstack([image, np.full((6, 8), 3, np.uint8)])
    assert np.array_equal(runner.decode(png(alpha)), image)


def test_grey_one_bit_and_palette_become_three_channels() -> None:
    grey = some_image(6, 8)[..., :1]
    assert np.array_equal(runner.decode(png(grey)), grey.repeat(3, axis=2))
    ink = Image.fromarray(grey[..., 0]).convert("1")
    assert np.array_equal(runner.decode(pil(ink, "PNG")), np.array(ink.convert("RGB")))
    palette = Image.fromarray(some_image(6, 8)).convert("P")
    assert np.array_equal(runner.decode(pil(palette, "PNG")), np.array(palette.convert("RGB"))[..., ::-1])


def test_a_cmyk_jpeg_has_its_true_colours() -> None:
    photo = bundles.photo("flower")
    cmyk = Image.fromarray(photo[..., ::-1]).convert("CMYK")
    decoded = runner.decode(pil(cmyk, "JPEG", quality=95))
    assert decoded.shape == photo.shape
    assert np.abs(decoded.astype(int) - photo).mean() < 4  # a swapped or inverted channel: over 50


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"not an image", "not an image"),
        (b"\xff\xd8", "cut off"),
        (png(some_image(90, 90))[:500], "not an image|cannot decode"),
        (b"BM" + bytes(200), "not an image|cannot decode"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(RunnerError, match=message):
        runner.decode(data)


def test_a_jpeg_is_whole_or_refused_wherever_it_is_cut() -> None:
    picture = Image.fromarray(some_image(16, 16))
    thumbnail = pil(picture, "JPEG")  # with an end mark of its own
    for options in ({}, {"progressive": True}, {"exif": b"Exif\0\0" + thumbnail}, {"restart_marker_rows": 1}):
        data = pil(picture, "JPEG", **options)
        assert not runner.jpeg_is_cut_off(data)
        assert not runner.jpeg_is_cut_off(data + b"what some cameras append")
        assert all(runner.jpeg_is_cut_off(data[:length]) for length in range(2, len(data)))
        filled = data[:2] + b"\xff" + data[2:]  # before a marker, any number of FF is legal
        assert not runner.jpeg_is_cut_off(filled) and runner.jpeg_is_cut_off(filled[:-1])
        with pytest.raises(RunnerError, match="cut off: copy it again"):
            runner.decode(data[:-2])
    assert not runner.jpeg_is_cut_off(b"")
    assert not runner.jpeg_is_cut_off(png(some_image(4, 4))[:20])


@given(st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF", b"II*\0"]))
@example(b"\xff" * 300, b"\xff\xd8")
def test_any_bytes_give_an_image_or_a_runner_error(data: bytes, start: bytes) -> None:
    try:
        image = runner.decode(start + data)
    except RunnerError as error:
        assert 0 < len(str(error)) < 400 and "\n" not in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def test_read_image_gives_the_pixels_or_the_reason(tmp_path: Path) -> None:
    image = some_image(5, 7)
    path = tmp_path / "фото Ä.png"
    path.write_bytes(png(image))
    assert np.array_equal(runner.read_image(path), image)
    for bad, reason in {
        tmp_path / "none.png": "No such file",
        tmp_path: "Is a directory",
        tmp_path / ("a" * 300): "too long",
        Path("zero\0byte"): "null byte",
    }.items():
        with pytest.raises(RunnerError, match=reason):
            runner.read_image(bad)


# ---------------------------------------------------------------------------------------------------------------
# resize


@given(
    sizes, sizes, small_sizes, small_sizes, st.sampled_from(["stretch", "crop"]), st.sampled_from(["linear", "area"])
)
def test_any_size_becomes_the_networks_and_one_colour_stays_one(
    height: int, width: int, to_height: int, to_width: int, mode: str, interpolation: str
) -> None:
    spec = replace(SPEC, input_size=(to_height, to_width), resize=mode, interpolation=interpolation)
    color = (3, 250, 77)
    resized = runner.resize(np.full((height, width, 3), color, np.uint8), spec)
    assert resized.dtype == np.uint8
    assert np.array_equal(resized, np.full((to_height, to_width, 3), color, np.uint8))


@given(sizes, sizes, small_sizes, small_sizes, st.sampled_from(["stretch", "crop"]))
def test_each_pixel_comes_from_its_place(height: int, width: int, to_height: int, to_width: int, mode: str) -> None:
    """The image tells its own coordinates: channel 0 is x, channel 1 is y."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(width), np.arange(height)[:, None]
    resized = runner.resize(image, replace(SPEC, input_size=(to_height, to_width), resize=mode)).astype(float)
    aspect = to_width / to_height
    part_width = min(width, height * aspect) if mode == "crop" else width
    part_height = min(height, width / aspect) if mode == "crop" else height

    def expected(full: int, part: float, count: int) -> np.ndarray:
        start = (full - part) / 2  # the middle of the image
        centers = start + (np.arange(count) + 0.5) * part / count - 0.5
        return np.clip(centers, max(start, 0), min(start + part, full) - 1)

    assert np.abs(resized[..., 0] - expected(width, part_width, to_width)).max() <= 2
    assert np.abs(resized[..., 1] - expected(height, part_height, to_height)[:, None]).max() <= 2


@given(small_sizes, small_sizes, st.integers(0, 60), st.booleans(), st.sampled_from(["linear", "area"]))
def test_a_crop_without_scaling_is_the_middle_bit_for_bit(
    height: int, width: int, more: int, wider: bool, interpolation: str
) -> None:
    spec = replace(SPEC, input_size=(height, width), resize="crop", interpolation=interpolation)
    image = some_image(height + (0 if wider else more), width + (more if wider else 0))
    top, left = (0, more // 2) if wider else (more // 2, 0)
    assert np.array_equal(runner.resize(image, spec), image[top : top + height, left : left + width])


def test_area_averages_and_linear_samples() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, 2::4] = stripes[:, 3::4] = 200  # 0 0 200 200
    spec = replace(SPEC, input_size=(16, 16))
    assert np.array_equal(runner.resize(stripes, replace(spec, interpolation="area")), np.full((16, 16, 3), 100))
    stripes[:, 2::4] = 0  # 0 0 0 200: what linear reads lies between the second and the third
    assert np.array_equal(runner.resize(stripes, replace(spec, interpolation="area")), np.full((16, 16, 3), 50))
    assert np.array_equal(runner.resize(stripes, spec), np.zeros((16, 16, 3)))


@pytest.mark.parametrize("shape", [(8, 8), (8, 100), (100, 8), (31, 47)])
def test_area_is_linear_where_a_side_grows(shape: tuple[int, int]) -> None:
    image = some_image(*shape)
    assert np.array_equal(runner.resize(image, SPEC), runner.resize(image, replace(SPEC, interpolation="area")))


def test_linear_is_worked_by_hand() -> None:
    """Pixel centres: x = 0.125, 1.375, 2.625, 3.875 and y = 2/3, 3, 5 1/3; the value there is 15 y + 3 x + 1."""
    ramp = np.arange(7 * 5 * 3, dtype=np.uint8).reshape(7, 5, 3)
    assert runner.resize(ramp, replace(SPEC, input_size=(3, 4)))[..., 1].tolist() == [
        [11, 15, 19, 23],
        [46, 50, 54, 58],
        [81, 85, 89, 93],
    ]


@pytest.mark.parametrize(
    "image",
    [
        None,
        "photo.jpg",
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)
def test_what_is_no_image_array_is_refused(image: Any) -> None:
    """cv2.imread gives None for a missing file: the likeliest mistake with Model."""
    with pytest.raises(RunnerError, match="expected an image as an array, uint8"):
        runner.preprocess(image, SPEC)


# ---------------------------------------------------------------------------------------------------------------
# normalize, preprocess

images = hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.just(3)))
three = st.tuples(*[st.floats(0, 255)] * 3)


@given(images, three, st.tuples(*[st.floats(0.5, 300)] * 3), st.sampled_from(["rgb", "bgr"]))
def test_normalize_is_its_formula(
    pixels: np.ndarray, mean: tuple[float, float, float], std: tuple[float, float, float], order: str
) -> None:
    spec = replace(SPEC, mean_255=mean, std_255=std, color_order=order)
    blob = runner.normalize(pixels, spec)
    assert blob.shape == (len(pixels), 3, *pixels.shape[1:3]) and blob.dtype == np.float32
    channels = pixels[..., ::-1] if order == "rgb" else pixels
    mean32, std32 = np.array(mean, np.float32), np.array(std, np.float32)
    formula = ((channels.astype(np.float32) - mean32) * (np.float32(1) / std32)).transpose(0, 3, 1, 2)
    np.testing.assert_array_max_ulp(blob, formula, maxulp=1)
    exact = (channels - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(blob, exact.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-4)


def test_the_channels_stand_in_the_specs_order() -> None:
    blue = np.full((1, 2, 2, 3), (255, 0, 0), np.uint8)  # BGR
    plain = replace(SPEC, mean_255=(0.0, 0.0, 0.0), std_255=(255.0, 127.5, 51.0))
    assert runner.normalize(blue, plain)[0, :, 0, 0].tolist() == [0.0, 0.0, 5.0]
    assert runner.normalize(blue, replace(plain, color_order="bgr"))[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]


def test_preprocess_is_resize_then_normalize_and_leaves_the_image_alone() -> None:
    image = bundles.photo("china")
    before = image.copy()
    blob = runner.preprocess(image, SPEC)
    assert blob.shape == (1, 3, 32, 48) and blob.dtype == np.float32
    assert np.array_equal(blob, runner.normalize(runner.resize(image, SPEC)[None], SPEC))
    assert np.array_equal(image, before)


def test_a_view_with_strides_gives_what_its_copy_gives() -> None:
    view = bundles.photo("china")[::2, ::-3]
    assert np.array_equal(runner.preprocess(view, SPEC), runner.preprocess(view.copy(), SPEC))


# ---------------------------------------------------------------------------------------------------------------
# softmax, classify


@given(logits)
def test_softmax_is_a_distribution_in_the_logits_order(values: np.ndarray) -> None:
    scores = runner.softmax(values.astype(np.float64))
    assert (scores >= 0).all() and scores.sum() == pytest.approx(1, abs=1e-12)
    assert (np.diff(scores[np.argsort(values, kind="stable")]) >= 0).all()


@given(logits, st.floats(-1e3, 1e3))
def test_softmax_knows_differences_only(values: np.ndarray, shift: float) -> None:
    wide = values.astype(np.float64)
    np.testing.assert_allclose(runner.softmax(wide + shift), runner.softmax(wide), atol=1e-9)


def test_softmax_figures_and_rows() -> None:
    rows = runner.softmax(np.array([[0.0, math.log(3)], [1e4, -1e4]]))
    np.testing.assert_allclose(rows, [[0.25, 0.75], [1.0, 0.0]], rtol=1e-15)


def test_classify_gives_whole_answers_best_first() -> None:
    outputs = {"logits": np.log(np.array([[0.1, 0.2, 0.05, 0.4, 0.05, 0.15, 0.05]], np.float32))}
    answers = runner.classify(outputs, SPEC, PHOTO, 3)
    assert [(answer["label"], answer["class_id"]) for answer in answers] == [("Blüte", 3), ("flower", 1), ("leaf", 5)]
    assert [answer["score"] for answer in answers] == pytest.approx([0.4, 0.2, 0.15], rel=1e-6)
    assert [set(answer) for answer in answers] == [{"label", "class_id", "score"}] * 3
    assert json.loads(json.dumps(answers)) == answers  # no numpy types


@pytest.mark.parametrize(("temperature", "shares"), [(1.0, [27, 8, 1]), (0.5, [27**2, 8**2, 1]), (3.0, [3, 2, 1])])
def test_scores_are_of_the_logits_over_the_temperature(temperature: float, shares: list[int]) -> None:
    spec = replace(SPEC, class_names=("a", "b", "c"), temperature=temperature)
    outputs = {"logits": np.log(np.array([[8.0, 27.0, 1.0]]))}
    assert runner.classify(outputs, spec, PHOTO) == [
        {"label": label, "class_id": class_id, "score": pytest.approx(share / sum(shares), rel=1e-12)}
        for label, class_id, share in zip("bac", (1, 0, 2), shares, strict=True)
    ]


@given(logits, st.floats(0.05, 20))
def test_a_temperature_never_changes_the_order(values: np.ndarray, temperature: float) -> None:
    """Not even where scores are so near 0 or each other that they are equal."""
    spec = replace(SPEC, class_names=tuple(map(str, range(len(values)))))
    outputs = {"logits": values[None]}
    plain, scaled = (
        runner.classify(outputs, each, PHOTO, 0) for each in (spec, replace(spec, temperature=temperature))
    )
    assert [row["class_id"] for row in scaled] == [row["class_id"] for row in plain]
    assert sum(row["score"] for row in scaled) == pytest.approx(1)
    assert (np.diff([row["score"] for row in scaled]) <= 0).all()


def test_classify_gives_ties_in_class_order_and_all_for_zero() -> None:
    outputs = {"logits": np.array([[1, 2, 2, 1, 2, 1, 1]], np.float32)}
    assert [answer["class_id"] for answer in runner.classify(outputs, SPEC, PHOTO, 0)] == [1, 2, 4, 0, 3, 5, 6]
    assert [answer["class_id"] for answer in runner.classify(outputs, SPEC, PHOTO, 99)] == [1, 2, 4, 0, 3, 5, 6]
    assert [answer["class_id"] for answer in runner.classify(outputs, SPEC, PHOTO)] == [1, 2, 4, 0, 3]
    assert sum(answer["score"] for answer in runner.classify(outputs, SPEC, PHOTO, 0)) == pytest.approx(1)


def test_classify_leaves_out_what_scores_less_than_asked() -> None:
    outputs = {"logits": np.array([[math.log(4), 0, math.log(2), -99, 0, -99, -99]], np.float32)}  # 1/2, 1/8, 1/4, ...
    for least, classes in {0.2: [0, 2], 0.51: [], 0.12: [0, 2, 1, 4], 0.0: [0, 2, 1, 4, 3, 5, 6]}.items():
        assert [answer["class_id"] for answer in runner.classify(outputs, SPEC, PHOTO, 0, least)] == classes
    assert [answer["class_id"] for answer in runner.classify(outputs, SPEC, PHOTO, 1, 0.2)] == [0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_classify_has_no_answer_for_an_output_that_is_no_number(value: float) -> None:
    with pytest.raises(RunnerError, match="not finite"):
        runner.classify({"logits": np.array([[0, value, 0, 0, 0, 0, 0]], np.float32)}, SPEC, PHOTO)


def test_a_bundles_temperature_is_its_scores_and_not_its_outputs(tmp_path: Path) -> None:
    spec = replace(SPEC, temperature=2.5)
    folder = bundles.write_bundle(tmp_path / "warm", spec)
    image = bundles.photo("china")
    model = runner.Model(folder)
    logits = model.session(runner.preprocess(image, SPEC))["logits"][0].astype(np.float64)
    scores = {row["class_id"]: row["score"] for row in model(image, 0)}
    np.testing.assert_allclose([scores[i] for i in range(7)], runner.softmax(logits / 2.5), rtol=1e-12)
    plain = bundles.write_bundle(tmp_path / "plain", SPEC)
    (_, warm_outputs), (_, plain_outputs) = bundles.read_expected(folder), bundles.read_expected(plain)
    assert np.array_equal(warm_outputs["logits"], plain_outputs["logits"])
    assert all(row["ok"] for row in runner.check(model))


# ---------------------------------------------------------------------------------------------------------------
# Session


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("4.14.0", (4, 14, 0)),
        ("5.0.0-pre", (5, 0, 0)),
        ("4.5.4-dev", (4, 5, 4)),
        ("4.5.4-42-gabc123", (4, 5, 4)),
        ("4.6.0.66", (4, 6, 0)),
        ("5.1", (5, 1, 0)),
        ("5.1-rc2", (5, 1, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_opencv_versions_are_three_numbers(text: str, version: tuple[int, int, int]) -> None:
    assert runner.opencv_version(text) == version


def test_the_opencv_in_use_is_meant_by_default() -> None:
    assert runner.opencv_version() == runner.opencv_version(cv2.__version__) >= (4, 5, 4)


@pytest.mark.parametrize("engine", ["auto", *runner.engines()])
def test_a_session_names_the_engine_that_runs_and_answers_by_output_name(built: Path, engine: str) -> None:
    session = runner.Session(built / "model.onnx", engine)
    assert session.engine == (runner.engines()[0] if engine == "auto" else engine)
    image = runner.read_image(built / "check" / "china.jpg")
    outputs = session(runner.preprocess(image, SPEC))
    rows, wanted = bundles.read_expected(built)
    (place,) = [number for number, row in enumerate(rows) if row["file"] == "china.jpg"]
    assert set(outputs) == {"logits"} and outputs["logits"].dtype == np.float32
    np.testing.assert_allclose(outputs["logits"], wanted["logits"][place : place + 1], rtol=1e-4)


def test_an_answer_is_not_overwritten_by_the_next(built: Path) -> None:
    session = runner.Session(built / "model.onnx")
    first = session(np.zeros((1, 3, 32, 48), np.float32))["logits"]
    kept = first.copy()
    second = session(np.ones((1, 3, 32, 48), np.float32))["logits"]
    assert np.array_equal(first, kept) and not np.array_equal(first, second)


def test_a_session_takes_the_threads_it_is_told(built: Path) -> None:
    before = cv2.getNumThreads()
    try:
        assert runner.Session(built / "model.onnx", threads=1).threads == 1
        assert runner.Session(built / "model.onnx", threads=2).threads == 2
        assert runner.Session(built / "model.onnx", threads=0).threads == 2  # left as it was
    finally:
        cv2.setNumThreads(before)


def test_what_cannot_be_loaded_is_said_in_a_line(built: Path, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"no engine is called 'fast' .*classic"):
        runner.Session(built / "model.onnx", "fast")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"not a model")
    for path in (damaged, tmp_path / "missing.onnx"):
        with pytest.raises(RunnerError, match=r"cannot load .*\.onnx") as caught:
            runner.Session(path)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_name_that_is_not_utf8_is_refused_where_opencv_would_crash(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    with pytest.raises(RunnerError, match=r"caf\\udce9/model\.onnx', whose name is not UTF-8: rename it"):
        runner.Session(folder / "model.onnx")
    video = write_video(tmp_path / "clip.avi", 2).rename(folder / "clip.avi")
    ((_, error),) = told(runner.frames([str(folder)]))
    assert "whose name is not UTF-8" in str(error)
    with pytest.raises(RunnerError, match="whose name is not UTF-8"):
        runner.Drawings(folder, SPEC).add(Frame(str(video), image=some_image(4, 4), frame=0), ANSWERS)


def test_a_network_that_cannot_run_raises_a_runner_error(built: Path) -> None:
    with pytest.raises(RunnerError, match="cannot run the model"):
        runner.Session(built / "model.onnx")(np.zeros((1, 3, 32), np.float32))


# ---------------------------------------------------------------------------------------------------------------
# Bundle


def test_a_manifest_is_read_when_every_file_is_the_one_that_was_built(built: Path) -> None:
    manifest = runner.read_manifest(built)
    assert manifest == json.loads((built / "manifest.json").read_text("utf-8"))
    assert sorted(manifest["files"]) == [
        "check/china.jpg",
        "check/expected.json",
        "check/flower.jpg",
        "check/outputs.npz",
        "check/petals.png",
        "check/roof.png",
        "model.onnx",
        "run.py",
    ]


def test_the_manifests_sum_is_of_its_canonical_json() -> None:
    content = {"b": [1, "ü"], "a": 0.1}
    canonical = rb'{"a":0.1,"b":[1,"\u00fc"]}'  # sorted, no blanks, ASCII
    assert runner.manifest_sha256(content) == hashlib.sha256(canonical).hexdigest()
    assert runner.manifest_sha256({"sha256": "anything", "a": 0.1, "b": [1, "ü"]}) == runner.manifest_sha256(content)
    assert runner.manifest_sha256({**content, "c": None}) != runner.manifest_sha256(content)


@pytest.mark.parametrize("name", ["model.onnx", "run.py", "check/china.jpg", "check/roof.png", "check/expected.json"])
def test_a_changed_or_missing_file_is_refused_by_name(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(RunnerError, match=rf"{name} is not the file that was built: copy the bundle again"):
        runner.read_manifest(bundle)
    (bundle / name).unlink()
    with pytest.raises(RunnerError, match=rf"{name} cannot be read .No such file.*copy the bundle again"):
        runner.Model(bundle)


@pytest.mark.parametrize("key", ["spec", "proved", "files", "tolerances", "threads", "target", "provenance"])
def test_a_changed_manifest_is_refused(bundle: Path, key: str) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest[key] = {"changed": manifest[key]}
    path.write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(RunnerError, match="was changed after it was built"):
        runner.read_manifest(bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        ("null", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("\udcff", "is damaged"),
        ('{"schema": "edgekit.bundle/2"}', "has schema 'edgekit.bundle/2'; this run.py reads 'edgekit.bundle/1'"),
        ('{"schema": null}', "has schema None"),
        ('{"schema": "edgekit.bundle/1"}', "was changed after it was built"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunnerError, match=message):
        runner.read_manifest(tmp_path)


def test_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"no bundle at .*manifest\.json \(No such file"):
        runner.read_manifest(tmp_path)


HERE = cv2.__version__
ROWS = [
    {"opencv": "3.4.1", "engine": "classic"},
    {"opencv": HERE, "engine": "new"},
    {"opencv": f"{HERE}-pre", "engine": "classic"},
    {"opencv": HERE, "engine": "openvino"},
]
CPU, OPENVINO, CUDA = "opencv/cpu", "openvino/cpu", "cuda/fp16"


@pytest.mark.parametrize(
    ("proved", "refused", "asked", "backend", "chosen"),
    [
        (ROWS, [], None, CPU, "new"),  # the first of this OpenCV
        (ROWS[2:], [], None, CPU, "classic"),
        (ROWS[3:], [], None, CPU, "auto"),  # proved with none of OpenCV's own: its choice
        (ROWS[:1], [], None, CPU, "auto"),
        (ROWS, [], "classic", CPU, "classic"),
        (ROWS[:1], [], "new", CPU, "new"),  # asked for, though nothing is known of it here
        (ROWS[1:2], ROWS[2:], None, CPU, "new"),
        (ROWS[1:2], ROWS[3:], None, CPU, "new"),
        ([], ROWS[3:], None, CPU, "auto"),  # another backend's fault
        ([], ROWS[:1], None, CPU, "auto"),  # refused on another OpenCV only
        (ROWS, [], None, OPENVINO, "openvino"),
        ([], ROWS[1:3], None, OPENVINO, "openvino"),  # it has an importer of its own
        (ROWS, [], None, CUDA, "cuda-fp16"),
        ([], ROWS[1:2], None, CUDA, "cuda-fp16"),  # 5.0's own engine is not what CUDA runs through
    ],
)
def test_the_engine_is_the_backends_fastest_that_was_proved_here(
    proved: list[dict[str, str]], refused: list[dict[str, str]], asked: str | None, backend: str, chosen: str
) -> None:
    assert runner.choose_engine({"proved": proved, "refused": refused}, asked, backend) == chosen


@pytest.mark.parametrize(
    ("proved", "refused", "asked", "backend", "named"),
    [
        (ROWS[:1], ROWS[2:3], None, CPU, "classic"),
        (ROWS[:2], ROWS[2:3], "classic", CPU, "classic"),
        (ROWS, ROWS[2:3], "classic", CPU, "classic"),
        (ROWS[:2], ROWS[3:], None, OPENVINO, "openvino"),
        (ROWS[:2], ROWS[2:3], None, CUDA, "cuda-fp16"),  # CUDA has the network from the classic importer
    ],
)
def test_an_engine_that_was_found_wrong_is_not_opened(
    proved: list[dict[str, str]], refused: list[dict[str, str]], asked: str | None, backend: str, named: str
) -> None:
    message = rf"OpenCV {HERE} does not compute .* \(engine: {named}\)\. Install .*3\.4\.1 \(classic\)"
    with pytest.raises(RunnerError, match=message):
        runner.choose_engine({"proved": proved, "refused": refused}, asked, backend)


@pytest.mark.parametrize("engine", runner.engines())
def test_a_model_opens_the_engine_that_is_asked_for(built: Path, engine: str) -> None:
    model = runner.Model(built, engine=engine)
    assert model.session.engine == model.conditions()["engine"] == engine
    assert model.conditions()["proved_on_this_opencv"]


def test_the_python_api_answers_as_the_network_that_was_built(built: Path) -> None:
    model = runner.Model(str(built), threads=1)
    for row in expected_rows(built):
        answers = model(cv2.imread(str(built / "check" / row["file"])))
        assert [answer["class_id"] for answer in answers] == [want["class_id"] for want in row["results"]]
        assert [a["score"] for a in answers] == pytest.approx([want["score"] for want in row["results"]], rel=1e-4)
    assert len(model(bundles.photo("china"), 0)) == 7
    with pytest.raises(RunnerError, match="found NoneType"):
        model(cv2.imread("missing.jpg"))


def test_the_conditions_are_those_found_here(built: Path) -> None:
    conditions = runner.Model(built, threads=1).conditions()
    assert conditions["cpu"] and conditions["python"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert {key: conditions[key] for key in ("cores", "opencv", "engine", "backend", "precision", "threads")} == {
        "cores": cores,
        "opencv": cv2.__version__,
        "engine": runner.engines()[0],
        "backend": "opencv/cpu",
        "precision": "fp32",
        "threads": 1,
    }
    assert conditions["proved_on_this_opencv"] is True


# ---------------------------------------------------------------------------------------------------------------
# Sources


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with images, a video and other things."""
    photos = tmp_path / "photos"
    (photos / "b").mkdir(parents=True)
    for name in ("b/2.PNG", "b/1.png", "a.png", "c[1].png"):
        (photos / name).write_bytes(png(some_image(4, 6)))
    (photos / "notes.txt").write_text("no image")
    write_video(photos / "b" / "clip.avi", 3)
    monkeypatch.chdir(tmp_path)
    return photos


def told(frames: Iterator[Frame]) -> list[tuple[str, str | int | None]]:
    """(source, error or frame number) of each."""
    return [(frame.source, frame.error or frame.frame) for frame in frames]


@pytest.mark.usefixtures("sources")
def test_a_folder_gives_all_below_it_sorted() -> None:
    assert told(runner.frames(["photos"])) == [
        ("photos/a.png", None),
        ("photos/b/1.png", None),
        ("photos/b/2.PNG", None),
        ("photos/b/clip.avi", 0),
        ("photos/b/clip.avi", 1),
        ("photos/b/clip.avi", 2),
        ("photos/c[1].png", None),
    ]


@pytest.mark.usefixtures("sources")
def test_sources_come_in_the_order_given_and_globs_sorted() -> None:
    assert told(runner.frames(["photos/b/?.*", "photos/a.png", "photos/c[1].png"])) == [
        ("photos/b/1.png", None),
        ("photos/b/2.PNG", None),
        ("photos/a.png", None),
        ("photos/c[1].png", None),  # a name, though it reads like a pattern
    ]
    # A folder that a pattern matches is meant as a whole, and nothing comes twice.
    assert told(runner.frames(["photos/[bz]"])) == told(runner.frames(["photos/b"]))
    pngs = ["photos/a.png", "photos/b/1.png", "photos/b/2.PNG", "photos/c[1].png"]
    found = [source for source, _ in told(runner.frames(["photos/**"])) if source.lower().endswith("png")]
    assert found == pngs


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("missing.png", "No such file or directory"),
        ("missing.mp4", "No such file or directory"),
        ("photos/notes.txt", "not an image that OpenCV can decode"),
        ("photos/*.gif", "nothing matches"),
        ("empty", "no image or video in this folder"),
        ("", "a source with an empty name"),
        ("a" * 5000, "File name too long"),
        ("zero\0byte", "embedded null byte"),
    ],
)
@pytest.mark.usefixtures("sources")
def test_what_cannot_be_read_is_told_and_the_rest_goes_on(source: str, error: str) -> None:
    Path("empty").mkdir()
    assert told(runner.frames([source, "photos/a.png"])) == [(source, error), ("photos/a.png", None)]


def test_a_link_that_leads_nowhere_is_told(sources: Path) -> None:
    (sources / "b" / "3.png").symlink_to("gone.png")
    (sources / "b" / "4.mp4").symlink_to("gone.mp4")
    assert told(runner.frames(["photos/b"]))[-2:] == [("photos/b/clip.avi", 1), ("photos/b/clip.avi", 2)]
    assert told(runner.frames(["photos/b"]))[2:4] == [
        ("photos/b/3.png", "No such file or directory"),
        ("photos/b/4.mp4", "No such file or directory"),
    ]


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="this system has no such users")
def test_a_folder_that_may_not_be_read_is_told() -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        closed = Path(name, "closed")
        closed.mkdir(mode=0)
        if user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            found = told(runner.frames([name]))
        finally:
            os.seteuid(user)
    assert found == [(name, f"cannot read the folder {closed}: Permission denied")]


def test_an_image_comes_as_it_is_and_without_a_frame_number(sources: Path) -> None:
    (frame,) = runner.frames([str(sources / "a.png")])
    assert frame.image is not None and np.array_equal(frame.image, some_image(4, 6))
    assert replace(frame, image=None) == Frame(str(sources / "a.png"))


def test_a_video_comes_frame_by_frame_with_its_times(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi", 7)
    frames = list(runner.frames([str(path)]))
    assert [frame.frame for frame in frames] == [0, 1, 2, 3, 4, 5, 6]
    assert [frame.seconds for frame in frames] == pytest.approx([0, 0.08, 0.16, 0.24, 0.32, 0.4, 0.48])
    assert {(frame.source, frame.error, frame.fps) for frame in frames} == {(str(path), "", 12.5)}
    for number, frame in enumerate(frames):
        assert frame.image is not None and frame.image.shape == (48, 64, 3)
        assert np.abs(frame.image.astype(int) - 30 * number).max() <= 3


def test_a_video_without_a_believable_rate_has_no_times(tmp_path: Path) -> None:
    frames = list(runner.frames([str(write_video(tmp_path / "clip.mp4", 2, fps=5000, codec="mp4v"))]))
    assert [(frame.frame, frame.seconds, frame.fps) for frame in frames] == [(0, None, 0.0), (1, None, 0.0)]


def test_a_stream_that_ends_by_itself_has_broken_off(tmp_path: Path) -> None:
    path = str(write_video(tmp_path / "clip.avi", 2))
    frames = list(runner._video_frames("camera:0", path, live=True))
    assert [frame.seconds for frame in frames] == [None] * 3
    assert told(iter(frames)) == [("camera:0", 0), ("camera:0", 1), ("camera:0", "the stream broke off after 2 frames")]


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_damaged_video_is_told(tmp_path: Path, size: int) -> None:
    path = write_video(tmp_path / "clip.avi", 2)
    path.write_bytes(path.read_bytes()[:size])
    ((source, error),) = told(runner.frames([str(path)]))
    assert source == str(path) and "cannot be opened as a video" in str(error)


def test_a_url_that_does_not_answer_is_told() -> None:
    ((source, error),) = told(runner.frames(["http://127.0.0.1:9/clip.mp4"]))
    assert source == "http://127.0.0.1:9/clip.mp4" and "cannot be opened as a video" in str(error)


# ---------------------------------------------------------------------------------------------------------------
# Drawing

ANSWERS = [
    {"label": "hand sign five", "class_id": 5, "score": 0.9734},
    {"label": "no overtaking by heavy goods vehicles over 3.5 t", "class_id": 3, "score": 0.02},
    {"label": "Überholverbot", "class_id": 1, "score": 0.0066},
    {"label": "never shown", "class_id": 0, "score": 0.0},
]


@pytest.mark.parametrize(
    "shape", [(427, 640), (8, 8), (1, 1), (300, 60), (20, 500), (1, 4000), (241, 321), (720, 1280)]
)
def test_a_drawing_is_the_image_with_the_answers_below(shape: tuple[int, int]) -> None:
    image = some_image(*shape)
    drawn = runner.draw(image, ANSWERS, SPEC)
    factor = math.ceil(320 / max(shape))
    height, width = shape[0] * factor, shape[1] * factor
    assert drawn.dtype == np.uint8 and drawn.shape[1] == max(320, width)
    assert np.array_equal(drawn[:height, :width], image.repeat(factor, axis=0).repeat(factor, axis=1))
    below = drawn[height:].astype(int)
    assert below.max() > 200  # the best answer, in white
    assert below.shape[0] > 50
    frame = np.concatenate([below[-3:].ravel(), below[:, :2].ravel(), below[:, -2:].ravel()])
    assert (frame == 32).all()  # no letter touches an edge
    assert np.array_equal(runner.draw(image, ANSWERS[:3], SPEC), drawn)
    for fewer in (ANSWERS[:1], []):  # another frame of the same video
        assert runner.draw(image, fewer, SPEC).shape == drawn.shape
    two = runner.draw(image, ANSWERS[:2], replace(SPEC, class_names=("a", "b")))
    assert two.shape[0] < drawn.shape[0] and np.array_equal(two[:height, :width], drawn[:height, :width])


def test_a_label_that_cannot_be_drawn_is_its_number() -> None:
    image = some_image(40, 400)
    number = [{**ANSWERS[2], "label": "class 1"}]
    drawn = runner.draw(image, ANSWERS[2:3], SPEC)
    assert np.array_equal(drawn, runner.draw(image, number, SPEC))
    assert not np.array_equal(drawn, runner.draw(image, [{**number[0], "label": "class 2"}], SPEC))


def test_no_answers_are_drawn_as_none() -> None:
    image = some_image(40, 400)
    assert np.array_equal(runner.draw(image, [], SPEC)[:40], image)
    assert np.array_equal(runner.draw(image, [], DETECT), image)
    assert np.array_equal(runner.draw(image, [], SEGMENT), image)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=80), st.integers(0, 400))
def test_a_label_is_cut_to_its_place(text: str, width: int) -> None:
    shown = runner._cut(text, width, 19)
    assert shown in ("", "...") or runner._text_width(shown, 19) <= width
    assert shown == text or (shown.endswith("...") and text.startswith(shown[:-3]))


def test_drawings_of_one_name_are_all_kept(tmp_path: Path) -> None:
    (tmp_path / "a-2.jpg").write_bytes(b"mine")
    drawings = runner.Drawings(tmp_path, SPEC)
    for source in ("x/a.png", "y/a.jpg", "z/a-2.png", "a-2", "rtsp://host:554", "http://host/b.jpg?q=1", "é/ü.png"):
        drawings.add(Frame(source, image=some_image(4, 4)), ANSWERS)
    drawings.close()
    names = ["a-2-2.jpg", "a-2-3.jpg", "a-2.jpg", "a-3.jpg", "a.jpg", "b.jpg", "host-554.jpg", "ü.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "a-2.jpg").read_bytes() == b"mine"
    assert {runner.read_image(path).shape for path in tmp_path.glob("*.jpg") if path.name != "a-2.jpg"} == {
        runner.draw(some_image(4, 4), ANSWERS, SPEC).shape
    }


@pytest.mark.parametrize(("fps", "written"), [(12.5, 12.5), (0.0, 25.0)])
def test_drawn_videos_can_be_read_again(tmp_path: Path, fps: float, written: float) -> None:
    drawings = runner.Drawings(tmp_path / "new" / "folder", SPEC)
    images = [np.full((241, 321, 3), 60 * number, np.uint8) for number in range(3)]
    for source in ("clip.mp4", "clip.mp4", "other/clip.mp4"):  # the same one twice: two films
        for number, image in enumerate(images):
            drawings.add(Frame(source, image=image, frame=number, fps=fps), ANSWERS)
    drawings.close()
    drawings.close()
    paths = sorted((tmp_path / "new" / "folder").iterdir())
    assert [path.name for path in paths] == ["clip-2.avi", "clip-3.avi", "clip.avi"]
    for path in paths:
        capture = cv2.VideoCapture(str(path))
        assert capture.get(cv2.CAP_PROP_FPS) == written
        for image in images:
            ok, read = capture.read()
            drawn = runner.draw(image, ANSWERS, SPEC)
            assert ok and read.shape[0] in (drawn.shape[0], drawn.shape[0] - 1)
            assert np.abs(read[:200, :300].astype(int) - drawn[:200, :300]).max() < 8
        assert not capture.read()[0]
        capture.release()


def test_a_folder_that_cannot_be_made_or_is_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunnerError, match=r"cannot make the folder .*file"):
        runner.Drawings(tmp_path / "file", SPEC)
    drawings = runner.Drawings(tmp_path / "gone", SPEC)
    (tmp_path / "gone").rmdir()
    with pytest.raises(RunnerError, match=r"cannot write .*a\.jpg: No such file"):
        drawings.add(Frame("a.png", image=some_image(4, 4)), ANSWERS)
    with pytest.raises(RunnerError, match=r"cannot write the video .*clip\.avi"):
        drawings.add(Frame("clip.avi", image=some_image(4, 4), frame=0, fps=25.0), ANSWERS)


def test_a_picture_too_large_for_jpeg_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"cannot write .*long\.jpg"):
        runner.Drawings(tmp_path, SPEC).add(Frame("long.png", image=some_image(70_000, 1)), ANSWERS)


# ---------------------------------------------------------------------------------------------------------------
# Drawing boxes and masks


def some_box(class_id: int, *edges: float, score: float = 0.75) -> dict[str, Any]:
    return {"label": SPEC.class_names[class_id], "class_id": class_id, "score": score, "box": list(edges)}


def some_mask(class_id: int, mask: np.ndarray, label: str = "") -> dict[str, Any]:
    label = label or SPEC.class_names[class_id]
    return {"label": label, "class_id": class_id, "share": float(mask.mean()), "mask": mask}


def test_the_classes_have_colours_that_are_far_apart() -> None:
    colours = [runner.colour(class_id) for class_id in range(20)]
    assert len(set(colours)) == 20 and all(0 <= level <= 255 for colour in colours for level in colour)
    for count, least in ((3, 150), (8, 60), (20, 25)):
        pairs = np.array(colours[:count], float)
        distances = np.linalg.norm(pairs[:, None] - pairs, axis=2) + 1e3 * np.eye(count)
        assert distances.min() > least
    assert runner.colour(2**40) == runner.colour(2**40)


@pytest.mark.parametrize("shape", [(427, 640), (1080, 1920), (300, 400)])
def test_a_boxs_line_is_on_its_edges_in_its_colour(shape: tuple[int, int]) -> None:
    height, width = shape
    left, top, right, bottom = width // 4, height // 3, width // 2, height * 3 // 4
    image = np.full((*shape, 3), 128, np.uint8)
    drawn = runner.draw(image, [some_box(1, left, top, right, bottom)], DETECT)
    assert drawn.shape == image.shape and (image == 128).all()
    for y, x in (((top + bottom) // 2, left), ((top + bottom) // 2, right - 1), (bottom - 1, (left + right) // 2)):
        assert tuple(drawn[y, x]) == runner.colour(1)
    assert (drawn[top + 9 : bottom - 9, left + 9 : right - 9] == 128).all()  # nothing is painted over
    label = drawn[:top, left:] != 128
    assert label.any() and not (drawn[:, : left - 9] != 128).any() and not (drawn[bottom + 9 :] != 128).any()
    assert (drawn[:top, left:].reshape(-1, 3) == runner.colour(1)).all(axis=1).sum() > 300  # the label's ground


def test_the_best_box_is_on_top_and_labels_are_light_on_dark_and_dark_on_light() -> None:
    image = np.full((1200, 1800, 3), 128, np.uint8)
    boxes = [some_box(0, 150, 300, 900, 900, score=0.9), some_box(1, 150, 300, 900, 900, score=0.8)]
    drawn = runner.draw(image, boxes, DETECT)
    assert tuple(drawn[899, 600]) == runner.colour(0)
    for class_id, ink in ((1, 255), (2, 32)):  # blue and yellow green
        drawn = runner.draw(image, [some_box(class_id, 150, 300, 900, 900)], DETECT)
        assert (drawn[255:300, 150:].reshape(-1, 3) == ink).all(axis=1).sum() > 50
        assert not (drawn.reshape(-1, 3) == 287 - ink).all(axis=1).any()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.lists(st.tuples(*[st.floats(0, 1)] * 4, st.integers(0, 6)), max_size=6),
)
def test_boxes_and_labels_stay_inside_any_image(
    height: int, width: int, boxes: list[tuple[float, float, float, float, int]]
) -> None:
    image = np.zeros((height, width, 3), np.uint8)
    results = [
        some_box(class_id, min(x, u) * width, min(y, v) * height, max(x, u) * width, max(y, v) * height)
        for x, y, u, v, class_id in boxes
    ]
    drawn = runner.draw(image, results, DETECT)
    factor = math.ceil(320 / max(height, width))
    assert drawn.shape == (factor * height, factor * width, 3)
    assert drawn.any() == bool(boxes)


def test_a_label_at_the_upper_right_corner_is_whole() -> None:
    drawn = runner.draw(np.zeros((200, 640, 3), np.uint8), [some_box(1, 590, 0, 640, 50)], DETECT)
    width = runner._text_width("flower 75 %", 16) + 4
    assert (drawn[2:8, 640 - width : 640 - width + 2] == runner.colour(1)).all()
    assert not drawn[:60, : 640 - width].any()


def test_masks_are_half_transparent_and_the_background_is_left_alone() -> None:
    image = some_image(400, 600)
    mask = np.zeros((400, 600), bool)
    mask[100:200, 300:] = True
    for label, painted in (("sky", True), ("Background", False), ("background", False)):
        drawn = runner.draw(image, [some_mask(0, ~mask, label), some_mask(2, mask)], SEGMENT)
        assert drawn.shape == image.shape
        half = (image.astype(int) + runner.colour(2)) / 2
        assert np.abs(drawn[mask] - half[mask]).max() <= 1
        below = (slice(200, None), slice(None))
        wanted = (image.astype(int) + runner.colour(0)) / 2 if painted else image
        assert np.abs(drawn[below].astype(int) - wanted[below]).max() <= painted
        legend = [(drawn[y : y + 16, :200] == color).all(axis=2).sum() for y, color in ((0, runner.colour(2)),)]
        assert (legend[0] > 300) != painted  # the first line, of the largest class that is painted


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 100), st.integers(320, 400), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.001, 0.5, 1.0]))
@example(1, 320, 0, 1.0)
@example(32, 320, 0, 1.0)
@example(33, 320, 0, 0.0)
def test_a_mask_of_any_form_is_painted_pixel_by_pixel(height: int, width: int, seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3), np.uint8)
    mask = random.random((height, width)) < share
    drawn = runner.draw(image, [some_mask(2, mask)], SEGMENT)
    half = np.rint((image.astype(int) + runner.colour(2)) / 2)  # to even, as OpenCV rounds
    wanted = np.where(mask[:, :, None], half, image)
    wanted[:16, :200] = drawn[:16, :200]  # the legend
    assert np.array_equal(drawn, wanted)


def test_a_mask_that_is_plain_is_drawn_alike_and_a_small_image_larger() -> None:
    image, mask = some_image(20, 30), np.eye(20, 30, dtype=bool)
    drawn = runner.draw(image, [some_mask(3, mask)], SEGMENT)
    assert drawn.shape == (220, 330, 3)
    assert np.array_equal(drawn, runner.draw(image, runner.plain([some_mask(3, mask)]), SEGMENT))
    assert np.abs(drawn[19 * 11 + 5, 19 * 11 + 5] - (image[19, 19].astype(int) + runner.colour(3)) / 2).max() <= 1
    assert np.array_equal(drawn[-1, -1], image[-1, -1])


def test_a_legend_takes_no_more_than_half_of_an_image() -> None:
    image = np.zeros((100, 400, 3), np.uint8)
    masks = np.arange(100 * 400).reshape(100, 400) % 7
    results = [some_mask(class_id, masks == class_id) for class_id in range(7)]
    drawn = runner.draw(image, results, SEGMENT)
    full = [(drawn[:, :200] == runner.colour(result["class_id"])).all(axis=2).sum() > 100 for result in results]
    assert full == [True] * 3 + [False] * 4


# ---------------------------------------------------------------------------------------------------------------
# Writers


class Slow:
    """A writer that waits until it is let go, fails at one frame, and takes its time from there on."""

    def __init__(self, fails_at: int = -1) -> None:
        self.may_go, self.done, self.fails_at = threading.Event(), list[Any](), fails_at

    def add(self, frame: Frame, results: runner.Results) -> None:
        assert self.may_go.wait(60)
        if frame.frame == self.fails_at:
            raise RunnerError("the disk is full")
        time.sleep(0.05 if 0 <= self.fails_at < (frame.frame or 0) else 0)
        self.done.append((frame.frame, results, threading.get_native_id()))

    def close(self) -> None:
        self.done.append("closed")


def test_a_writer_behind_gets_all_frames_in_order_in_another_thread() -> None:
    slow = Slow()
    slow.may_go.set()
    behind = runner.Behind(slow)  # type: ignore[arg-type]
    for number in range(20):
        behind.add(Frame("clip", frame=number), [{"label": str(number)}])
        assert len(slow.done) >= number - 1
    behind.close()
    assert slow.done.pop() == "closed"
    assert [(number, results[0]["label"]) for number, results, _ in slow.done] == [(n, str(n)) for n in range(20)]
    (thread,) = {thread for _, _, thread in slow.done}
    assert thread != threading.get_native_id()


def test_no_more_than_two_frames_wait() -> None:
    slow = Slow()
    behind = runner.Behind(slow)  # type: ignore[arg-type]
    brought: list[int] = []

    def bring() -> None:
        for number in range(3):
            behind.add(Frame("clip", frame=number), [])
            brought.append(number)

    thread = threading.Thread(target=bring)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and brought == [0, 1] and slow.done == []
    slow.may_go.set()
    thread.join(60)
    behind.close()
    assert brought == [0, 1, 2] and [item[0] for item in slow.done[:3]] == [0, 1, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no niceness of its own")
def test_a_writer_behind_gives_way_and_nobody_else_does() -> None:
    before, slow = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), Slow()
    slow.may_go.set()
    with contextlib.closing(runner.Behind(slow)) as behind:  # type: ignore[arg-type]
        for number in range(3):
            behind.add(Frame("clip", frame=number), [])
        _, _, thread = slow.done[0]
        assert os.getpriority(os.PRIO_PROCESS, thread) == min(19, before + 10)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


@pytest.mark.parametrize("fails_at", [0, 1, 3, 4])
def test_what_a_writer_behind_raises_is_raised_here_and_the_rest_is_written(fails_at: int) -> None:
    slow = Slow(fails_at)
    slow.may_go.set()
    behind = runner.Behind(slow)  # type: ignore[arg-type]
    brought = []
    with pytest.raises(RunnerError, match="the disk is full"), contextlib.closing(behind):
        for number in range(5):
            behind.add(Frame("clip", frame=number), [])
            brought.append(number)
    assert fails_at in brought
    *written, closed = slow.done
    assert [item[0] for item in written] == [number for number in brought if number != fails_at]
    assert closed == "closed"


def test_drawings_behind_are_whole_when_it_is_closed(tmp_path: Path) -> None:
    behind = runner.Behind(runner.Drawings(tmp_path, DETECT))
    for number in range(9):
        frame = Frame("clip.mp4", image=np.full((240, 320, 3), 20 * number, np.uint8), frame=number, fps=5.0)
        behind.add(frame, [some_box(number % 3, 50, 60, 200, 200)])
    behind.close()
    capture = cv2.VideoCapture(str(tmp_path / "clip.avi"))
    for number in range(9):
        ok, image = capture.read()
        assert ok and np.abs(image[100:190, 70:190].astype(int) - 20 * number).max() < 8
        assert np.abs(image[199, 100:190].astype(int) - runner.colour(number % 3)).mean() < 60
    assert not capture.read()[0]
    capture.release()


def test_a_stream_that_changes_its_size_goes_on_in_another_file(tmp_path: Path) -> None:
    drawings = runner.Drawings(tmp_path, DETECT)
    for number, size in enumerate([(240, 320)] * 2 + [(480, 640)] * 3):
        drawings.add(Frame("rtsp://cam/live", image=some_image(*size), frame=number), [])
    drawings.close()
    counts = {}
    for path in tmp_path.iterdir():
        capture = cv2.VideoCapture(str(path))
        counts[path.name] = sum(1 for _ in iter(lambda: capture.read()[0], False))  # noqa: B023 - used here only
        capture.release()
    assert counts == {"live.avi": 2, "live-2.avi": 3}


def test_class_maps_are_grey_pngs_of_new_names(tmp_path: Path) -> None:
    classes = np.random.default_rng(0).integers(0, 4, (37, 53))
    results = [some_mask(class_id, classes == class_id) for class_id in (3, 0, 1)]
    (tmp_path / "a.png").write_bytes(b"the photo itself")
    masks = runner.Masks(tmp_path)
    paths = [masks.add(Frame(source, image=some_image(37, 53)), results) for source in ("a.png", "b/ü.jpg", "a.jpg")]
    assert [path.name for path in paths] == ["a-2.png", "ü.png", "a-3.png"]
    assert (tmp_path / "a.png").read_bytes() == b"the photo itself"
    written = np.array(Image.open(paths[0]))
    assert written.dtype == np.uint8 and np.array_equal(written, np.where(classes == 2, 255, classes))
    assert np.array_equal(runner.class_map(runner.plain(results), (37, 53)), written)


def test_yolos_lines_are_worked_by_hand(tmp_path: Path) -> None:
    yolo = runner.Yolo(tmp_path / "labels")
    boxes = [some_box(2, 10, 20, 30, 60, score=0.875), some_box(0, 0, 0, 200, 100, score=0.1234567)]
    yolo.add(Frame("photos/a.jpg", image=some_image(100, 200)), boxes)
    yolo.add(Frame("photos/none.jpg", image=some_image(100, 200)), [])
    yolo.close()
    assert (tmp_path / "labels" / "a.txt").read_text() == (
        "2 0.100000 0.400000 0.100000 0.400000 0.875000\n0 0.500000 0.500000 1.000000 1.000000 0.123457\n"
    )
    assert (tmp_path / "labels" / "none.txt").read_bytes() == b""


def test_cocos_file_is_worked_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_text("of an earlier run")
    spec = replace(DETECT, class_names=("RBC", "Blüte"))
    coco = runner.Coco(path, spec)
    coco.add(Frame("a.jpg", image=some_image(100, 200)), [some_box(1, 10, 20, 30.126, 60, score=0.12345678)])
    coco.add(Frame("b.jpg", image=some_image(4, 3)), [])
    coco.add(Frame("c.avi", image=some_image(4, 3), frame=7), [some_box(0, 0, 0, 1, 1), some_box(1, 1, 1, 2, 4)])
    assert path.read_text() == "of an earlier run"
    coco.close()
    assert [file.name for file in tmp_path.iterdir()] == ["answers.json"]
    assert json.loads(path.read_text("utf-8")) == {
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": 200, "height": 100},
            {"id": 2, "file_name": "b.jpg", "width": 3, "height": 4},
            {"id": 3, "file_name": "c.avi", "width": 3, "height": 4, "frame": 7},
        ],
        "categories": [{"id": 0, "name": "RBC"}, {"id": 1, "name": "Blüte"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [10, 20, 20.13, 40],
                "area": 805.04,
                "score": 0.123457,
                "iscrowd": 0,
            },
            {"id": 2, "image_id": 3, "category_id": 0, "bbox": [0, 0, 1, 1], "area": 1, "score": 0.75, "iscrowd": 0},
            {"id": 3, "image_id": 3, "category_id": 1, "bbox": [1, 1, 1, 3], "area": 3, "score": 0.75, "iscrowd": 0},
        ],
    }


def test_cocos_masks_are_runs(tmp_path: Path) -> None:
    mask = np.zeros((4, 3), bool)
    mask[1:3, 1] = True
    coco = runner.Coco(tmp_path / "answers.json", SEGMENT)
    coco.add(Frame("a.jpg", image=some_image(4, 3)), [some_mask(0, ~mask), some_mask(5, mask)])
    coco.close()
    first, second = json.loads((tmp_path / "answers.json").read_text("utf-8"))["annotations"]
    assert (first["bbox"], first["area"]) == ([0, 0, 3, 4], 10)
    assert second == {
        "id": 2,
        "image_id": 1,
        "category_id": 5,
        "bbox": [1, 1, 1, 2],
        "area": 2,
        "segmentation": {"size": [4, 3], "counts": [5, 2, 5]},
        "iscrowd": 0,
    }
    assert np.array_equal(runner.from_rle(second["segmentation"]), mask)


def test_files_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"cannot write .*a\.json: there is no folder .*none"):
        runner.Coco(tmp_path / "none" / "a.json", DETECT)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(RunnerError, match=r"cannot write .*folder\.json: Is a directory"):
        runner.Coco(tmp_path / "folder.json", DETECT).close()
    for writer in (runner.Yolo(tmp_path / "gone"), runner.Masks(tmp_path / "gone")):
        shutil.rmtree(tmp_path / "gone")
        with pytest.raises(RunnerError, match=r"cannot write .*a\.(txt|png): No such file"):
            writer.add(Frame("a.jpg", image=some_image(4, 4)), [])
        (tmp_path / "gone").mkdir()


# ---------------------------------------------------------------------------------------------------------------
# check


def expected_rows(bundle: Path) -> list[dict[str, Any]]:
    return bundles.read_expected(bundle)[0]


Change = Callable[[list[dict[str, Any]], dict[str, Any]], None]


def change_expected(bundle: Path, change: Change) -> runner.Model:
    """A bundle with other expectations, signed again."""
    rows, outputs = bundles.read_expected(bundle)
    change(rows, outputs)
    bundles.write_expected(bundle, rows, outputs)
    bundles.sign(bundle)
    return runner.Model(bundle, threads=1)


def times(factor: float) -> Change:
    def change(_: list[dict[str, Any]], outputs: dict[str, Any]) -> None:
        outputs["logits"][0] *= factor

    return change


def test_a_bundle_as_built_passes_its_check(built: Path) -> None:
    rows = runner.check(runner.Model(built, threads=1))
    for row, want in zip(rows, expected_rows(built), strict=True):
        assert set(row) == {"file", "ok", "pixels_identical", "relative_error", "expected", "actual", "reason"}
        assert (row["file"], row["ok"], row["pixels_identical"], row["reason"]) == (want["file"], True, True, "")
        assert 0 <= row["relative_error"] < 1e-5
        assert row["expected"] == want["results"][:1] and len(row["actual"]) == 1
        assert row["actual"][0]["class_id"] == want["results"][0]["class_id"]


def test_outputs_outside_the_tolerance_fail(bundle: Path) -> None:
    first, *others = runner.check(change_expected(bundle, times(1 + 2e-4)))
    assert not first["ok"] and all(row["ok"] for row in others)
    assert first["relative_error"] == pytest.approx(2e-4, rel=0.01)
    assert first["reason"] == "outputs differ by 0.0002 of the largest; at most 0.0001 is allowed"


def test_outputs_inside_the_tolerance_pass(bundle: Path) -> None:
    assert all(row["ok"] for row in runner.check(change_expected(bundle, times(1 + 0.5e-4))))


@pytest.mark.parametrize(("factor", "ok"), [(1.04, True), (1.06, False)])
def test_other_pixels_have_the_looser_tolerance(bundle: Path, factor: float, ok: bool) -> None:
    def change(rows: list[dict[str, Any]], outputs: dict[str, Any]) -> None:
        times(factor)(rows, outputs)
        rows[0]["pixels_sha256"] = "0" * 64

    row = runner.check(change_expected(bundle, change))[0]
    assert (row["pixels_identical"], row["ok"]) == (False, ok)


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_a_missing_output_or_another_shape_fails(bundle: Path, fault: str) -> None:
    def change(rows: list[dict[str, Any]], outputs: dict[str, Any]) -> None:
        if fault == "missing":
            outputs["boxes"] = np.zeros((len(rows), 1), np.float32)
        else:
            outputs["logits"] = outputs["logits"][:, :3]

    rows = runner.check(change_expected(bundle, change))
    assert [(row["ok"], row["relative_error"], row["actual"]) for row in rows] == [(False, None, [])] * 4


def test_a_nan_fails(bundle: Path) -> None:
    def change(_: list[dict[str, Any]], outputs: dict[str, Any]) -> None:
        outputs["logits"][2, 0] = math.nan

    rows = runner.check(change_expected(bundle, change))
    assert [(row["ok"], row["relative_error"] is None) for row in rows] == [(n != 2, n == 2) for n in range(4)]
    json.dumps(rows, allow_nan=False)


def saved(save: Callable[..., None], *arguments: Any, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arguments, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, r"cannot be read \(No such file or directory\)"),
        (b"", "is damaged"),
        (b"no archive", "is damaged"),
        (b"PK\3\4 cut off", "is damaged"),
        (saved(np.save, np.zeros((4, 7), np.float32)), "is damaged"),
        (saved(np.savez), "is damaged"),
        (saved(np.savez, logits=np.float32(1)), "is damaged"),
        (saved(np.savez, logits=np.zeros((4, 7), np.float32))[:-30], "is damaged"),
        (saved(np.savez, logits=np.array([None] * 4)), "is damaged"),
        (saved(np.savez, logits=np.zeros((3, 7), np.float32)), "is not of the images that it has"),
    ],
)
def test_outputs_that_are_missing_or_damaged_are_told(bundle: Path, data: bytes | None, reason: str) -> None:
    path = bundle / "check" / "outputs.npz"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    bundles.sign(bundle)
    with pytest.raises(RunnerError, match=rf"check/outputs\.npz {reason}: build the bundle again"):
        runner.check(runner.Model(bundle, threads=1))


@pytest.mark.parametrize("spec", [DETECT, SEGMENT], ids=lambda spec: spec.task)
def test_the_other_tasks_check_their_outputs_and_show_plain_answers(spec: runner.Spec, tmp_path: Path) -> None:
    built = bundles.write_bundle(tmp_path / "bundle", spec)
    model = runner.Model(built)
    rows = runner.check(model)
    assert [(row["ok"], row["pixels_identical"], row["reason"]) for row in rows] == [(True, True, "")] * 4
    assert max(row["relative_error"] for row in rows) < 1e-5
    for row, want in zip(rows, expected_rows(built), strict=True):
        assert row["expected"] == want["results"] and len(row["expected"]) > 1
        assert [result["label"] for result in row["actual"]] == [result["label"] for result in row["expected"]]
        results = model(runner.read_image(built / "check" / row["file"]))
        assert row["actual"] == runner.plain(results) == runner.plain(row["actual"])
    _, outputs = bundles.read_expected(built)
    outputs = {name: array + np.float32(0.01) * (name in ("boxes_16", "logits")) for name, array in outputs.items()}
    bundles.write_expected(built, expected_rows(built), outputs)
    bundles.sign(built)
    assert not any(row["ok"] for row in runner.check(runner.Model(built)))


@pytest.mark.parametrize("spec", [DETECT, SEGMENT], ids=lambda spec: spec.task)
def test_benches_and_workers_take_every_task(spec: runner.Spec, tmp_path: Path) -> None:
    model = runner.Model(bundles.write_bundle(tmp_path / "bundle", spec))
    report = runner.bench(model, seconds=0.01)
    assert report["postprocess_ms"]["p50"] > 0 and report["images_per_second"] > 0


def box(label: str) -> dict[str, Any]:
    return {"label": label, "class_id": 0, "score": 0.5, "box": [0.0, 0.0, 1.0, 1.0]}


@pytest.mark.parametrize(
    ("results", "summary"),
    [
        ([], "-"),
        ([{"label": "sky", "class_id": 4, "score": 0.9}, {"label": "sea", "class_id": 3, "score": 0.1}], "sky"),
        ([box("RBC")], "1 box: 1 RBC"),
        ([box("WBC"), box("RBC"), box("RBC"), box("WBC"), box("RBC")], "5 boxes: 3 RBC, 2 WBC"),
        (
            [{"label": name, "share": share} for name, share in zip("abcd", (0.6, 0.2496, 0.1, 0.05), strict=True)],
            "60.0 % a, 25.0 % b, 10.0 % c",
        ),
    ],
)
def test_an_answer_in_a_few_words(results: list[dict[str, Any]], summary: str) -> None:
    assert runner._summary(results) == summary


def test_an_image_that_this_opencv_cannot_decode_fails_by_name(bundle: Path) -> None:
    (bundle / "check" / "china.jpg").write_bytes(b"no image")
    bundles.sign(bundle)
    first, *others = runner.check(runner.Model(bundle, threads=1))
    assert first == {
        "file": "china.jpg",
        "ok": False,
        "pixels_identical": False,
        "relative_error": None,
        "expected": expected_rows(bundle)[0]["results"][:1],
        "actual": [],
        "reason": "not an image that OpenCV can decode",
    }
    assert all(row["ok"] for row in others)


def test_a_check_of_no_images_does_not_pass(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(rows: list[dict[str, Any]], outputs: dict[str, Any]) -> None:
        rows.clear()
        outputs["logits"] = outputs["logits"][:0]

    change_expected(bundle, change)
    assert runner.main(["check", "--bundle", str(bundle)]) == 1
    assert capsys.readouterr().out.startswith("CHECK FAILED: 0 of 0 images")


@pytest.mark.parametrize(
    ("actual", "expected", "difference"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -3.0], [1.0, -4.0], 0.25),
        ([2.0, -4.0], [1.0, -4.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 1e-9], [0.0, 0.0], 1e3),  # nothing is the whole scale: then any difference is large
        ([1.0, math.nan], [1.0, 1.0], math.inf),
        ([1.0, -math.inf], [1.0, 1.0], math.inf),
        ([[1.0, 2.0]], [1.0, 2.0], math.inf),
        (None, [1.0], math.inf),
    ],
)
def test_a_difference_is_a_share_of_the_largest_value(actual: Any, expected: Any, difference: float) -> None:
    found = None if actual is None else np.array(actual, np.float32)
    assert runner.relative_difference(found, np.array(expected, np.float32)) == pytest.approx(difference)


def test_a_difference_from_nan_is_within_no_tolerance() -> None:
    assert not runner.relative_difference(np.ones(2, np.float32), np.array([1, math.nan], np.float32)) <= 1e9


# ---------------------------------------------------------------------------------------------------------------
# bench


@pytest.mark.parametrize(
    ("count", "p90", "p99"),
    [(1, False, False), (63, False, False), (64, True, False), (661, True, False), (662, True, True)],
)
def test_a_percentile_is_given_from_as_many_samples_as_it_needs(count: int, p90: bool, p99: bool) -> None:
    samples = list(range(1, count + 1))
    assert runner.percentiles(samples[::-1]) == {
        "p50": (count + 1) / 2,
        "p90": pytest.approx(1 + 0.9 * (count - 1)) if p90 else None,
        "p99": pytest.approx(1 + 0.99 * (count - 1)) if p99 else None,
    }


@pytest.mark.parametrize(("percent", "floor"), [(90, 64), (99, 662)])
def test_the_floors_are_where_two_samples_lie_above_the_true_percentile(percent: int, floor: int) -> None:
    """In whole numbers: the chance that at most one of n samples is above a percentile p, times 100 ** n."""

    def at_most_one_above(n: int) -> int:
        return int(percent**n + n * (100 - percent) * percent ** (n - 1))

    assert 100 * at_most_one_above(floor) <= 100**floor
    assert 100 * at_most_one_above(floor - 1) > 100 ** (floor - 1)


def test_a_bench_reports_every_stage(built: Path) -> None:
    report = runner.bench(runner.Model(built, threads=1), seconds=0.01, min_iterations=70)
    assert set(report) == {
        "iterations",
        "first_ms",
        "end_to_end_ms",
        "decode_ms",
        "preprocess_ms",
        "forward_ms",
        "postprocess_ms",
        "images_per_second",
        "energy_mj",
        "samples_ms",
        "peak_rss_bytes",
        "environment",
        "conditions",
    }
    assert report["iterations"] >= 70 and report["first_ms"] > 0 and report["images_per_second"] > 0
    assert list(report["samples_ms"]) == [*runner.STAGES, "end_to_end"]
    for name, samples in report["samples_ms"].items():
        assert len(samples) == report["iterations"]
        assert report[f"{name}_ms"] == runner.percentiles(samples)
    assert [set(each) for each in report["environment"]] == [set(runner.environment())] * 2
    json.dumps(report, allow_nan=False)
    stages = [report[f"{stage}_ms"] for stage in runner.STAGES]
    assert all(0 < stage["p50"] <= stage["p90"] and stage["p99"] is None for stage in stages[:3])
    # Decoding a 640 x 427 JPEG is most of this tiny network's time, so a stage that took another's would show.
    assert stages[0]["p50"] > stages[3]["p50"]
    assert max(stage["p50"] for stage in stages) < report["end_to_end_ms"]["p50"]


def test_a_bench_uses_every_image(bundle: Path) -> None:
    (bundle / "check" / "roof.png").write_bytes(b"no image")
    bundles.sign(bundle)
    with pytest.raises(RunnerError, match="not an image"):
        runner.bench(runner.Model(bundle, threads=1), seconds=0.01)


def test_the_energy_of_an_image_is_the_mean_power_over_the_rate(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = runner.Model(built, threads=1), [(built / "check" / "roof.png").read_bytes()]
    monkeypatch.setattr(runner, "METER_S", 0)
    monkeypatch.setattr(runner, "MIN_READINGS", 4)
    readings = iter([9.0, *[4.0, None, 6.0, None] * 10_000])  # the first tells only that there is a meter
    taken: list[float | None] = []

    def power_w() -> float | None:
        taken.append(next(readings))
        return taken[-1]

    rate, energy_mj = runner._throughput(model, data, 0.5, power_w)
    counted = [reading for reading in taken[1:] if reading is not None]
    assert rate > 0 and energy_mj == pytest.approx(sum(counted) / len(counted) / rate * 1000)


def test_without_a_meter_or_with_too_few_readings_there_is_no_energy(built: Path) -> None:
    model, data = runner.Model(built, threads=1), [(built / "check" / "roof.png").read_bytes()]
    calls: list[int] = []
    assert runner._throughput(model, data, 0.2, lambda: calls.append(1))[1] is None
    assert len(calls) == 1  # nothing is looked for while the time counts
    assert runner._throughput(model, data, 1e-6, lambda: 5.0)[1] is None


# ---------------------------------------------------------------------------------------------------------------
# ahead


def counted(count: int, made: list[int], error: Exception | None = None) -> Generator[int, None, None]:
    """0, 1, ... count - 1, then the error. made: what was made so far, and -1 once it is closed."""
    try:
        for number in range(count):
            made.append(number)
            yield number
        if error:
            raise error
    finally:
        made.append(-1)


@given(st.integers(0, 12), st.integers(1, 5))
def test_ahead_gives_the_same_items_in_the_same_order(count: int, depth: int) -> None:
    made: list[int] = []
    given: list[int] = []
    for item in runner.ahead(counted(count, made), depth):
        given.append(item)
        assert made[-1] == -1 or len(made) <= len(given) + depth
    assert given == list(range(count))
    assert made == [*range(count), -1]


@given(st.integers(0, 6), st.integers(1, 4))
def test_what_making_an_item_raises_is_raised_in_its_place(count: int, depth: int) -> None:
    made: list[int] = []
    given = []
    with pytest.raises(ValueError, match="no more"):
        for item in runner.ahead(counted(count, made, ValueError("no more")), depth):
            given.append(item)  # noqa: PERF402 - what came before the error counts
    assert given == list(range(count))
    assert made[-1] == -1


@given(st.integers(0, 5), st.integers(1, 4))
def test_closing_early_closes_the_source_before_it_returns(taken: int, depth: int) -> None:
    made: list[int] = []
    source = counted(1000, made)  # held, so that it is not closed only because nobody has it any more
    stream = runner.ahead(source, depth)
    assert [next(stream) for _ in range(taken)] == list(range(taken))
    stream.close()
    assert made == [] if taken == 0 else (made[-1] == -1 and len(made) - 1 <= taken + depth)
    assert next(stream, None) is None


def test_the_next_item_is_made_in_another_thread_while_the_caller_works() -> None:
    begun = [threading.Event() for _ in range(4)]

    def items() -> Generator[int, None, None]:
        for event in begun[:3]:
            event.set()
            yield threading.get_native_id()
        begun[3].set()

    for event, thread in zip(begun[1:], runner.ahead(items(), 1), strict=True):
        assert event.wait(60)
        assert thread != threading.get_native_id()


# ---------------------------------------------------------------------------------------------------------------
# The environment


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
NOT_TOLD = dict.fromkeys(
    ("governor", "mhz", "temperature_c", "throttled", "throttle_events", "ticks", "steal", "power_w")
)


def system(root: Path, files: dict[str, str]) -> dict[str, Any]:
    """What environment() says of a system with these files, but for the load, which is this machine's."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    told = runner.environment(root)
    assert told.pop("load") == (pytest.approx(os.getloadavg()[0], abs=2) if hasattr(os, "getloadavg") else None)
    return told


def cores(**files: str) -> dict[str, str]:
    """These files of each core that this process may use, and another content of one that it may not."""
    folder = "sys/devices/system/cpu/cpu{}/cpufreq/{}"
    own = {folder.format(core, name): text for core in CORES for name, text in files.items()}
    return {**own, **{folder.format(max(CORES, default=0) + 1, name): "7" for name in files}}


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert system(tmp_path, {}) == NOT_TOLD
    assert system(tmp_path, {"proc/stat": "", "sys/class/thermal/thermal_zone0/temp": "warm"}) == NOT_TOLD


@pytest.mark.skipif(not CORES, reason="this system does not tell which cores a process may use")
def test_a_raspberry_pi(tmp_path: Path) -> None:
    files = {
        **cores(scaling_governor="ondemand", scaling_cur_freq="1500000"),
        "sys/class/thermal/thermal_zone0/temp": "61000",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005",
        "proc/stat": "cpu  10 1 5 80 2 1 1 0 0 0\ncpu0 10 1 5 80 2 1 1 0 0 0",
    }
    assert system(tmp_path, files) == {
        "governor": "ondemand",
        "mhz": 1500.0,
        "temperature_c": 61.0,
        "throttled": ["under-voltage", "throttled"],  # bits 0 and 2; 16 and 18 say that it was so once
        "throttle_events": None,
        "ticks": 100,
        "steal": 0,
        "power_w": None,
    }
    for text, held_back in {"0": [], "50000": [], "2": ["frequency capped"], "8": ["soft temperature limit"]}.items():
        name = "sys/devices/platform/soc/soc:firmware/get_throttled"
        assert system(tmp_path, {name: text})["throttled"] == held_back


@pytest.mark.skipif(not CORES, reason="this system does not tell which cores a process may use")
def test_an_x86_machine_under_a_hypervisor(tmp_path: Path) -> None:
    files = {
        **cores(scaling_governor="performance", scaling_cur_freq="3000000"),
        f"sys/devices/system/cpu/cpu{CORES[0]}/cpufreq/scaling_cur_freq": "1000000",
        f"sys/devices/system/cpu/cpu{CORES[0]}/cpufreq/scaling_governor": "powersave",
        "sys/class/thermal/thermal_zone0/temp": "27800",
        "sys/class/thermal/thermal_zone1/temp": "54500",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3",
        "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "4",
        "proc/stat": "cpu  1000 20 300 4000 50 6 7 8 900 0",  # 900: a guest's, which are in the first figure too
    }
    governors = "performance, powersave" if len(CORES) > 1 else "powersave"
    assert system(tmp_path, files) == {
        "governor": governors,
        "mhz": pytest.approx((1000 + 3000 * (len(CORES) - 1)) / len(CORES)),
        "temperature_c": 54.5,
        "throttled": None,
        "throttle_events": 7,
        "ticks": 5391,
        "steal": 8,
        "power_w": None,
    }


def test_a_jetson_with_its_meter(tmp_path: Path) -> None:
    files = {
        "sys/class/hwmon/hwmon0/name": "cpu_thermal",
        "sys/class/hwmon/hwmon0/in1_input": "1",
        "sys/class/hwmon/hwmon0/curr1_input": "1",
        "sys/class/hwmon/hwmon1/name": "ina3221",
        "sys/class/hwmon/hwmon1/in1_input": "5000",  # mV
        "sys/class/hwmon/hwmon1/curr1_input": "1240",  # mA
        "sys/class/hwmon/hwmon1/in2_input": "900",
        "sys/class/hwmon/hwmon1/curr2_input": "90",
        "sys/class/hwmon/hwmon2/oc1_event_cnt": "2",
        "sys/class/hwmon/hwmon2/oc3_event_cnt": "5",
    }
    assert system(tmp_path, files) == {**NOT_TOLD, "throttle_events": 7, "power_w": pytest.approx(6.2)}
    (tmp_path / "sys/class/hwmon/hwmon1/curr1_input").unlink()
    assert system(tmp_path, {})["power_w"] is None


def test_this_machine_tells_what_json_can_hold() -> None:
    told = runner.environment()
    assert set(told) == {*NOT_TOLD, "load"}
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    if Path("/proc/stat").exists():
        assert 0 <= told["steal"] <= told["ticks"] <= runner.environment()["ticks"]


PEAKS = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from edgekit import runner
before = runner.peak_rss_bytes()
array = np.ones(100_000_000, np.uint8)
held = runner.peak_rss_bytes()
del array
print(before, held, runner.peak_rss_bytes())
"""


@pytest.mark.skipif(runner.peak_rss_bytes() is None, reason="this system does not tell how much memory a process had")
def test_the_peak_of_a_fresh_process_is_its_own_and_stays() -> None:
    mine = np.ones(200_000_000, np.uint8)  # the parent's, while the child is started
    command = [sys.executable, "-c", PEAKS, str(Path(runner.__file__).parents[1])]
    child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    before, held, after = map(int, child.stdout.split())
    assert (runner.peak_rss_bytes() or 0) >= mine.nbytes
    assert 10e6 < before < 150e6
    assert 100e6 <= held - before < 105e6
    assert after == pytest.approx(held, abs=1e6)  # the kernel counts in steps


def test_no_peak_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_text", lambda _: "")
    assert runner.peak_rss_bytes() is None


# ---------------------------------------------------------------------------------------------------------------
# Commands, in this process


def test_numbers_on_the_command_line_are_told_when_they_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in {
        ("infer", "--top-k", "-1"): "expected a whole number, 0 or more, found '-1'",
        ("infer", "--frames", "1.5"): "expected a whole number, 0 or more, found '1.5'",
        ("infer", "--threads", "two"): "expected a whole number, 0 or more, found 'two'",
        ("infer", "--min-score", "1.5"): "expected a number from 0 to 1, found '1.5'",
        ("infer", "--min-score", "nan"): "expected a number from 0 to 1, found 'nan'",
        ("infer", "--min-score", "low"): "expected a number from 0 to 1, found 'low'",
        ("bench", "--seconds", "0"): "expected a number above 0, found '0'",
        ("bench", "--seconds", "inf"): "expected a number above 0, found 'inf'",
        ("bench", "--seconds", "nan"): "expected a number above 0, found 'nan'",
        ("bench", "--seconds", "soon"): "expected a number above 0, found 'soon'",
    }.items():
        with pytest.raises(SystemExit) as caught:
            runner.main(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_forward_gives_the_raw_outputs(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blobs = np.random.default_rng(0).normal(size=(3, 3, 32, 48)).astype(np.float32)
    np.save(tmp_path / "x.npy", blobs)
    command = ["forward", "--model", str(built / "model.onnx"), "--input", str(tmp_path / "x.npy")]
    engine = runner.engines()[-1]
    assert runner.main([*command, "--engine", engine, "--output", str(tmp_path / "y.npz")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert 0 < said.pop("best_ms") < 1000
    where = {"precision": "fp32", "ran_on": "" if engine == "new" else "OCV/CPU"}
    assert said == {"opencv": cv2.__version__, "engine": engine, "outputs": ["logits"], **where}
    session = runner.Session(built / "model.onnx", engine)
    with np.load(tmp_path / "y.npz") as arrays:
        assert np.array_equal(arrays["logits"], np.concatenate([session(blob[None])["logits"] for blob in blobs]))
    (tmp_path / "x.npy").write_bytes(b"no array")
    assert runner.main([*command, "--output", str(tmp_path / "y.npz")]) == 2
    assert "run.py: cannot read" in capsys.readouterr().err


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0\r\n\ufeff", exclude_categories=["Cs"]), min_size=1), max_size=5
    )
)
@example(["b\x85c", " d ", "e\u2028f"])
def test_a_list_has_a_source_a_line(tmp_path: Path, names: list[str]) -> None:
    wanted = [name for name in names if name.encode().strip()]
    for start, end in (("", "\n"), ("\ufeff", "\r\n")):
        (tmp_path / "list.txt").write_bytes((start + "".join(name + end for name in names)).encode())
        assert runner._read_list(str(tmp_path / "list.txt")) == wanted


def test_a_list_of_names_that_are_not_utf8_gives_those_files(tmp_path: Path) -> None:
    name = os.fsdecode(str(tmp_path).encode() + b"/caf\xe9.png")
    Path(name).write_bytes(png(some_image(4, 6)))
    (tmp_path / "list.txt").write_bytes(os.fsencode(name) + b"\n")
    (source,) = runner._read_list(str(tmp_path / "list.txt"))
    assert source == name
    assert [frame.error for frame in runner.frames([source])] == [""]


def test_forward_prepares_images_as_the_spec_says(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(runner.read_manifest(built)["spec"]), encoding="utf-8")
    rows, wanted = bundles.read_expected(built)
    images = [str(built / "check" / row["file"]) for row in rows]
    command = ["forward", "--model", str(built / "model.onnx"), "--output", str(tmp_path / "y.npz")]
    command += ["--spec", str(tmp_path / "spec.json"), "--images", *images]
    assert runner.main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["pixels_sha256"] == [row["pixels_sha256"] for row in rows]
    assert 0 < said["best_ms"] < 1000
    outputs = np.load(tmp_path / "y.npz")["logits"]
    assert outputs == pytest.approx(wanted["logits"], rel=1e-4, abs=1e-4)
    (tmp_path / "spec.json").write_text("{}", encoding="utf-8")
    assert runner.main(command) == 2
    (tmp_path / "spec.json").unlink()
    assert runner.main(command) == 2
    assert "cannot read" in capsys.readouterr().err
