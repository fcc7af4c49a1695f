#!/usr/bin/env python3
"""Find copies: from two folders of images to a page of answers.

    python scripts/find_copies.py QUERIES ARCHIVE -o report                  what of QUERIES is in ARCHIVE?
    python scripts/find_copies.py image.jpg ARCHIVE -o report                one picture
    python scripts/find_copies.py IMAGES -o report                           near-duplicates within one folder
    python scripts/find_copies.py QUERIES ARCHIVE -o report --exp v31        described by the experiment v31
    python scripts/find_copies.py queries.h5 archive.h5 -o report            descriptor files

Images are described by the network that comes with the project, exp/default.safetensors, unless --exp, --weight or
--backbone-weights names another. train.py does it, with flags of its own after `--`: -- --input-size 448 --device cpu.
What is described stays in the cache: the next run describes only images that are new or changed (size or time; --hash:
content), tries again those that it had no leave or memory to read, and forgets those that are gone. A run that was
killed goes on from its last chunk. --query-regions 7 looks at parts of each query too, for copies that fill a part.

The ten best answers to each query are then verified: local features of both images are compared, and geometry decides
whether the query shows the archive's image (copy), a part of it (shares a part: a logo, text, frame or texture), or
cannot tell (not verifiable: blank, tiny). Precision is measured on edited copies of some images of the archive, which
go the same way as the queries: once, and again when the archive has doubled.

The report is a folder that opens from disk: index.html with thumbnails, and the outline of the archive's image in the
query; pairs.csv; and skipped.csv, the images that could not be read. -o report.zip packs it too, as one file to send.
Within one collection duplicates.txt lists, of each group on the page, the files but for the largest, least compressed,
oldest one; nothing is ever deleted. Decisions made on the page stay in the browser, and are saved as decisions.csv
(query, reference, verdict, score): with --decisions FILE a later run leaves rejected pairs out, and prints how precise
the judged ones were. Search is exact. pairs.csv, best first:

    query_id, reference_id   paths, or ids of descriptor files
    score          above 0, up to 1, for verified copies; else minus the squared L2 distance of the descriptors, nearer
                   to 0 where the images share a part
    blank          yes where an image shows one flat colour: such images are as like to each other as copies are. Where
                   there is a threshold they are left out
    inliers, coverage_query, coverage_reference, verdict, outline   of verification, see verify.py
    region         with --query-regions: that of the query which is nearest; empty: the whole
    precision      fraction of copies among pairs of this score and above
    group          within one collection: number of the group that verified copies link
    same_file      two names of one file, hard or symbolic links, are no copies: they stand last, without a score;
                   within one collection only one of the names is searched
"""
from __future__ import annotations

import argparse
import sys

from copydet.common import run_main
from copydet.finding import ON_PAGE, TOPK, find_copies
from copydet.machine import count_cores
from copydet.options import Parser, fraction, processes, score


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="Flags after -- go to train.py.", allow_abbrev=False)
    parser.add_argument("queries", metavar="QUERIES", help="folder of images, image, or descriptor file")
    parser.add_argument("archive", metavar="ARCHIVE", nargs="?", help="the same; left out: QUERIES within itself, or "
                        "query against reference where a descriptor file holds both")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the report; "
                        "with a name that ends in .zip also that file, of the folder without the ending")
    g = parser.add_argument_group("what describes images")
    g.add_argument("--exp", metavar="NAME", help="the newest checkpoint of exp/NAME")
    g.add_argument("--weight", metavar="FILE", help="this checkpoint, or what else train.py takes: for ONNX or "
                   "TorchScript of other programs with -- --preset NAME, or -- --input-size PX ...")
    g.add_argument("--backbone-weights", metavar="FILE", help="raw features of these weights (with -- -a ARCH)")
    g.add_argument("--cache", metavar="DIR", help="what was described, for any number of reports; can be deleted any "
                   "time (default: cache in the report)")
    g.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave out images and folders of "
                   "this name, or of this path below the folder, such as '*_small.jpg'; can be given again")
    g.add_argument("--hash", action="store_true", help="tell changed images by their content, not by size and time")
    g.add_argument("--query-regions", default="whole", metavar="WHICH", help="describe each query in several regions, "
                   "for copies that fill a part of it: whole, 7, 19, or boxes as train.py takes them (default: whole)")
    g = parser.add_argument_group("pairs")
    g.add_argument("--topk", type=int, default=TOPK, metavar="K", help="answers per query (default: %(default)s)")
    g.add_argument("--threshold", type=score, metavar="SCORE", help="pairs.csv holds pairs from this score on, the "
                   "page starts with it; 0: verified copies (default: all)")
    g.add_argument("--precision", type=fraction, metavar="P", help="the threshold that reaches this precision, as "
                   "measured on edited copies of the archive's images, which takes some hundred of them; of descriptor "
                   "files by their calibration")
    g.add_argument("--copies-ratio", type=fraction, metavar="R", help="fraction of the queries that have a copy, for "
                   "the precision (default: the calibration's)")
    g.add_argument("--no-verify", action="store_true", help="do not compare the images of the best pairs by local "
                   "features and geometry")
    g.add_argument("-j", "--workers", type=processes, default=count_cores(), metavar="N", help="processes that do so "
                   "(default: number of cores)")
    g.add_argument("--pairs", type=int, default=ON_PAGE, metavar="N", help="the best N pairs are on the page (default: "
                   "%(default)s)")
    g.add_argument("--images", "--photos", metavar="DIR", help="folder with query_images and reference_images, for "
                   "thumbnails of descriptor files")
    g.add_argument("--decisions", metavar="FILE", help="decisions.csv as the page saves it: rejected pairs are left "
                   "out, and the precision of the judged ones is printed beside what the calibration promised")
    g.add_argument("--null", action="store_true", help="end the paths in duplicates.txt with a NUL in place of a line "
                   "break, for xargs -0")
    g.add_argument("--ngpu", type=int, default=-1, metavar="N", help="GPUs to search on; 0: CPU; default: all")
    args, unknown = parser.parse_known_args(argv[:at])
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (flags of train.py come after --)")
    args.flags = argv[at + 1:]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    def work() -> None:
        find_copies(**vars(args))

    return run_main(work, "stopped; what was described is kept")


if __name__ == "__main__":
    sys.exit(main())
