"""Shared by the tests: run a command line of the project as a user would."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent


def run(*command, code=0, cwd=ROOT, env=None, timeout=300):
    """Run `python COMMAND...` from the project's root and return the finished process.

    Asserts the exit code (`code=None` accepts any) and that no traceback is shown where a wrong input (2) is expected.
    """
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    if code is not None:
        assert done.returncode == code, f"exit {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
    if code == 2:
        assert "Traceback" not in done.stderr, done.stderr
    return done


def draw_photos(folder, count, size=64, seed=0, name="{:04d}.jpg"):
    """Write `count` small photos of random shapes that differ from each other; returns the folder."""
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
