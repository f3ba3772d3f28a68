"""The rate of a 1080p video through a bundle's run.py, as a share of what the network's time alone allows.

    uv run python benchmarks/video_rate.py BUNDLE IMAGES --repeat 5

The video pans over the folder's images, 15 frames each. The rate is that of the lines printed, after the first 20; what
the network's time allows is the median forward pass of `run.py bench`, measured before each pair of runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from edgekit import runner

FRAMES, FRAMES_AN_IMAGE, WARM_UP = 300, 15, 20
WIDTH, HEIGHT = 1920, 1080


def write_video(path: Path, images: Path) -> None:
    """FRAMES of 1080p, MPEG-4, from the folder's first images."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 30, (WIDTH, HEIGHT))
    files = sorted(file for file in images.iterdir() if file.suffix in runner.IMAGE_SUFFIXES)
    for number in range(FRAMES):
        image = runner.read_image(files[number // FRAMES_AN_IMAGE % len(files)])
        x = number % FRAMES_AN_IMAGE * 8
        large = cv2.resize(image, (WIDTH + 180, HEIGHT + 100))[40 : 40 + HEIGHT, x : x + WIDTH]
        writer.write(np.ascontiguousarray(large))
    writer.release()


def forward_ms(bundle: Path, threads: int) -> float:
    """The median forward pass, nothing beside it."""
    command = [sys.executable, bundle / "run.py", "bench", "--json", "--seconds", "6", "--threads", str(threads)]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return float(report["forward_ms"]["p50"])


def frame_ms(bundle: Path, video: Path, threads: int, *options: str) -> float:
    """The mean time from line to line."""
    command = [sys.executable, str(bundle / "run.py"), "infer", str(video), "--threads", str(threads), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        times = [time.perf_counter() for _ in process.stdout]
    if process.returncode or len(times) != FRAMES:
        sys.exit(f"run.py ended with {process.returncode} after {len(times)} frames")
    return (times[-1] - times[WARM_UP]) / (FRAMES - 1 - WARM_UP) * 1e3


def main() -> None:
    """Prints a line a repetition, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, help="a folder of images to make the video from")
    parser.add_argument("--threads", type=int, default=1, help="of the network (default 1)")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    found: dict[str, list[float]] = {"plain": [], "drawn": []}
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "video.mp4"
        write_video(video, args.images)
        for number in range(args.repeat):
            network_ms = forward_ms(args.bundle, args.threads)
            plain_ms = frame_ms(args.bundle, video, args.threads)
            drawn_ms = frame_ms(args.bundle, video, args.threads, "--draw", str(Path(folder) / f"drawn-{number}"))
            found["plain"].append(network_ms / plain_ms)
            found["drawn"].append(network_ms / drawn_ms)
            print(
                f"network {network_ms:.2f} ms; a frame {plain_ms:.2f} ms ({network_ms / plain_ms:.3f}), "
                f"with --draw {drawn_ms:.2f} ms ({network_ms / drawn_ms:.3f})",
                flush=True,
            )
    print("medians: " + ", ".join(f"{name} {statistics.median(shares):.3f}" for name, shares in found.items()))


if __name__ == "__main__":
    main()
