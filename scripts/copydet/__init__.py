"""Image copy detection: everything that train.py and the commands in scripts/ import.

In the order the data flows:

    common          errors in one line, files that appear when they are whole
    record          run.json of a run
    machine         cores and memory that there are
    options         train.py's flags, recipes
    images          find, open and decode images; those of a run
    augmentations   operations on the pixels of one image
    regions         of a query that are described each by itself
    views           the grammar of --view0 and --view1; data sets of views and of whole images
    batches         views on their way to the device: collate, order of the images, loading processes
    distributed     ranks, devices, precision
    network         backbone, pooling, head
    capacity        memory that a network needs
    losses          losses, memory of earlier batches
    whitening       what the head can be fitted to after training
    checkpoints     reading and finding them
    graphs          ONNX and TorchScript as descriptors
    log             of a training run
    extraction      descriptors of all images of a run
    extract         train.py --mode extract where the package is alone
    descriptors     the HDF5 files they are kept in
    calibration     scores to precision
    export          the network for other programs
    search          exact nearest neighbours
    edits           that make a copy of an image, for benchmarks and calibration
    verification    local features of two images, geometry, pixels: a copy, and where
    cache           descriptors of folders that are searched again and again
    copies          collections of images, the pairs between them, verified, and how precise their scores are
    decisions       of people, on pairs
    duplicates      groups within one collection, and which file to keep
    page            what find_copies.py writes
    finding         find_copies.py as a function
    metrics         ground truths, micro-AP, recall at 90 % precision
    report          HTML page and picture of a score

Importing it changes nothing but what is imported.
"""
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copydet.extraction import load_descriptor
    from copydet.finding import find_copies

__all__ = ["find_copies", "load_descriptor"]
__version__ = "1.0"
LATE = {"find_copies": "copydet.finding", "load_descriptor": "copydet.extraction"}  # what they need takes seconds


def __getattr__(name: str) -> Any:
    if name in LATE:
        return getattr(importlib.import_module(LATE[name]), name)
    raise AttributeError(f"module 'copydet' has no attribute '{name}'")
