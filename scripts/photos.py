"""Photos in folders: find them, open them as RGB, list those that cannot be used. No torch: every script may use it."""
import csv
import os

import numpy as np
from PIL import Image, ImageOps

from descriptors import replacing

PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def list_photos(root):
    """All photos below `root`: their paths relative to it, sorted, and [(path, reason)] of what only looks like one."""
    paths, odd, folders = [], [], [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(os.path.join(root, folder)))
        except OSError as error:
            odd.append((folder or ".", error.strerror))
            continue
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.name.startswith("."):  # macOS sidecars, notebook checkpoints
                continue
            looks_like_photo = entry.name.lower().endswith(PHOTO_ENDINGS)
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a link to itself
                odd.append((path, error.strerror))
                continue
            if not is_folder:
                paths += [path] if looks_like_photo else []
            elif looks_like_photo:
                odd.append((path, "is a folder"))
            elif not entry.is_symlink():  # links to folders can form loops
                folders.append(path)
    return sorted(paths), sorted(odd)


def open_photo(path, exif_transpose=False):
    """Decode a photo to 8-bit RGB: first frame, 16 bits scaled down, transparency on white, EXIF turn if asked.

    Raises OSError, ValueError, SyntaxError or Image.DecompressionBombError where it cannot be decoded whole.
    """
    with Image.open(path) as img:
        img.load()
        if exif_transpose:
            img = ImageOps.exif_transpose(img)
        if img.mode.startswith("I"):  # Pillow would clip 16 bits at 255
            img = Image.fromarray((np.asarray(img).astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8))
        if img.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in img.info:
            img = img.convert("RGBA")
            img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
        return img.convert("RGB")


UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def write_skipped(file, rows):
    """skipped.csv: path and reason of every photo that could not be used; no file when there is none."""
    if not rows:
        file.unlink(missing_ok=True)
        return
    with replacing(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("path", "reason"), *sorted(rows)])
