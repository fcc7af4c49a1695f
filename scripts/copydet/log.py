"""The log of a training run."""
import csv
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from copydet.common import replacing


class Log:
    """Progress bar, exp/NAME/train/log.csv and TensorBoard; entries after step `start` are from a lost run."""

    COLUMNS = ("epoch", "step", "loss", "lr", "images_per_s", "wait_share")

    def __init__(self, folder: Path, start: int) -> None:
        self.file = folder / "log.csv"
        lines = self.file.read_text(errors="replace").splitlines()[1:] if start and self.file.is_file() else []
        rows = [row for row in csv.reader(lines) if len(row) == 6 and row[1].isdecimal() and int(row[1]) <= start]
        with replacing(self.file) as temporary, open(temporary, "w", newline="") as out:
            csv.writer(out).writerows([self.COLUMNS, *rows])
        self.board = SummaryWriter(folder, purge_step=start + 1)

    def write(self, bar: tqdm, *values: float) -> None:
        """Show an entry, values of COLUMNS in that order, beside the progress bar and append it to both logs."""
        row = dict(zip(self.COLUMNS, values))
        bar.set_postfix_str(f"loss {row['loss']:.4f}, lr {row['lr']:.2g}, {row['images_per_s']:.0f} images/s, waiting "
                            f"for data {row['wait_share']:.0%}", refresh=False)
        with open(self.file, "a", newline="") as out:
            csv.writer(out).writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])
        for name in self.COLUMNS[2:]:
            self.board.add_scalar(name, row[name], row["step"])
