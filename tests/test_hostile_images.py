"""What people's folders hold: odd files, names and folders, each with the right outcome. A new report is a row."""
import csv
import io
import os
import socket
import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image, ImageDraw, PngImagePlugin

import find_copies
import ladder
import make_benchmark
import select_ref_subset
from copydet import images, page, report
from copydet.common import InputError, run_main
from copydet.descriptors import write_descriptors
from copydet.images import ImageFile, UnreadableImage, is_blank, list_group, list_images, open_image, open_thumbnail
from copydet.options import parse_args
from copydet.views import Preprocessing, WholeImages
from helpers import draw_images, run

# ---------------------------------------------------------------------------------------------------------------------
# Makers of files

GREY = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8), np.uint8)).resize((80, 60), 2))
GREY = np.clip(GREY.astype(int) * 2 - 128, 0, 255).astype(np.uint8)
RGB = Image.fromarray(np.stack([GREY, GREY[::-1], 255 - GREY], -1))
BOMB = zlib.compress(bytes(50_000_000))


def saved(img, form, **options):
    file = io.BytesIO()
    img.save(file, form, **options)
    return file.getvalue()


def tiff(pixels, sample=1, spp=1, entries=()):
    """TIFF by hand: uncompressed; `sample`: 1 unsigned, 2 signed, 3 float; entries [(tag, type, count, value)]."""
    height, width = pixels.shape[:2]
    start = 8 + 2 + 12 * (10 + len(entries)) + 4
    fields = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8 * pixels.itemsize), (259, 3, 1, 1),
              (262, 3, 1, 1 if spp == 1 else 2), (273, 4, 1, start), (277, 3, 1, spp), (278, 4, 1, height),
              (279, 4, 1, pixels.nbytes), (339, 3, 1, sample), *entries]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(fields))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + packed + bytes(4) + pixels.tobytes()


def exif(*entries):
    """EXIF block of entries (tag, type, count, four bytes)."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, interlaced=0):
    """PNG by hand, from rows of bytes; colour: 0 grey, 2 RGB."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    content = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes(row) for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + content + chunk(b"IEND", b"")


def adam7(pixels):
    """Rows of the seven passes of an interlaced PNG."""
    for top, left, down, right in ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
                                   (1, 0, 2, 1)):
        yield from (row.tobytes() for row in pixels[top::down, left::right])


def png16(factor):
    pixels = (np.asarray(RGB).astype(int) * factor).astype(">u2")
    return png(80, 60, 16, 2, [row.tobytes() for row in pixels])


def psd(bits=8, colours=3):
    header = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 60, 80, bits, colours) + bytes(12)
    return header + b"\0\0" + np.asarray(RGB).transpose(2, 0, 1).tobytes() * (bits // 8)


def line_art(colour):
    img = Image.new("RGBA", (80, 60), (*colour, 0))
    ImageDraw.Draw(img).line((5, 5, 70, 50), fill=(*colour, 255), width=5)
    return saved(img, "PNG")


def xmp(orientation):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", f'<x xmlns:tiff="ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>')
    return saved(RGB, "PNG", pnginfo=info)


def with_broken_mpf():
    data = bytearray(saved(RGB, "MPO", save_all=True, append_images=[RGB]))
    data[data.find(b"MPF\0") + 8:][:8] = b"\xff" * 8
    return bytes(data)


TURN, PNG, JPEG = (274, 3, 1, b"\6\0\0\0"), saved(RGB, "PNG"), saved(RGB, "JPEG")
PROGRESSIVE = saved(RGB.resize((640, 480)), "JPEG", progressive=True)
TURNED = saved(RGB.transpose(Image.Transpose.ROTATE_270), "PNG")
SAME = {  # what must look like RGB, to within some levels
    "baseline": JPEG, "progressive": saved(RGB, "JPEG", progressive=True), "webp": saved(RGB, "WEBP"),
    "cmyk.jpg": saved(RGB.convert("CMYK"), "JPEG"), "cmyk.tif": saved(RGB.convert("CMYK"), "TIFF"),
    "ycbcr.tif": saved(RGB.convert("YCbCr"), "TIFF", compression="jpeg"), "big.tif": saved(RGB, "TIFF", big_tiff=True),
    "lzw.tif": saved(RGB, "TIFF", compression="tiff_lzw"), "jp2": saved(RGB, "JPEG2000"), "ppm": saved(RGB, "PPM"),
    "psd": psd(), "16 bits": png16(257), "interlaced": png(80, 60, 8, 2, adam7(np.asarray(RGB)), 1),
    "pages.tif": saved(RGB, "TIFF", save_all=True, append_images=[RGB.rotate(90)]),
    "animated.webp": saved(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(90)]),
    "apng": saved(RGB, "PNG", save_all=True, append_images=[RGB.rotate(90)]),
    "mpo": saved(RGB, "MPO", save_all=True, append_images=[RGB.rotate(90)]), "broken mpf": with_broken_mpf(),
    "trailing": JPEG + b"trailing" * 100, "bad icc.jpg": saved(RGB, "JPEG", icc_profile=b"bad" * 9000),
    "bad icc.png": saved(RGB, "PNG", icc_profile=b"bad" * 9000),
    "bmp, alpha 0": saved(Image.merge("RGBA", (*RGB.split(), Image.new("L", RGB.size))), "BMP"),
    "orientation 0": saved(RGB, "JPEG", exif=exif((274, 3, 1, bytes(4)))),
    "orientation 9": saved(RGB, "JPEG", exif=exif((274, 3, 1, b"\x09\0\0\0"))),
    "garbage exif": saved(RGB, "JPEG", exif=b"Exif\0\0" + b"garbage" * 30),
}
GREYS = {  # what must look like GREY
    "float 0..1": saved(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"),
    "float 0..255": saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "pfm": b"Pf\n80 60\n-1.0\n" + (GREY[::-1].astype("<f4") / 255).tobytes(),
    "int32": saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "int32, large": saved(Image.fromarray(GREY.astype(np.int32) * 2**23), "TIFF"),
    "8 bits in 16, png": saved(Image.fromarray(GREY.astype(np.uint16)), "PNG"),
    "8 bits in 16, tif": tiff(GREY.astype("<u2")), "12 bits in 16": tiff(GREY.astype("<u2") * 16),
    "16 bits": tiff(GREY.astype("<u2") * 257),
    "16 bits, 0 is white": tiff(65535 - GREY.astype("<u2") * 257).replace(*(
        struct.pack("<HHII", 262, 3, 1, value) for value in (1, 0))),
    "16 bits, jp2": saved(Image.fromarray(GREY * np.uint16(257)), "JPEG2000"),
    "pgm": b"P5 80 60 65535\n" + (GREY.astype(int) * 257).astype(">u2").tobytes(),
    "pgm of 10 bits": b"P5 80 60 1023\n" + (GREY.astype(int) * 4).astype(">u2").tobytes(),
}
UPRIGHT = {  # what must be turned, however broken the rest of its EXIF is
    "exif": saved(RGB, "JPEG", exif=exif(TURN)), "exif.png": saved(RGB, "PNG", exif=exif(TURN)),
    "exif.webp": saved(RGB, "WEBP", exif=exif(TURN)), "xmp.png": xmp(6),
    "as long": saved(RGB, "JPEG", exif=exif((274, 4, 1, b"\6\0\0\0"))),
    "resolution cut short": saved(RGB, "JPEG", exif=exif(TURN, (282, 5, 1, b"\x27\0\0\0"))),
    "unknown type": saved(RGB, "JPEG", exif=exif(TURN, (282, 2, 1, b"\x60\xea\0\0"), (305, 99, 1, b"abcd"))),
    "exif ifd inside": saved(RGB, "JPEG", exif=exif(TURN, (34665, 4, 1, b"\7\0\0\0"))),
    "tif": saved(RGB, "TIFF", tiffinfo={274: 6}),
    "tif, exif ifd outside": tiff(np.asarray(RGB), spp=3, entries=[(274, 3, 1, 6), (34665, 4, 1, 4_000_000)]),
}
REFUSED = {  # -> a part of the reason
    "empty": (b"", "empty"),
    "zeros": (bytes(1000), "no image of a kind"),
    "gzip": (b"\x1f\x8b\x08", "no image of a kind"),
    "leading bytes": (b"\0\0" + JPEG, "no image of a kind"),
    "html": (b"<!DOCTYPE html>", "HTML is not read here"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(99), "HEIC is not read here"),
    "jxl": (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL is not read here"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n", "PostScript is not read here"),
    "bomb.png": (png(14000, 14000, 1, 0, []), "more than 178,956,970 pixels"),
    "bomb.jpg": (JPEG.replace(struct.pack(">HH", 60, 80), b"\xff\xdc" * 2, 1), "more than 178,956,970"),
    "60,000 x 1": (saved(Image.new("RGB", (60000, 1)), "PNG"), "60,000 x 1 pixels, more than 200 times"),
    "1 x 60,000": (saved(Image.new("RGB", (1, 60000)), "JPEG"), "1 x 60,000 pixels, more than 200 times"),
    "0 x 60": (png(0, 60, 8, 2, []), "PNG that is broken"),
    "gif without frame": (b"GIF89a<\0<\0\0\0\0;", "GIF that is broken"),
    "truncated": (JPEG[:-9], "truncated"),
    "truncated progressive": (PROGRESSIVE[:len(PROGRESSIVE) * 2 // 3], "truncated"),
    "truncated.png": (PNG[:len(PNG) // 2], "truncated"),
    "truncated.webp": (saved(RGB, "WEBP")[:200], "broken"),
    "truncated.jp2": (saved(RGB, "JPEG2000")[:300], "broken"),
    "bad data": (PNG[:60] + b"bad" + PNG[63:], "broken"),
    "12-bit jpeg": (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c", 1), "or of a rare kind"),
    "iCCP bomb": (PNG[:33] + chunk(b"iCCP", b"x\0\0" + BOMB) + PNG[33:], "too large"),
    "zTXt bomb": (PNG[:33] + chunk(b"zTXt", b"x\0\0" + BOMB) + PNG[33:], "too large"),
    "negative floats": (saved(Image.fromarray(GREY / np.float32(127) - 1), "TIFF"), "an 8-bit image: values from -1"),
    "nan": (saved(Image.fromarray(np.float32([[np.nan, 1]])), "TIFF"), "not an 8-bit image"),
    "negative integers": (tiff(GREY.astype("<i2") - 128, sample=2), "not an 8-bit image: values from -128"),
    "8 bits in 16, RGB": (png16(1), "not an 8-bit image"),
    "12 bits in 16, RGB": (png16(16), "not an 8-bit image"),
    "float RGB": (tiff(np.asarray(RGB).astype("<f4"), sample=3, spp=3), "TIFF that is broken, or of a rare kind"),
    "psd of 16 bits": (psd(16), "or of a rare kind"),
    "odd xmp": (tiff(GREY, entries=[(274, 3, 1, 6), (700, 3, 2, 9)]), "broken: TypeError"),
}
if "AVIF" in images.READ:
    SAME["avif"], REFUSED["truncated.avif"] = saved(RGB, "AVIF"), (saved(RGB, "AVIF")[:-200], "broken")


def read_in_all_ways(path):
    """Pixels of all that opens an image, as it lies and upright."""
    found = [ImageFile(path, turn, draft).pixels for turn in (False, True) for draft in (True, False)]
    return found + [np.asarray(open_image(path, turn)) for turn in (False, True)]


def distance(pixels, other):
    return np.abs(pixels.astype(int) - np.asarray(Image.fromarray(other).convert("RGB"))).mean()


@pytest.mark.parametrize("name", SAME)
def test_odd_files_show_what_they_show(tmp_path, name):
    (tmp_path / "a.jpg").write_bytes(SAME[name])
    assert all(distance(pixels, np.asarray(RGB)) < 6 for pixels in read_in_all_ways(tmp_path / "a.jpg"))


@pytest.mark.parametrize("name", GREYS)
def test_other_depths_are_scaled_by_type_and_range(tmp_path, name):
    (tmp_path / "a.tif").write_bytes(GREYS[name])
    assert all(distance(pixels, GREY) < 2 for pixels in read_in_all_ways(tmp_path / "a.tif"))


@pytest.mark.parametrize("name", UPRIGHT)
def test_images_are_turned_upright_however_broken_their_exif_is(tmp_path, name):
    (tmp_path / "a.jpg").write_bytes(UPRIGHT[name])
    image = ImageFile(tmp_path / "a.jpg", exif_transpose=True)
    assert image.size == (60, 80) and open_thumbnail(tmp_path / "a.jpg", 40).size == (30, 40)
    upright = np.asarray(RGB.transpose(Image.Transpose.ROTATE_270))
    assert all(distance(pixels, upright) < 6 for pixels in (image.pixels, np.asarray(open_image(image.path, True))))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_told_in_a_few_words(tmp_path, name):
    data, reason = REFUSED[name]
    (tmp_path / "a.jpg").write_bytes(data)
    for read in (lambda path: ImageFile(path).pixels, lambda path: ImageFile(path, True, False).pixels, open_image,
                 lambda path: open_thumbnail(path, 40)):
        with pytest.raises(UnreadableImage) as error:
            read(tmp_path / "a.jpg")
        assert reason in error.value.reason and len(error.value.reason) < 120
        assert str(error.value) == f"{tmp_path / 'a.jpg'}: {error.value.reason}"
    assert page.thumbnail(tmp_path / "a.jpg") is None


@pytest.mark.parametrize("name, blank", [
    (line_art((255, 255, 255)), False), (line_art((0, 0, 0)), False), (line_art((250, 250, 250)), False),
    (saved(RGB.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))), False),
    (saved(Image.new("RGBA", (80, 60), (9, 9, 9, 0)), "PNG"), True), (saved(Image.new("1", (80, 60)), "PNG"), True),
    (saved(Image.new("RGB", (80, 60), (200, 9, 9)), "JPEG", quality=20), True),
], ids=["white art", "black art", "nearly white art", "palette with alpha", "clear", "black", "a JPEG of one colour"])
def test_line_art_is_never_blank_and_what_is_blank_is_known(tmp_path, name, blank):
    (tmp_path / "a.jpg").write_bytes(name)
    assert [is_blank(pixels) for pixels in read_in_all_ways(tmp_path / "a.jpg")] == [blank] * 6
    i, shown, reason = WholeImages([str(tmp_path / "a.jpg")], Preprocessing(32, "crop", [0.5] * 3, [0.5] * 3))[0]
    assert shown is not None and reason == (images.BLANK if blank else None)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


@pytest.mark.parametrize("make, reason", [
    (os.mkfifo, "is not a file"), (os.mkdir, "is not a file"), (unix_socket, "is not a file"),
    (lambda path: path.symlink_to("/dev/zero"), "is not a file"),
    (lambda path: path.symlink_to("gone"), "cannot be read now: No such file"),
    (lambda path: path.symlink_to(path.name), "cannot be read now: Too many"),
    (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**37), "more than 2,147,483,648 bytes"),
], ids=["pipe", "folder", "socket", "device", "dangling link", "link to itself", "128 GiB"])
def test_only_files_of_a_sensible_size_are_opened(tmp_path, make, reason):
    make(tmp_path / "a.jpg")
    for read in (ImageFile, open_image, lambda path: open_thumbnail(path, 9)):
        with pytest.raises(UnreadableImage, match=reason):
            read(tmp_path / "a.jpg")


def test_what_may_pass_is_told_apart(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    for error in (OSError(5, "Input/output error"), MemoryError(), PermissionError(13, "Permission denied")):
        def fail(*args, **kwargs):
            raise error
        monkeypatch.setattr(images, "open", fail, raising=False)
        with pytest.raises(UnreadableImage) as told:
            open_image(tmp_path / "a.jpg")
        assert told.value.reason.startswith(images.NOT_NOW)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def write_files(root, files):
    """Files path -> content below `root`."""
    for name, content in files.items():
        Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        Path(root, name).write_bytes(content)
    return root


HEIC = b"\0\0\0\x18ftypheic" + bytes(99)
FOLDER = {  # file -> content, and whether it is an image, or why not, or nothing where it is left out in silence
    "a.jpg": (b"", True), "b.JPE": (b"", True), "c.jfif": (b"", True), "d.jp2": (b"", True), "sub/e.Png": (b"", True),
    "f": (PNG, True), "g.1": (JPEG, True), "h.jpg_large": (JPEG, True), "i.": (saved(RGB, "WEBP"), True),
    "j.avif": (b"", True if "AVIF" in images.READ else "AVIF is not read here"),
    "k.heic": (b"", "HEIC is not read here"), "l": (HEIC, "HEIC is not read here"),
    "m.SVG": (b"", "SVG is not read here"), "n.CR2": (b"", "CR2 is not read here"),
    "o.eps": (b"", "EPS is not read here"), "empty": (b"", None),
    "README": (b"text", None), "notes.txt": (JPEG, None), "a.json": (b"{}", None), "script": (b"%!PS\n", None),
    "Thumbs.db": (b"", None), "desktop.ini": (b"", None), "._a.jpg": (b"", None), ".hidden/a.jpg": (b"", None),
    "@eaDir/a.jpg": (b"", None), "#recycle/a.jpg": (b"", None), "$RECYCLE.BIN/a.jpg": (b"", None),
    "__MACOSX/a.jpg": (b"", None), "System Volume Information/a.jpg": (b"", None),
}


def test_images_are_found_and_what_looks_like_one_is_told_by_its_kind(tmp_path):
    write_files(tmp_path, {name: content for name, (content, _) in FOLDER.items()})
    os.mkfifo(tmp_path / "pipe.jpg"), os.mkfifo(tmp_path / "pipe"), (tmp_path / "folder.jpg").mkdir()
    paths, odd = list_images(tmp_path)
    assert paths == sorted(name for name, (_, what) in FOLDER.items() if what is True)
    assert dict(odd) == {name: what for name, (_, what) in FOLDER.items() if isinstance(what, str)} | {
        "pipe.jpg": "is not a file", "folder.jpg": "is a folder"}
    assert images.not_read(odd).startswith(" (1 CR2, 1 EPS, 2 HEIC, 1 SVG: not read here)")
    assert list(select_ref_subset.reference_ids(str(tmp_path))) == sorted(images.id_of(path) for path in paths)


def test_globs_leave_out_images_and_folders_by_name_or_path(tmp_path):
    write_files(tmp_path, dict.fromkeys(["a.jpg", "a_small.jpg", "b/a.jpg", "c/b/a.jpg", "d/e/a.jpg", "d/a.jpg"], b""))
    assert list_images(tmp_path, ["*_small.*", "b", "d/e"]) == (["a.jpg", "d/a.jpg"], [])


def test_linked_folders_are_followed_once(tmp_path):
    write_files(tmp_path, {"above.jpg": b"", "root/a/1.jpg": b"", "root/z/2.jpg": b"", "out/b/3.jpg": b""})
    root = tmp_path / "root"
    for link, target in (("again", "a"), ("self", "."), ("out", "../out"), ("out 2", "../out"), ("b", "../out/b"),
                         ("up", ".."), ("a/loop", "../../root"), ("top", "/")):
        (root / link).symlink_to(target)
    (tmp_path / "out" / "back").symlink_to(root)
    assert list_images(root) == (["a/1.jpg", "b/3.jpg", "z/2.jpg"], [
        ("top", "is a link to a folder above, not followed"), ("up", "is a link to a folder above, not followed")])


def test_folders_deeper_than_a_path_can_say_are_told(tmp_path):
    before = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(20):
            os.mkdir("d" * 240)
            os.chdir("d" * 240)
        Path("a.jpg").touch()
    finally:
        os.chdir(before)
    paths, ((folder, reason),) = list_images(tmp_path)
    assert paths == [] and folder.startswith("ddd") and reason == "cannot be read now: File name too long"


# ---------------------------------------------------------------------------------------------------------------------
# Names

RAW, SHOWN = "caf\udce9_1", "caf\\xe9_1"  # a name that is not UTF-8, and as it is told


def extraction(folder, *flags):
    return parse_args(["--mode", "extract", *flags, str(folder)])


def test_names_that_are_not_utf8_are_told_and_found_again(tmp_path):
    folder = write_files(tmp_path, {f"query_images/{RAW}.jpg": JPEG, "query_images/line\nbreak.jpg": JPEG,
                                    "query_images/two words.jpg": JPEG, "query_images/side.json": b""})
    group = list_group(extraction(folder), "query")
    assert sorted(group.ids) == [SHOWN, "line\nbreak", "two words"]
    write_descriptors(tmp_path / "d.h5", {"query": (np.eye(3, 8, dtype=np.float32), group.ids)}, {})
    rows = [(path, f"like {path}") for path in group.paths]
    images.write_skipped(tmp_path / "skipped.csv", rows)
    assert (f"{folder}/query_images/{SHOWN}.jpg", f"like {folder}/query_images/{SHOWN}.jpg") in images.read_skipped(
        tmp_path / "skipped.csv")
    thumbnails = report.Thumbnails(folder)
    assert all(thumbnails.open("query", name).size == (80, 60) for name in group.ids)
    assert thumbnails.open("query", "side") is None
    (folder / "query_images" / f"{SHOWN}.jpg").write_bytes(JPEG)
    with pytest.raises(InputError, match="have the same id"):
        list_group(extraction(folder), "query")


def test_a_subset_can_hold_ids_with_spaces(tmp_path):
    write_files(tmp_path, {"reference_images/two words.jpg": b"", "reference_images/b.jpg": b"",
                           "rids_subset.txt": b"\xef\xbb\xbftwo words\r\n\r\n"})
    assert list_group(extraction(tmp_path, "--eval-subset"), "reference").ids == ["two words"]


def test_any_name_can_be_printed(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdout", out)
    assert run_main(lambda: print(RAW)) == 0


def test_a_benchmark_of_hostile_images(tmp_path, capsys):
    source = draw_images(tmp_path / "images", 12, size=80)
    write_files(source, {f"{RAW}.jpg": (source / "0000.jpg").read_bytes(), f"{RAW}2.jpg": b"", "a.heic": b"",
                         "long.png": saved(RGB.resize((2000, 70)), "PNG"), "small/0.jpg": JPEG,
                         **{f"{name}.jpg": data for name, (data, _) in REFUSED.items()}})
    os.mkfifo(source / "pipe.jpg")
    assert make_benchmark.main([str(source), str(tmp_path / "out"), "-j", "1", "--exclude", "small"]) == 0
    rows = dict(images.read_skipped(tmp_path / "out" / "skipped.csv"))
    assert len(rows) == len(REFUSED) + 5 and not any("small" in path for path in rows)
    assert rows[f"{source}/{SHOWN}2.jpg"] == "empty" and rows[f"{source}/pipe.jpg"] == "is not a file"
    assert rows[f"{source}/{SHOWN}.jpg"] == f"near-duplicate of {source}/0000.jpg"
    assert "16 times longer than wide" in rows[f"{source}/long.png"] and "2 HEIC" in capsys.readouterr().out


def test_hashes_of_a_folder_without_a_readable_image_are_an_error(tmp_path):
    write_files(tmp_path, {f"{folder}/a.jpg": b"" for folder in images.FOLDERS.values()})
    with pytest.raises(ladder.Failed, match="no image that can be read"):
        ladder.write_hashes("phash", tmp_path, tmp_path / "h.h5")


# ---------------------------------------------------------------------------------------------------------------------
# Blank images, and whole runs


@pytest.mark.parametrize("flags, pairs, marked", [([], 2, 1), (["--threshold", "-0.1"], 1, 0)])
def test_a_blank_image_is_no_sure_copy_of_another(tmp_path, capsys, flags, pairs, marked):
    rows = np.eye(4, 8, dtype=np.float32)
    rows[1], rows[3] = rows[0], rows[2]
    write_descriptors(tmp_path / "d.h5", {"reference": (rows, ["a", "b", "white", "paper"])}, {})
    images.write_skipped(tmp_path / "blank.csv", [(f"input/reference_images/{name}.png", images.BLANK)
                                                  for name in ("white", "paper")])
    assert find_copies.main([str(tmp_path / "d.h5"), "-o", str(tmp_path / "r"), "--topk", "1", *flags]) == 0
    with open(tmp_path / "r" / "pairs.csv", newline="") as file:
        found = {(row["query_id"], row["reference_id"]): row["blank"] for row in csv.DictReader(file)}
    assert len(found) == pairs and found["a", "b"] == "" and list(found.values()).count("yes") == marked
    assert "1 pairs with an image of one flat colour" in capsys.readouterr().out
    page = (tmp_path / "r" / "index.html").read_text()
    assert '["paper",null,null,1,' in page and '["a",null,null,0,' in page


def hostile_folder(folder):
    """Ten drawn images and, of each kind that a run has to live with, some."""
    draw_images(folder, 10, name="P{}.jpg")
    write_files(folder, {f"{RAW}.jpg": (folder / "P0.jpg").read_bytes(), f"{RAW}2.jpg": b"", "a.heic": b"",
                         "float": GREYS["float 0..1"], "e.jpg": UPRIGHT["unknown type"], "line.png": SAME["baseline"],
                         "w.png": saved(Image.new("RGB", (60, 60), "white"), "PNG"), "thumb/P0.jpg": JPEG,
                         "b.png": saved(Image.new("RGB", (50, 60), "white"), "PNG"),
                         "long.png": REFUSED["60,000 x 1"][0], "ps.jpg": REFUSED["postscript"][0]})
    os.mkfifo(folder / "pipe.jpg")
    return folder


ENVIRONMENT = {"PYTHONIOENCODING": "utf-8:strict"}
SKIPPED = {f"{SHOWN}2.jpg", "long.png", "ps.jpg", "pipe.jpg", "a.heic"}


def test_an_extraction_of_a_hostile_folder(tmp_path, weights, exp):
    hostile_folder(tmp_path / "reference_images")
    done = run("train.py", "--mode", "extract", "--weight", weights, "--exp", exp, "--target-set", "r", "-j", 1,
               "--exif-transpose", "--calibrate", 10, "--exclude", "thumb", tmp_path, env=ENVIRONMENT)
    out = Path(exp) / "extract"
    assert {Path(path).name for path, _ in images.read_skipped(out / "skipped.csv")} == SKIPPED
    assert {Path(path).name for path, _ in images.read_skipped(out / "blank.csv")} == {"w.png", "b.png"}
    with h5py.File(out / "fb-isc-submission.h5") as file:
        ids = file["reference_ids"].asstr()[:].tolist()
    assert sorted(ids) == sorted([*(f"P{i}" for i in range(10)), SHOWN, "float", "e", "line", "w", "b"])
    assert "5 skipped (1 HEIC, 1 PostScript: not read here)" in done.stdout and "2 of one flat colour" in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_a_training_on_a_hostile_folder(tmp_path, exp):
    folder = hostile_folder(tmp_path / RAW)
    done = run("train.py", "-a", "test_efficientnet", "--no-pretrained", "--input-size", 32, "-b", 8, "--epochs", 1,
               "--memory-size", 16, "-j", 1, "--device", "cpu", "--seed", 1, "--exp", exp, "--exif-transpose",
               "--exclude", "thumb", folder, env=ENVIRONMENT)
    out = Path(exp) / "train"
    assert (out / "checkpoint_0000.pth.tar").is_file() and "1 HEIC: not read here" in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert {Path(path).name for path, _ in images.read_skipped(out / "skipped.csv")} <= SKIPPED


def test_copies_in_a_hostile_folder(tmp_path, weights):
    folder = hostile_folder(tmp_path / "images")
    done = run("scripts/find_copies.py", folder, "-o", tmp_path / "r", "--weight", weights, "--threshold", -0.001,
               "--exclude", "thumb", "--", "-j", 1, "--exif-transpose", env=ENVIRONMENT)
    with open(tmp_path / "r" / "pairs.csv", newline="") as file:
        assert {(row["query_id"], row["reference_id"]) for row in csv.DictReader(file)} == {
            (f"{folder}/e.jpg", f"{folder}/line.png"), (f"{folder}/P0.jpg", f"{folder}/{SHOWN}.jpg")}
    assert "1 pairs with an image of one flat colour left out" in done.stdout and "1 HEIC" in done.stdout
    assert {Path(path).name for path, _ in images.read_skipped(tmp_path / "r" / "skipped.csv")} == SKIPPED
