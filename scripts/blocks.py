"""Blocks of an extraction on disk: what is finished survives a kill, and memory does not grow with the photos.

Photos are cut into batches in their order, batches into blocks; process p of P does blocks p, p + P, ... Batches are
the same for any number of processes with one batch size, and so are the rows.
"""
import json
import shutil
import zipfile

import numpy as np

from descriptors import InputError, replacing

PHOTOS_PER_BLOCK = 4096


class Blocks:
    """Blocks of `count` photos in `folder`, a file each.

    Attributes: todo: this process's blocks that are not finished, lists of ranges of photo indices, one per batch.
    """

    def __init__(self, folder, name, count, batch, process, processes):
        self.folder, self.name = folder, name
        batches = [range(i, min(i + batch, count)) for i in range(0, count, batch)]
        size = max(1, min(PHOTOS_PER_BLOCK // batch, len(batches) // (16 * processes)))  # a kill costs 1/16 at most
        self.blocks = [batches[i:i + size] for i in range(0, len(batches), size)]
        self.todo = [block for block in self.blocks[process::processes] if not self.file(block).is_file()]

    def file(self, block):
        return self.folder / f"{self.name}.{block[0].start}-{block[-1].stop}.npz"

    def write(self, block, rows, indices, bad):
        """Finish a block: rows [n, dim], their photos' indices [n], unreadable ones [(index, reason)]."""
        with replacing(self.file(block)) as temporary, open(temporary, "wb") as out:
            np.savez(out, rows=rows, indices=indices, bad=json.dumps(bad))

    def read(self, block):
        try:
            with np.load(self.file(block)) as file:
                return file["rows"], file["indices"], [tuple(entry) for entry in json.loads(str(file["bad"]))]
        except (OSError, ValueError, zipfile.BadZipFile):
            raise InputError(f"{self.file(block)} cannot be read; delete it and go on with --resume auto") from None

    def collect(self):
        """All finished rows [n, dim] as a memory map, their photos' indices [n], unreadable ones [(index, reason)]."""
        rows, indices, bad, done = None, [], [], 0
        for block in self.blocks:
            part, some, unreadable = self.read(block)
            if rows is None:
                rows = np.lib.format.open_memmap(self.folder / f"{self.name}.npy", "w+", np.float32,
                                                 (self.blocks[-1][-1].stop, part.shape[1]))
            rows[done:done + len(some)] = part
            done += len(some)
            indices.append(some)
            bad += unreadable
        return rows[:done], np.concatenate(indices), bad


def open_folder(folder, settings, resume):
    """Make the folder of blocks, or take up the one that is there if `resume`. Call it in one process.

    Raises InputError if its blocks were made with other settings.
    """
    file = folder / "settings.json"
    if not (resume and file.is_file()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(settings))
        return
    before = json.loads(file.read_text())
    differ = [f"{name} {before.get(name)} -> {value}" for name, value in settings.items() if before.get(name) != value]
    if differ:
        raise InputError(f"--resume auto: {folder} holds an extraction with other settings ({'; '.join(differ[:3])}); "
                         "without --resume it starts anew")
