"""Shared by the tests: run a command line of the project as a user would."""
import contextlib
import functools
import io
import os
import runpy
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import skimage
import sklearn
from PIL import Image, ImageDraw, ImageOps

from copydet.common import read_text
from copydet.images import UnreadableImage, open_image

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets/images"  # photos
WITH_PACKAGE = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "scripts", "tests"))}


def run(*command, code=0, cwd=ROOT, env=None, timeout=300, apart=False):
    """Run `python COMMAND...` from the project's root and return the finished process.

    Asserts the exit code (`code=None` accepts any) and that no traceback is shown where a wrong input (2) is expected.
    What is refused (2) is run in this process, unless `apart`: most of its time would be imports.
    """
    if code == 2 and not env and not apart:
        return run_here(*command, cwd=cwd, code=2)
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    if code is not None:
        assert done.returncode == code, f"exit {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
    if code == 2:
        assert "Traceback" not in done.stderr, done.stderr
    return done


def run_here(*command, code=0, cwd=ROOT):
    """The same in this process, for command lines that start no others."""
    command, expected = list(map(str, command)), code
    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, os.getcwd())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}  # training sets its own
    sys.argv = command
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert code == expected, f"exit {code}, expected {expected}\n{out.getvalue()}\n{err.getvalue()}"
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def children_of(pid, word):
    """Processes that one has started, whose command holds a word, in their order; on Linux."""
    children = [int(child.name) for child in Path("/proc").glob("[0-9]*")
                if read_text(child / "stat").rpartition(")")[2].split()[1:2] == [str(pid)]]
    return [child for child in sorted(children) if word in read_text(f"/proc/{child}/cmdline")]


def draw_images(folder, count, size=64, seed=0, name="{:04d}.jpg"):
    """Write `count` small images of random shapes that differ from each other; returns the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        img = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((size, size), Image.BICUBIC)
        draw = ImageDraw.Draw(img)
        for _ in range(4):
            x, y = rng.integers(0, size, 2)
            draw.ellipse([x, y, x + size // 3, y + size // 4], fill=tuple(rng.integers(0, 256, 3).tolist()))
        img.save(folder / name.format(i))
    return folder


def data_folder(root, queries=6, references=10, training=4):
    draw_images(root / "query_images", queries, seed=1, name="Q{:05d}.jpg")
    draw_images(root / "reference_images", references, seed=2, name="R{:06d}.jpg")
    draw_images(root / "training_images", training, seed=3, name="T{:06d}.jpg")
    return root


def odd_images(folder):
    """Images of unusual kinds, all readable but for the header bomb."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (48, 64), dtype=np.uint8)
    rgb = Image.fromarray(np.stack([grey, grey.T.reshape(48, 64), 255 - grey], -1))
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(grey).save(folder / "grey8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "grey16.png")
    Image.fromarray(np.stack([grey, grey], -1), "LA").save(folder / "la.png")
    rgb.convert("RGBA").save(folder / "rgba.png")
    rgb.convert("P").save(folder / "palette.png", transparency=3)
    rgb.save(folder / "animated.gif", save_all=True, append_images=[rgb.rotate(90)])
    exif = rgb.getexif()
    exif[274] = 6
    rgb.save(folder / "turned.JPEG", exif=exif)
    rgb.resize((1, 1)).save(folder / "dot.PNG")
    rgb.resize((3, 500)).save(folder / "line.jpg")
    rgb.save(folder / "image.webp"), rgb.save(folder / "image.bmp"), rgb.save(folder / "photo2.tif")
    bomb = bytearray((folder / "grey8.png").read_bytes())
    bomb[16:24] = (20000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(bytes(bomb))
    os.rename(folder / "image.bmp", folder / "photo3.BMP")
    return folder


def fake_describe(self, files):
    """Stands for find_copies.Extraction.describe, and so for train.py: the descriptor of every region is the whole
    image, made small."""
    def describe(file):
        try:
            row = np.asarray(open_image(file).resize((4, 4)), np.float32).ravel() / 1000
            return np.tile(row, len(self.boxes)), None
        except UnreadableImage as error:
            return None, error.reason

    return [describe(file) for file in files], {}


@functools.cache
def open_photo(name):
    """A photo that scikit-image or scikit-learn ships, by its name without ending."""
    return Image.open(next(file for folder in SHIPPED for file in folder.glob(f"{name}.*"))).convert("RGB")


def photo(name, size=(400, 300)):
    return ImageOps.fit(open_photo(name), size)


def warp(img, matrix, size):
    """The image through a transform [2, 3], in coordinates in which it covers [0, width] x [0, height]."""
    matrix = np.array(matrix, float)
    by_centres = np.column_stack([matrix[:, :2], matrix[:, 2] + matrix[:, :2] @ [0.5, 0.5] - 0.5])
    return Image.fromarray(cv2.warpAffine(np.asarray(img), by_centres, size, flags=cv2.INTER_AREA))


def turn(degrees, scale, centre, to):
    """Transform [2, 3] that turns and scales about `centre` and brings it to `to`."""
    c, s = scale * np.cos(np.deg2rad(degrees)), scale * np.sin(np.deg2rad(degrees))
    linear = np.array([[c, -s], [s, c]])
    return np.column_stack([linear, np.array(to) - linear @ centre])
