"""Command lines: train.py's flags, recipes as flags, kinds of numbers.

Imports nothing heavy, so that --help and wrong flags are answered at once. A flag with choices lists their names here;
what stands behind a name is an entry of a table: LOSSES, MINERS, OPTIMIZERS and SCHEDULES in train.py, HEADS in
network.py, RESIZES in augmentations.py, FORMATS in export.py.
"""
from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from copydet.common import ROOT, InputError, check_file, tell
from copydet.machine import count_cores


def recipe_words(file: str | Path) -> list[str]:
    """Words of a recipe, exp/NAME.args: flags, any number per line, # starts a comment. Raises InputError: no such
    file, unreadable, not UTF-8, a quote that does not end."""
    check_file(file)
    try:
        return shlex.split(Path(file).read_text(encoding="utf-8-sig"), comments=True)
    except ValueError as error:
        raise InputError(f"{file} is no recipe: {error}") from None


def split_settings(text: str) -> tuple[str, dict[str, str]]:
    """ "name:key=value,key=value" -> (name, {key: value}): the grammar of augmentations and of post-processing steps.
    InputError names a setting that is not key=value, or is given twice."""
    name, _, rest = text.partition(":")
    settings: dict[str, str] = {}
    for setting in filter(None, rest.split(",")):
        key, equals, value = setting.partition("=")
        if not equals or key in settings:
            raise InputError(f"{text}: '{setting}' is " + ("given twice" if equals else "not key=value"))
        settings[key] = value
    return name, settings


class Parser(argparse.ArgumentParser):
    """argparse that takes -6e-1 for a number, tells a wrong flag in one line, and reads recipes, @FILE, if told to."""
    reads_recipes = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        try:
            if self.reads_recipes:
                words = [flag for word in words for flag in (recipe_words(word[1:]) if word[:1] == "@" else [word])]
        except InputError as error:
            self.error(str(error))
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        tell(message)
        raise SystemExit(2)


def fraction(text: str) -> float:
    """Type of a flag: a number above 0, 1 at most."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def real(text: str) -> float:
    """Type of a flag: a number, neither infinite nor none."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a number")
    return value


def score(text: str) -> float:
    """Type of a flag: a score, minus a squared distance, or above 0 where local features say copy."""
    value = real(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is above 1, which no score is")
    return value


def channels(text: str) -> list[float]:
    """Type of a flag: a number for each of R,G,B, or one for all."""
    values = [real(value) for value in text.split(",")]
    if len(values) not in (1, 3):
        raise argparse.ArgumentTypeError(f"{text} is not a number for each of R,G,B, or one for all")
    return values * (3 // len(values))


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Type of a flag: a whole number from `least` to `most`; larger ones fit into nothing that counts them."""
    def parse(text: str) -> int:
        if not re.fullmatch(r"\+?\d{1,10}", text, re.ASCII) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} to {most:,}")
        return int(text)
    return parse


MOST_PROCESSES = 1024
positive, natural, processes = whole(1), whole(0), whole(1, MOST_PROCESSES)


def parts(text: str) -> int:
    """Type of --accumulate: 0 is auto."""
    return 0 if text == "auto" else positive(text)


def size_in_bytes(text: str) -> int:
    """Type of a flag: "1G", "500M" or a number of bytes."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:].upper(), 1)
    size = int(float(text[:-1] if unit > 1 else text) * unit)
    if size < 2**20:
        raise argparse.ArgumentTypeError(f"{text} is less than 1M")
    return size


# ---------------------------------------------------------------------------------------------------------------------
# train.py

MODERATE = "crop:area=0.5,p=1 hflip:p=0.5"
HARD = ("screenshot:p=0.01 crop:area=0.2,p=1 jitter:brightness=0.4,contrast=0.4,saturation=0.4,hue=0.1,p=0.8 pixelize "
        "shuffle jpeg:p=0.5 gray blur perspective hflip:p=0.5 vflip text emoji erase")
LETTERS = {"q": "query", "r": "reference", "t": "train"}  # --target-set letter -> group of the descriptor file
LEAST_CALIBRATED = 10
# --preset: known networks of other programs, and how their images are made
PRESETS: dict[str, dict[str, Any]] = {
    "sscd": {"input_size": 320, "resize": "square", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
}
OF_OTHERS = ("preset", "mean", "std", "allow_code")  # flags for networks of other programs alone
# group -> rows of (names and metavar, type or choices or bool or list, default, help)
FLAGS: dict[str, list[tuple[str, Any, Any, str]]] = {
    "what to do": [
        ("--mode", ["train", "extract", "export"], "train", "what to do"),
        ("--exp NAME", str, None, "results go to exp/NAME/train and exp/NAME/extract (default: the experiment that "
         "--weight or --resume lies in, else 'default')"),
        ("--seed N", int, None, "seed of weights, order and views (default: drawn and printed)"),
        ("-j --workers N", int, count_cores(), "processes that load images, shared by the devices of this machine"),
        ("-b --batch-size N", int, 512, "train: images per step on this machine, over all its devices, each seen "
         "--ncrops times; extract: images per batch"),
        ("--strict", bool, False, "stop at the first unreadable image instead of skipping it"),
        ("--exclude GLOB", list, [], "leave out images and folders of this name, or of this path below the folder, "
         "such as '*_small.jpg'; can be given again"),
        ("--decode", ["draft", "full"], "draft", "draft: JPEGs no larger than needed; full: whole, by Pillow"),
        ("--exif-transpose", bool, False, "turn images upright by their EXIF tag, which the notes ignore"),
    ],
    "network (extract mode takes these from the checkpoint unless given)": [
        ("-a --arch NAME", str, "resnet50", "timm model, old names too"),
        ("--pool", ["gem", "grid", "conv-gem", "backbone"], "gem", "gem: GeM over the last feature map; grid: means "
         "over the cells of a grid over the maps of --stages, those that flips exchange averaged; conv-gem: GeM over "
         "a 1 x 1 convolution of each of these maps; backbone: the network's own final norm and pooling, as for Swin "
         "in the notes"),
        ("--stages N,N", str, "3", "pool grid, conv-gem: feature maps, 0 the finest; layers after the last one are "
         "left out"),
        ("--grid N", int, 5, "pool grid: N x N cells"),
        ("--width N", int, 512, "pool conv-gem: channels of the convolution"),
        ("--gem-p P", real, 3.0, "GeM exponent in training"),
        ("--gem-eval-p P", real, 4.0, "GeM exponent in extraction"),
        ("--head", ["linear-bn", "deep", "linear", "simsiam", "none"], "linear-bn",
         "from pooled features to descriptor; none: the pooled features"),
        ("--dim N", int, 256, "descriptor dimensions"),
        ("--pred-dim N", int, 512, "head simsiam: hidden dimensions of the predictor"),
        ("--extract-from", ["proj", "pred", "proj+pred"], "proj", "head simsiam: describe by projection, prediction or "
         "their sum"),
        ("--input-size PX", int, 224, "side of the network's square input"),
        ("--eval-input-size PX", int, None, "the same for extraction (default: --input-size)"),
        ("--eval-crops SIDE,SIDE", str, "1", "extraction averages the features of centre crops, sides as fractions of "
         "the input's, all resized to the smallest"),
        ("--resize", ["crop", "square", "short"], "crop", "whole image to square; crop: shorter side to PX + 32, "
         "centre crop (notes v3..v51); square: stretch (v52 on); short, in extraction: no square, the shorter side to "
         "PX and the other in proportion, up to 4 times that"),
        ("--weight FILE", str, None, "checkpoint to extract with (default: the newest of --exp) or to start training "
         "from; it must fit exactly. To extract with also what --mode export wrote, and ONNX or TorchScript of other "
         "programs, images float32 [n, 3, h, w] or uint8 [n, h, w, 3] to float [n, dim]"),
        ("--preset", list(PRESETS), None, "--weight of another program: --input-size, --resize, --mean and --std of a "
         "known network; sscd: 320, square, those of ImageNet"),
        ("--mean R,G,B", channels, None, "--weight of another program: what is taken from pixels, which are 0 to 1"),
        ("--std R,G,B", channels, None, "the same: what they are divided by then"),
        ("--allow-code", bool, False, "load a --weight that is TorchScript: that runs code of whoever made it"),
        ("--backbone-weights FILE", str, None, "timm weights (.pth, .safetensors) to start from instead of a "
         "download; in extract mode: their raw features"),
        ("--no-pretrained", bool, False, "start from random weights"),
    ],
    "training data and views": [
        ("--sample-size N", int, 100_000, "use the first N images in order of their paths"),
        ("--grow-epochs N", int, 0, "double the sample after every N epochs; each time the optimizer, and with arcface "
         "the classes, start anew, and beyond 100,000 images the batch is halved; 0: never (notes v4)"),
        ("--grow-to N", int, 1_000_000, "up to N images"),
        ("--epoch-steps N", int, 0, "an epoch ends after N steps, or when all images were seen; 0: only then"),
        ("--pairs FILE", str, None, "train on the pairs of a ground truth (query_id,reference_id), of DIR's "
         "query_images and reference_images: view 0 from the query, view 1 from the reference; descriptors of such a "
         "network are marked as contaminated"),
        ("--negatives N", int, 0, "add to each image N random ones of --negatives-dir that match nothing"),
        ("--negatives-dir DIR", str, None, "their folder; images that occur in --pairs are left out"),
        ("--ncrops N", int, 2, "views per image"),
        ("--view0 OPS", str, MODERATE, "augmentations of view 0 in order, each name:key=value,key=value,p=probability; "
         "those in [brackets] in random order"),
        ("--view1 OPS", str, HARD, "augmentations of the other views"),
        ("--list-augmentations", bool, False, "print the augmentations with their keys and defaults"),
        ("--op-prob P", real, 0.2, "probability of the augmentations given without one"),
    ],
    "loss and memory": [
        ("--loss", ["contrastive", "triplet", "snr", "ntxent", "ntxent-margin", "arcface", "simsiam"], "contrastive",
         "loss between views of the same and of other images"),
        ("--pos-margin M", real, 0.0, "contrastive, snr: distance up to which positives are close enough"),
        ("--neg-margin M", real, 0.7, "contrastive, snr: distance from which negatives are far enough"),
        ("-m --margin M", real, 0.05, "triplet: margin; arcface: angle in radians; ntxent-margin: taken off the "
         "positives' cosine"),
        ("-s --scale S", real, 30.0, "arcface: factor of the cosines"),
        ("--temperature T", real, 0.1, "ntxent: temperature"),
        ("--miner", ["none", "triplet", "bipartite"], "none", "picks the pairs or triplets that the loss sees; "
         "bipartite: pairs of view 0 with other views"),
        ("--type-of-triplets", ["all", "hard", "semihard", "easy"], "all", "triplet miner: which ones"),
        ("--memory-size N", int, 1024, "descriptors of earlier batches that the loss compares with (cross-batch "
         "memory, arXiv 1912.06798); 0: none"),
        ("--memory-enqueue", ["all", "view0", "crosswise"], "all", "which descriptors enter the memory; view0: those "
         "of view 0, with which the other views are compared; crosswise: a second memory does the reverse"),
        ("--world-scaled-loss", bool, False, "multiply the loss by the number of processes, so that gradients do not "
         "shrink with it as in the notes; arcface and simsiam never do"),
    ],
    "optimisation": [
        ("--epochs N", int, 100, "also the length of the schedule"),
        ("--start-epoch N", int, 0, "first epoch, when not resumed"),
        ("--optimizer", ["sgd", "adamw"], "sgd", "optimizer"),
        ("--lr --learning-rate LR", real, 0.05, "used as given, not scaled by the batch size"),
        ("--lr-schedule", ["cosine", "cosine-iter", "linear", "constant"], "cosine",
         "cosine and linear change per epoch, cosine-iter per step"),
        ("--freeze N", int, 0, "the backbone's parameters up to feature map N - 1 are not trained"),
        ("--momentum M", real, 0.9, "SGD"),
        ("--wd --weight-decay W", real, 1e-4, "on matrices and kernels; not on 1-D parameters, biases and gains"),
        ("--decay-all", bool, False, "weight decay on all parameters (notes v1, v2)"),
        ("--fix-pred-lr", bool, False, "head simsiam: the predictor keeps its first learning rate"),
        ("--batch-norm", ["sync", "local", "shuffled", "frozen"], "sync", "statistics over all GPUs or each its own "
         "(processes without a GPU always have their own); shuffled: its own, of a batch drawn from all processes; "
         "frozen: in the backbone those of its pretraining, in the head its own"),
        ("--accumulate N", parts, 1, "compute a batch that does not fit the device in N parts; loss and memory see it "
         "whole, batch norm the parts; auto: in the fewest that fit into the memory that is free"),
        ("--grad-checkpointing", bool, False, "keep few activations and compute the others twice: less memory, slower"),
        ("--compile", bool, False, "torch.compile the backbone: the first step takes minutes, the others less"),
        ("--amp", ["auto", "off", "bf16", "fp16"], "auto", "precision of the backbone; auto: bf16 on GPUs that "
         "compute in it, fp16 on others, fp32 on CPUs, where bf16 can be slower; head and loss are always in fp32"),
    ],
    "at the end of training": [
        ("--whiten N", int, 0, "fit the head linear-bn anew to the trained backbone: the projection that shrinks what "
         "differs between N training images and edited copies (--view1) of them"),
        ("--calibrate N", int, 0, "keep N images back, and measure the precision at each score on them and edited "
         "copies of them; extract (default: the checkpoint's): on N of the references, at most half; 0: none is "
         "measured"),
    ],
    "checkpoints and log": [
        ("--resume FILE", str, "", "continue from a checkpoint of this script; auto: from the newest of --exp, if any; "
         "extract: auto goes on with an extraction that was stopped"),
        ("--save-steps N", int, 0, "also write latest.pth.tar every N steps; 0: each epoch only"),
        ("--overwrite", bool, False, "replace the checkpoints of another run in exp/NAME/train"),
        ("-p --print-freq N", int, 10, "steps between log entries and checks of the loss and of Ctrl-C"),
    ],
    "extraction": [
        ("--target-set LETTERS", str, "qr", "which folders: q queries, r references, t training images"),
        ("--query-regions WHICH", str, "whole", "describe each query in several regions; its score with a reference is "
         "the best of theirs: whole; 7: also the middle and the halves; 19: also quarters and corners; or boxes "
         "'left,top,right,bottom ...' in fractions of the image"),
        ("--eval-subset", bool, False, "only the references in --subset-file; writes fb-isc-submission-subset.h5"),
        ("--subset-file FILE", str, None, "one reference id per line, by scripts/select_ref_subset.py (default: "
         "DIR/rids_subset.txt)"),
        ("--shard I/N", str, None, "every N-th image of each folder from the I-th on, 0 the first; writes "
         "fb-isc-submission.shard-I-of-N.h5; scripts/merge_shards.py puts the files together"),
        ("--dryrun", bool, False, "the first 100 images of each folder only"),
    ],
    "export": [
        ("--format", ["onnx", "torchscript", "safetensors"], "onnx", "of the file for other programs"),
        ("--half", bool, False, "weights in 16 bits, of .safetensors: half the size"),
        ("-o --output FILE", str, None, "where to (default: exp/NAME/export/descriptor.onnx, .pt or .safetensors)"),
    ],
    "devices and processes (under torchrun its environment decides)": [
        ("--device", ["auto", "cuda", "mps", "cpu"], "auto", "auto: the best there is"),
        ("--gpu N", int, None, "use this GPU only"),
        ("--threads N", int, None, "threads that compute on the CPU (default: OMP_NUM_THREADS of the environment, or "
         "as many as cores); another number changes the last bits of what is trained"),
        ("--multiprocessing-distributed", bool, False, "one process per GPU of this machine; without a GPU --nproc "
         "processes"),
        ("--nproc N", int, None, "number of processes (default: number of GPUs, else 1)"),
        ("--world-size N", int, -1, "number of machines; -1: one"),
        ("--rank N", int, -1, "number of this machine, from 0; -1: 0"),
        ("--dist-url URL", str, "tcp://localhost:10001", "where the processes meet"),
        ("--dist-backend NAME", str, "nccl", "nccl or gloo; always gloo without a GPU"),
    ],
}


def can_be(name: str, value: Any) -> bool:
    """Whether the argument `name` of FLAGS can have a value, by its type alone."""
    kind = next(kind for rows in FLAGS.values() for names, kind, *_ in rows
                if f"--{name.replace('_', '-')}" in names.split())
    if isinstance(kind, list):
        return value in kind
    types: dict = {real: (int, float), bool: bool, int: int, str: str}
    return isinstance(value, types[kind]) and isinstance(value, bool) == (kind is bool)


class Args(argparse.Namespace):
    """A command line, read-only once it is parsed. `vars(args)` is that and nothing else.

    Attributes: given: names of the flags that the user or a recipe set; typed: those that the user typed; recipes:
    files of the recipes.
    """
    __slots__ = ("given", "typed", "recipes")

    def __init__(self, values: dict, given: Iterable[str] = (), typed: Iterable[str] = (),
                 recipes: Iterable[str] = ()) -> None:
        for name, words in (("given", frozenset(given)), ("typed", frozenset(typed)), ("recipes", tuple(recipes))):
            object.__setattr__(self, name, words)
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: a command line is read-only; args.replace(...) gives another one")

    def __reduce__(self) -> tuple:
        return Args, (vars(self), self.given, self.typed, self.recipes)

    def replace(self, **values: Any) -> Args:
        """The command line with other values, given and typed as before."""
        return Args(vars(self) | values, self.given, self.typed, self.recipes)

    def plain(self) -> dict:
        """As plain values: what args.json and checkpoints hold."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}

    @property
    def out(self) -> Path:
        """exp/NAME/MODE; --exp may be a path as well."""
        return ROOT / "exp" / self.exp / self.mode


def build_parser(description: str | None = None) -> Parser:
    """Parser of train.py's command line: FLAGS, DIR and recipes, none of it checked yet."""
    p = Parser(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, description=description)
    p.reads_recipes = True
    p.add_argument("dir", metavar="DIR", nargs="?", help="train: folder of images, nested or not (default: "
                   "input/training_images); extract: folder that holds query_images, reference_images, training_images "
                   "(default: input)")
    for title, rows in FLAGS.items():
        group = p.add_argument_group(title)
        for names, kind, default, text in rows:
            text += "" if default in (None, "", False, []) else " (default: %(default)s)"
            if kind is bool:
                group.add_argument(names, action="store_true", help=text)
            elif kind is list:
                group.add_argument(*names.split()[:-1], metavar=names.split()[-1], action="append", default=default,
                                   help=text)
            elif isinstance(kind, list):
                group.add_argument(names, choices=kind, default=default, help=text)
            else:
                *flags, metavar = names.split()
                group.add_argument(*flags, metavar=metavar, type=kind, default=default, help=text)
    return p


def names_set(words: list[str]) -> list[str]:
    """Names of the arguments that these words set, defaults apart."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return list(vars(parser.parse_args(words)))


def parse_args(argv: list[str] | None = None, description: str | None = None) -> Args:
    """Parse train.py's command line and check what can be checked without torch. What is wrong ends the program."""
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    parser = build_parser(description)
    args = Args(vars(parser.parse_args(argv)), names_set(argv),
                names_set([word for word in argv if not word.startswith("@")]),
                [word[1:] for word in argv if word.startswith("@")])
    try:
        return check_args(args)
    except InputError as error:
        parser.error(str(error))


def check_args(args: Args) -> Args:
    """The command line with its folders filled in. Raises InputError naming the flag that is wrong."""
    for names, least in ((("batch_size", "epochs", "input_size", "sample_size", "dim", "pred_dim", "print_freq",
                          "grid", "width", "threads"), 1),
                         (("workers", "memory_size", "grow_epochs", "epoch_steps", "negatives", "freeze",
                           "whiten", "calibrate", "start_epoch", "seed"), 0)):
        for name in names:
            value = getattr(args, name)
            if value is not None and not least <= value < 2**63:
                raise InputError(f"--{name.replace('_', '-')} must be at least {least}"
                                 + (f", not {value}" if value < least else f", {value} is too large"))
    if args.workers > MOST_PROCESSES:
        raise InputError(f"--workers {args.workers}: at most {MOST_PROCESSES:,}")
    for name in ("gem_p", "gem_eval_p"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name):g}")
    if 0 < args.calibrate < LEAST_CALIBRATED:
        raise InputError(f"--calibrate {args.calibrate}: {LEAST_CALIBRATED} images are the least that tell anything; "
                         "0: no calibration")
    if args.mode != "train" and "weight" not in args.typed:  # a recipe's is what training starts from
        args = args.replace(weight=None)
    for flag in ("weight", "backbone_weights", "resume", "pairs"):
        file = getattr(args, flag)
        if file and file != "auto":
            check_file(file, f"--{flag.replace('_', '-')}")
    if args.std and min(args.std) <= 0:
        raise InputError(f"--std {','.join(map('{:g}'.format, args.std))}: must be above 0")
    if not args.target_set or set(args.target_set) - set(LETTERS):
        raise InputError(f"--target-set must be letters out of q, r, t, not '{args.target_set}'")
    if args.exp is None:
        file = Path(args.weight if args.mode != "train" and args.weight else args.resume).resolve()
        args = args.replace(exp=file.parent.parent.name if file.parent.name == "train" else "default")
    if args.mode == "train":
        args = check_training_flags(args)
    elif args.mode == "extract":
        check_extraction_flags(args)
    if args.mode != "extract":
        for name in OF_OTHERS:
            if name in args.typed:
                raise InputError(f"--{name.replace('_', '-')}: for --mode extract")
        if args.resize == "short":
            raise InputError("--resize short: for --mode extract; what is trained and exported sees squares")
    folder = "input/training_images" if args.mode == "train" and not args.pairs else "input"
    return args.replace(dir=Path(args.dir or folder))


def check_extraction_flags(args: Args) -> None:
    """Raise InputError naming the flag that an extraction cannot do with."""
    if args.resume not in ("", "auto"):
        raise InputError(f"--resume {args.resume}: an extraction goes on with --resume auto; the checkpoint is "
                         "--weight")
    if args.shard and not ((shard := re.fullmatch(r"(\d+)/(\d+)", args.shard)) and int(shard[1]) < int(shard[2])):
        raise InputError(f"--shard {args.shard}: give I/N with I from 0 to N - 1, such as 0/4")


def check_training_flags(args: Args) -> Args:
    """The command line of a training; without a memory where the loss has none. Raises InputError naming the flag that
    is wrong or contradicts another."""
    least = 1 if args.loss == "arcface" else 2
    if args.ncrops < least or (args.pairs and args.ncrops != 2):
        why = "a pair has 2 views" if args.pairs else "an image needs at least 2 views, or there are no positive pairs"
        raise InputError(f"--ncrops {args.ncrops}: {why}")
    if (args.loss == "simsiam") != (args.head == "simsiam"):
        raise InputError(f"--loss {args.loss} with --head {args.head}: simsiam needs both")
    if args.loss in ("arcface", "simsiam"):
        if "memory_size" in args.given and args.memory_size:
            raise InputError(f"--memory-size {args.memory_size}: --loss {args.loss} has no memory; give 0")
        args = args.replace(memory_size=0)
        if args.negatives:
            raise InputError(f"--negatives {args.negatives}: --loss {args.loss} compares no images")
    if args.whiten and args.head != "linear-bn":
        raise InputError(f"--head {args.head}: --whiten is for linear-bn")
    if args.pairs and (args.whiten or args.calibrate or args.pool == "grid"):
        raise InputError("--pairs: --whiten, --calibrate and --pool grid want single images")
    if args.memory_enqueue != "all" and not args.memory_size:
        raise InputError(f"--memory-enqueue {args.memory_enqueue} needs a --memory-size")
    if args.grow_epochs and args.pairs:
        raise InputError("--grow-epochs: pairs do not grow")
    if args.negatives and not args.negatives_dir:
        raise InputError(f"--negatives {args.negatives} needs their folder, --negatives-dir")
    views = args.ncrops + args.negatives
    rows = args.batch_size * views * max(1, args.world_size)
    if 0 < args.memory_size < rows:
        raise InputError(f"--memory-size {args.memory_size} is smaller than one batch of {rows} descriptors "
                         f"(--batch-size {args.batch_size} x {views} views"
                         f"{f' x {args.world_size} machines' * (args.world_size > 1)})")
    return args
