"""--weight FILE of any kind: our exports, other programs' ONNX and TorchScript, in every tool; what is refused."""
import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

import copydet
import find_copies
import train
from copydet import cache as cached
from copydet import load_descriptor
from copydet.checkpoints import take_source
from copydet.common import InputError
from copydet.descriptors import Descriptors
from copydet.options import parse_args
from helpers import data_folder, draw_images, run_here

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
KNOWN = {"input_size": 32, "resize": "square", "mean": MEAN, "std": STD}
SIZE = ["--input-size", "32", "--resize", "square"]
# Graphs of which one knows what they give: of each channel the largest value and the mean
FLOAT = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 3, h, w] images) => (float[n, 6] rows) {
    most = GlobalMaxPool (images)  mean = GlobalAveragePool (images)
    both = Concat <axis = 1> (most, mean)  rows = Flatten (both) }"""
BYTES = FLOAT.replace("float[n, 3, h, w] images", "uint8[n, h, w, 3] bytes").replace(
    "most =", "turned = Transpose <perm = [0, 3, 1, 2]> (bytes)  images = Cast <to = 1> (turned)  most =")


class Pools(torch.nn.Module):
    def forward(self, images):
        return torch.cat([images.amax((2, 3)), images.mean((2, 3))], 1)


class PoolsOfBytes(torch.nn.Module):
    def forward(self, images):
        images = torch.conv2d(images.permute(0, 3, 1, 2).float(), torch.eye(3).view(3, 3, 1, 1))
        return {"rows": torch.cat([images.amax((2, 3)), images.mean((2, 3))], 1)}


class OneByOne(torch.nn.Module):
    def forward(self, images):
        return torch.cat([images.amax((2, 3)), images.mean((2, 3))], 1).reshape(1, 6)


class Trained(torch.nn.Module):
    """What its rows are depends on the other images of the batch."""

    def forward(self, images):
        rows = torch.cat([images.amax((2, 3)), images.mean((2, 3))], 1)
        return rows if len(rows) == 1 else rows - rows.mean(0)


def onnx_file(path, text, **metadata):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = onnx.parser.parse_model(text)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def script_file(path, module):
    torch.jit.save(torch.jit.script(module), path)
    return path


def pools(pixels, mean=(0, 0, 0), std=(1 / 255,) * 3):
    """The same of an image, uint8 [3, h, w], of unit length."""
    values = (pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    row = torch.cat([values.amax((1, 2)), values.mean((1, 2))])
    return (row / row.norm()).float().numpy()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = draw_images(tmp_path_factory.mktemp("photos"), 5)
    for i, size in enumerate([(64, 48), (40, 90)]):
        Image.open(folder / f"000{i}.jpg").resize(size).save(folder / f"000{i}.jpg", quality=95)
    return sorted(folder.iterdir())


def pixels_of(images, sides=(32, 32)):
    return [TF.resize(TF.pil_to_tensor(Image.open(path)), list(sides)) for path in images]


# ---------------------------------------------------------------------------------------------------------------------
# Other programs' files


@pytest.mark.parametrize("make, settings", [
    (lambda p: onnx_file(p / "a.onnx", FLOAT), KNOWN),
    (lambda p: onnx_file(p / "a.onnx", FLOAT.replace("[n, 3, h, w]", "[1, 3, 32, 32]").replace("[n, 6]", "[1, 6]")),
     {**KNOWN, "input_size": None}),
    (lambda p: onnx_file(p / "a.onnx", FLOAT.replace("[n, 3", "[4, 3").replace("[n, 6]", "[4, 6]")), KNOWN),
    (lambda p: script_file(p / "a.pt", Pools()), KNOWN | {"allow_code": True}),
    (lambda p: script_file(p / "a.pth", OneByOne()), KNOWN | {"allow_code": True}),
    (lambda p: script_file(p / "a.bin", Trained()), KNOWN | {"allow_code": True}),
    (lambda p: onnx_file(p / "a.onnx", BYTES), {"input_size": 32, "resize": "square"}),
    (lambda p: onnx_file(p / "a.onnx", BYTES), {"preset": "sscd", "input_size": 32}),
    (lambda p: script_file(p / "a.pt", PoolsOfBytes()), {"input_size": 32, "resize": "square", "allow_code": True}),
], ids=["onnx", "fixed, 1 at a time", "4 at a time", "torchscript", "reshaped to 1", "mixes a batch", "bytes",
        "bytes, preset", "torchscript bytes"])
def test_networks_of_other_programs_describe(tmp_path, images, make, settings):
    """What the graph gives for pixels made with torchvision, whatever the form of its input."""
    normalisation = (MEAN, STD) if "mean" in settings else ()
    expected = np.stack([pools(x, *normalisation) for x in pixels_of(images)])
    settings = {name: value for name, value in settings.items() if value is not None}
    rows = load_descriptor(make(tmp_path), **settings)(images)
    assert rows.dtype == np.float32 and rows.shape == (5, 6) and np.allclose(rows, expected, atol=1e-5)


def test_resize_short_keeps_the_aspect(tmp_path, images):
    file = script_file(tmp_path / "a.pt", Pools())
    rows = load_descriptor(file, **KNOWN | {"resize": "short"}, allow_code=True)(images)
    for i, sides in enumerate([(32, 42), (72, 32), (32, 32)]):  # of 64 x 48, 40 x 90 and 64 x 64
        assert np.allclose(rows[i], pools(*pixels_of(images[i:i + 1], sides), MEAN, STD), atol=1e-5), i
    long = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 400, 3), dtype=np.uint8))
    expected = pools(TF.resize(TF.pil_to_tensor(long), [32, 128]), MEAN, STD)  # 4 times the shorter side at most
    assert np.allclose(load_descriptor(file, **KNOWN | {"resize": "short"}, allow_code=True)([long])[0], expected,
                       atol=1e-5)


def test_extraction_says_what_made_the_rows(tmp_path, images, exp):
    data = data_folder(tmp_path / "data")
    Image.open(data / "query_images" / "Q00000.jpg").crop((0, 0, 64, 40)).save(data / "query_images" / "Q00000.jpg")
    file = onnx_file(tmp_path / "net.onnx", FLOAT)
    flags = ["--mode", "extract", "--weight", str(file), "-j", "0", "-b", "4", "--exp", exp]
    train.main(parse_args([*flags, *SIZE, "--mean", "0.5", "--std", "0.2,0.3,0.4", str(data)]))
    h5 = Path(exp) / "extract" / "fb-isc-submission.h5"
    with Descriptors(h5) as found:
        about, rows = found.attrs, found["query"].read()
        assert (found["query"].shape, found["reference"].shape) == ((6, 6), (10, 6))
    expected = [pools(x, [0.5] * 3, STD) for x in pixels_of(sorted((data / "query_images").iterdir()))]
    assert np.allclose(rows, expected, atol=1e-5)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (about["checkpoint"], about["checkpoint_sha256"], about["file_sha256"]) == (str(file), sha256, sha256)
    assert (about["input_size"], about["resize"], json.loads(about["mean"]), json.loads(about["std"])) == (
        32, "square", [0.5] * 3, STD)
    assert "arch" not in about and "gem_eval_p" not in about and "onnxruntime" in json.loads(about["versions"])
    train.main(parse_args([*flags, "--preset", "sscd", "--input-size", "32", "--target-set", "q", str(data)]))
    with Descriptors(h5) as found:  # rows of another normalisation are not put beside them
        assert found.attrs["preset"] == "sscd" and list(found.groups) == ["query"]
    assert len(list(h5.parent.glob("fb-isc-submission.*.h5"))) == 1
    train.main(parse_args([*flags[:-1], f"{exp}-short", *SIZE[:3], "short", "--mean", "0.5", "--std", "0.2,0.3,0.4",
                           str(data)]))
    with Descriptors(f"{exp}-short/extract/fb-isc-submission.h5") as found:  # images of two sizes in a batch
        wide, square = found["query"].read()[:2]
    paths = sorted((data / "query_images").iterdir())
    assert np.allclose(wide, pools(*pixels_of(paths[:1], (32, 51)), [0.5] * 3, STD), atol=1e-5)
    assert np.allclose(square, expected[1], atol=1e-5)


def test_find_copies_with_a_network_of_another_program(tmp_path):
    file = onnx_file(tmp_path / "net.onnx", FLOAT.replace("float[n, 6] rows", "float[n, 9] rows").replace(
        "both = Concat <axis = 1> (most, mean)", "less = Neg (images)  least = GlobalMaxPool (less)  "
        "both = Concat <axis = 1> (most, mean, least)"))
    folder = draw_images(tmp_path / "photos", 24, seed=7)
    for i in range(2):
        Image.open(folder / f"000{i}.jpg").save(folder / f"copy{i}.jpg", quality=90)
    assert find_copies.main([str(folder), "-o", str(tmp_path / "report"), "--weight", str(file), "--", "--mean", "0.5",
                             "--std", "0.25", "-j", "1", *SIZE]) == 0
    with open(tmp_path / "report" / "pairs.csv", newline="") as lines:
        best = list(csv.DictReader(lines))[:2]
    assert {Path(row[name]).name for row in best for name in ("query_id", "reference_id")} == {
        "0000.jpg", "0001.jpg", "copy0.jpg", "copy1.jpg"}
    assert all(0 <= float(row["precision"]) <= 1 for row in best)


# ---------------------------------------------------------------------------------------------------------------------
# What is told before work starts

SCALAR = "float[n, 3, h, w] images, float[1] scale"
REFUSED = {  # name -> file, settings, what is said
    "size and normalisation": (FLOAT, {}, "does not say how its images are made: give --input-size, --resize, --mean, "
                                          "--std (or --preset: sscd)"),
    "resize of a fixed size": (FLOAT.replace("h, w", "32, 32"), {"mean": MEAN, "std": STD}, "give --resize (or"),
    "normalisation": (FLOAT, {"input_size": 32, "resize": "square", "std": STD}, "give --mean (or"),
    "of TorchScript": (Pools, {"allow_code": True, "input_size": 32, "resize": "crop"}, "give --mean, --std (or"),
    "for bytes": (BYTES, {}, "give --input-size, --resize (or"),
    "normalisation of bytes": (BYTES, KNOWN, "--mean, --std: FILE takes bytes, uint8 [n, h, w, 3], and normalises"),
    "code": (Pools, KNOWN, "is TorchScript, a program that runs when it is loaded; if you trust whoever made it, add "
                           "--allow-code"),
    "another size": (FLOAT.replace("h, w", "64, 64"), KNOWN, "takes images of 64 x 64 px only, not --input-size 32"),
    "a fixed size and short": (FLOAT.replace("h, w", "32, 32"), KNOWN | {"resize": "short"}, "--resize short"),
    "a size that only shows": (lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 5)),
                               KNOWN | {"allow_code": True}, "cannot describe images of 32 px: "),
    "no square": (FLOAT.replace("h, w", "32, 48"), KNOWN, "not a square"),
    "channels last": (FLOAT.replace("3, h, w", "h, w, 3"), KNOWN, "its input `images` is tensor(float) ['n', 'h', 'w', "
                      "3], neither float32 [n, 3, h, w] nor uint8 [n, h, w, 3]"),
    "channels first": (BYTES.replace("h, w, 3", "3, h, w"), KNOWN, "tensor(uint8) ['n', 3, 'h', 'w'], neither"),
    "grey": (FLOAT.replace("3, h, w", "1, h, w"), KNOWN, "tensor(float) ['n', 1, 'h', 'w'], neither"),
    "doubles": (FLOAT.replace("float[n, 3, h, w] images", "double[n, 3, h, w] doubles").replace(
        "most =", "images = Cast <to = 1> (doubles)  most ="), KNOWN, "tensor(double)"),
    "two inputs": (FLOAT.replace("float[n, 3, h, w] images", SCALAR).replace(
        "rows = Flatten (both)", "flat = Flatten (both)  rows = Mul (flat, scale)"), KNOWN,
        "has 2 inputs (images, scale); a descriptor has one"),
    "two inputs of a script": (lambda: torch.nn.Bilinear(3, 3, 4), KNOWN | {"allow_code": True},
                               "has 2 inputs (input1, input2)"),
    "maps": (FLOAT.replace("(float[n, 6] rows)", "(float[n, 6, 1, 1] rows)").replace("Flatten", "Identity"), KNOWN,
             "cannot describe images of 32 px: for 1 images it gives float32 [1, 6, 1, 1]; a descriptor is one float"),
    "no floats": (FLOAT.replace("(float[n, 6]", "(int64[n, 6]").replace(
        "rows = Flatten (both)", "flat = Flatten (both)  rows = Cast <to = 7> (flat)"), KNOWN, "gives int64 [1, 6]"),
    "two outputs": (FLOAT.replace("(float[n, 6] rows)", "(float[n, 6] rows, float[n, 3] half)").replace(
        "rows = Flatten", "half = Flatten (mean)  rows = Flatten"), KNOWN, "gives float32 [1, 6], float32 [1, 3]; a"),
    "NaN": (FLOAT.replace("rows = Flatten (both)", "flat = Flatten (both)  less = Neg (flat)  sum = Add (flat, less)  "
                          "rows = Div (sum, sum)"), KNOWN, "its output has NaN or infinity"),
    "nothing": (FLOAT.replace("rows = Flatten (both)", "flat = Flatten (both)  rows = Sub (flat, flat)"), KNOWN,
                "its output is 0 everywhere"),
    "a setting of the network": (FLOAT, KNOWN | {"gem_eval_p": 4.0}, "--gem-eval-p 4.0: FILE is a finished network"),
    "no ONNX": (b"no protobuf", KNOWN, "cannot be read as ONNX"),
    "no preset": (FLOAT, {"preset": "clip"}, "preset clip: none of sscd"),
}


@pytest.mark.parametrize("what, settings, words", REFUSED.values(), ids=REFUSED)
def test_what_does_not_work_is_told_in_a_line(tmp_path, what, settings, words):
    if isinstance(what, bytes):
        pytest.importorskip("onnxruntime")
        (file := tmp_path / "a.onnx").write_bytes(what)
    else:
        file = onnx_file(tmp_path / "a.onnx", what) if isinstance(what, str) else script_file(tmp_path / "a.pt", what())
    with pytest.raises(InputError) as error:
        load_descriptor(file, **settings)
    assert words.replace("FILE", str(file)) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flags, words", [
    (["--mode", "extract", "--mean", "0.5,0.5"], "0.5,0.5 is not a number for each of R,G,B"),
    (["--mode", "extract", "--std", "0"], "--std 0,0,0: must be above 0"),
    (["--mode", "extract", "--preset", "clip"], "invalid choice: 'clip'"),
    (["--preset", "sscd"], "--preset: for --mode extract"),
    (["--mode", "export", "--resize", "short"], "--resize short: for --mode extract"),
])
def test_wrong_flags_are_told_before_anything_is_loaded(capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        parse_args(flags)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words in said and len(said.splitlines()) == 1


def test_a_checkpoint_needs_no_preset_and_a_graph_is_not_trained(tmp_path, weights, capsys):
    with pytest.raises(InputError, match="--preset: for a --weight of another program; .*net.pth.tar has its own"):
        load_descriptor(weights, preset="sscd")
    file = script_file(tmp_path / "a.pt", Pools())
    with pytest.raises(InputError, match="a.pt is a finished network"):
        train.main(parse_args(["--weight", str(file), "--exp", str(tmp_path / "run"), "--device", "cpu", "-j", "0",
                               str(draw_images(tmp_path / "photos", 4))]))
    with pytest.raises(InputError, match="b.onnx is a finished network"):
        train.main(parse_args(["--mode", "export", "--weight", str(onnx_file(tmp_path / "b.onnx", BYTES)), "-o",
                               str(tmp_path / "c.onnx")]))


# ---------------------------------------------------------------------------------------------------------------------
# Our exports

CALIBRATION = {"scores": [-1.0, -0.5], "recall": [0.9, 0.5], "false_rate": [1e-3, 1e-6], "copies_ratio": 0.2,
               "photos": "training"}


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory):
    """A checkpoint with a calibration, that was trained on a ground truth."""
    checkpoint = torch.load(weights, weights_only=True)
    checkpoint["args"] |= {"calibrate": 40, "view1": "hflip:p=1", "op_prob": 0.3}
    torch.save(checkpoint | {"calibration": CALIBRATION, "contaminated": "gt.csv", "epoch": 3, "photos": 99},
               file := tmp_path_factory.mktemp("trained") / "net.pth.tar")
    return file


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("form", ["onnx", "torchscript", "safetensors"])
def test_exports_are_taken_up_as_the_checkpoint(trained, tmp_path, images, form):
    if form == "onnx":
        pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    file = tmp_path / ("net" + train.ENDINGS[form])
    train.main(parse_args(["--mode", "export", "--weight", str(trained), "--format", form, "-o", str(file)]))
    assert list(tmp_path.iterdir()) == [file]
    allowed = {"allow_code": True} if form == "torchscript" else {}
    assert np.allclose(load_descriptor(file, **allowed)(images), load_descriptor(trained)(images), atol=1e-5)
    args, source = take_source(parse_args(["--mode", "extract", "x", *["--allow-code"] * len(allowed)]), file)
    assert (source.calibration, source.contaminated, source.arch_tag) == (CALIBRATION, "gt.csv",
                                                                         "test_efficientnet.r160_in1k")
    told = source.provenance
    assert (told["file"], told["epoch"], told["images"], told["loss"]) == ("net.pth.tar", 3, 99, "contrastive")
    assert source.sha256 == hashlib.sha256(trained.read_bytes()).hexdigest()
    assert source.file_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (args.input_size, args.resize, args.calibrate, args.view1, args.op_prob) == (32, "crop", 40, "hflip:p=1",
                                                                                       0.3)
    args, source = take_source(parse_args(["--mode", "extract", "x", "--resize", "square", "--allow-code"]), file)
    assert source.calibration is None and args.resize == "square"  # it was measured with crops
    if form == "safetensors":  # an export of an export says the same
        train.main(parse_args(["--mode", "export", "--weight", str(file), "--format", form, "-o", str(file) + "2"]))
        os.replace(f"{file}2", file)
        again = take_source(parse_args(["--mode", "extract", "x"]), file)[1]
        assert (again.provenance, again.calibration, again.contaminated, again.sha256) == (
            told, CALIBRATION, "gt.csv", hashlib.sha256(trained.read_bytes()).hexdigest())
    else:
        with pytest.raises(InputError, match="--gem-eval-p 3.0: .* is a finished network, which has 5"):
            load_descriptor(file, gem_eval_p=3.0, **allowed)
        with pytest.raises(InputError, match="takes images of 32 x 32 px only"):
            load_descriptor(file, input_size=64, **allowed)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("count", [6, 24], ids=["carried", "measured on the archive"])
def test_find_copies_promises_on_an_export_what_it_does_on_the_checkpoint(trained, tmp_path, monkeypatch, count):
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    monkeypatch.setattr(cached.subprocess, "run", lambda words, stdout: run_here(*words[1:]))  # PyTorch starts once
    archive, query = draw_images(tmp_path / "archive", count), tmp_path / "query.jpg"
    Image.open(archive / "0001.jpg").crop((4, 4, 64, 60)).save(query)
    promises = {}
    for form in ("", *train.ENDINGS):
        file = tmp_path / f"net{train.ENDINGS[form]}" if form else trained
        if form:
            train.main(parse_args(["--mode", "export", "--weight", str(trained), "--format", form, "-o", str(file)]))
        pairs = copydet.find_copies(query, archive, output=tmp_path / f"report{form}", weight=file, no_verify=True,
                               flags=["-j", "0", "--allow-code"])
        promises[form] = {pair.reference: (pair.score, pair.precision) for pair in pairs}
    assert len(promises[""]) == min(count, 10) and all(precision is not None for _, precision in promises[""].values())
    for form, found in promises.items():
        assert found.keys() == promises[""].keys(), form
        assert np.allclose(list(found.values()), [promises[""][name] for name in found], atol=1e-4), form


def test_metadata_that_export_did_not_write_are_refused(tmp_path):
    file = onnx_file(tmp_path / "a.onnx", FLOAT, output=json.dumps("descriptors: "), input_size=json.dumps("big"))
    with pytest.raises(InputError, match="a.onnx: its metadata are not what --mode export writes"):
        load_descriptor(file)
    from safetensors.torch import save_file
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="a.safetensors is not what --mode export writes"):
        load_descriptor(tmp_path / "a.safetensors")
