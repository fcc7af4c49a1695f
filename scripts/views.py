"""Views of training photos: the operations, pipelines of them, and the data set that applies them.

A pipeline is a text: `crop:0.2=1 [jitter:0.4:0.4:0.4:0.1=0.8 gray] erase` is a crop to 0.2..1 of the area, always, then
in random order a colour jitter with probability 0.8 and a grey conversion, then an erased rectangle, both with the
default probability. Every random choice comes from one generator per view, never from a global one, so a view depends
on (seed, epoch, photo, view number) only. Distributions: notes v8..v86, augly 0.1.2, torchvision 0.10.
"""
import functools
import inspect
import math
import os
import re
from pathlib import Path

import augly.image as imaugs
import augly.utils
import numpy as np
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter

from descriptors import InputError, replacing
from photos import UNREADABLE, open_photo

EDGE_FILTERS = (ImageFilter.EDGE_ENHANCE, ImageFilter.EDGE_ENHANCE_MORE)
OPS = {  # name -> operation of a view: (RGB image, numpy Generator, Views, parameters...) -> image; erase: on a tensor
    "clean": lambda img, rng, v: v.resize(img, v.size),
    "crop": lambda img, rng, v, smallest: random_resized_crop(img, rng, v.size, smallest),
    "overlay-crop": lambda img, rng, v, smallest, prob, low, high, opacity: overlay_and_crop(
        img, rng, v, smallest, prob, low, high, opacity),
    "jitter": lambda img, rng, v, brightness, contrast, saturation, hue: color_jitter(
        img, rng, brightness, contrast, saturation, hue),
    "saturation": lambda img, rng, v, factor: TF.adjust_saturation(img, factor),
    "brightness": lambda img, rng, v, low, high: TF.adjust_brightness(img, rng.uniform(low, high)),
    "pixelize": lambda img, rng, v: imaugs.pixelization(img, ratio=max(rng.uniform(0.1, 1), 1 / min(img.size))),
    "shuffle": lambda img, rng, v: shuffle_pixels(img, rng, 0.1),
    "jpeg": lambda img, rng, v: imaugs.encoding_quality(img, quality=int(rng.choice([10, 20, 30, 50]))),
    "gray": lambda img, rng, v: TF.to_grayscale(img, 3),
    "blur": lambda img, rng, v: imaugs.blur(img, radius=rng.uniform(0.01, 10)),
    "gaussian": lambda img, rng, v: imaugs.blur(img, radius=rng.uniform(0.1, 2)),
    "perspective": lambda img, rng, v: random_perspective(img, rng, 0.5),
    "hflip": lambda img, rng, v: TF.hflip(img),
    "vflip": lambda img, rng, v: TF.vflip(img),
    "rotation": lambda img, rng, v: imaugs.rotate(img, degrees=rng.uniform(0, 180)),
    "edge": lambda img, rng, v: img.filter(EDGE_FILTERS[rng.integers(2)]),
    "text": lambda img, rng, v, fewest=None, most=None, lines=1: overlay_text(img, rng, fewest, most, lines),
    "emoji": lambda img, rng, v: overlay_emoji(img, rng),
    "screenshot": lambda img, rng, v: overlay_onto_screenshot(img, rng),
    "overlay": lambda img, rng, v: overlay_onto_photo(img, rng, v),
    "erase": lambda tensor, rng, v: random_erasing(tensor, rng),
}


def parse_ops(text, default_prob, flag="view"):
    """'a:1:2=0.5 [b c]' -> [[('a', (1.0, 2.0), 0.5)], [('b', (), default), ('c', (), default)]]: groups in order, the
    operations inside a group in random order. Raises InputError naming `flag`."""
    groups, inside = [], False
    for word in text.replace("[", " [ ").replace("]", " ] ").split():
        if word in "[]":
            if inside == (word == "["):
                raise InputError(f"{flag}: brackets do not match in '{text}'")
            inside = word == "["
            groups += [[]] if inside else []
            continue
        name, _, prob = word.partition("=")
        name, *parameters = name.split(":")
        if name not in OPS:
            raise InputError(f"{flag}: unknown operation '{name}'; there are {', '.join(OPS)}")
        try:
            op = (name, tuple(map(float, parameters)), float(prob) if prob else default_prob)
        except ValueError:
            raise InputError(f"{flag}: '{word}' is not name[:number...][=probability]") from None
        try:
            inspect.signature(OPS[name]).bind(None, None, None, *parameters)
        except TypeError:
            wanted = ":".join([name, *list(inspect.signature(OPS[name]).parameters)[3:]])
            raise InputError(f"{flag}: '{word}' is not {wanted}") from None
        if inside:
            groups[-1].append(op)
        else:
            groups.append([op])
    if inside:
        raise InputError(f"{flag}: brackets do not match in '{text}'")
    return groups


def random_resized_crop(img, rng, size, smallest):
    """Crop of `smallest`..1 of the area at aspect ratio 3/4..4/3, resized to a square of `size`."""
    for _ in range(10):
        area = img.width * img.height * rng.uniform(smallest, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= img.width and 0 < h <= img.height:
            top, left = rng.integers(img.height - h + 1), rng.integers(img.width - w + 1)
            return TF.resized_crop(img, top, left, h, w, [size, size])
    w, h = min(img.width, round(img.height * 4 / 3)), min(img.height, round(img.width * 4 / 3))
    return TF.resize(TF.center_crop(img, [h, w]), [size, size])


def color_jitter(img, rng, brightness, contrast, saturation, hue):
    """Brightness, contrast and saturation by a factor of 1 +- strength, hue by +- strength turns, in random order."""
    steps = [(TF.adjust_brightness, rng.uniform(max(0, 1 - brightness), 1 + brightness)),
             (TF.adjust_contrast, rng.uniform(max(0, 1 - contrast), 1 + contrast)),
             (TF.adjust_saturation, rng.uniform(max(0, 1 - saturation), 1 + saturation)),
             (TF.adjust_hue, rng.uniform(-hue, hue))]
    for i in rng.permutation(4):
        img = steps[i][0](img, steps[i][1])
    return img


def shuffle_pixels(img, rng, share):
    """Permute a `share` of the pixels among themselves. AugLy's does it after seeding numpy with the constant 10."""
    pixels = np.array(img).reshape(-1, 3)
    chosen = rng.choice(len(pixels), int(share * len(pixels)), replace=False)
    pixels[chosen] = pixels[rng.permutation(chosen)]
    return Image.fromarray(pixels.reshape(img.height, img.width, 3))


def random_perspective(img, rng, distortion):
    """Each corner moves inwards by up to `distortion` of half the side; uncovered pixels are black."""
    (w, h), d = img.size, distortion / 2
    dx, dy = rng.integers(0, int(w * d) + 1, 4), rng.integers(0, int(h * d) + 1, 4)
    corners = [[0, 0], [w - 1, 0], [w - 1, h - 1], [0, h - 1]]
    moved = [[dx[0], dy[0]], [w - 1 - dx[1], dy[1]], [w - 1 - dx[2], h - 1 - dy[2]], [dx[3], h - 1 - dy[3]]]
    return TF.perspective(img, corners, [[int(x), int(y)] for x, y in moved])


def overlay_text(img, rng, fewest=None, most=None, lines=1):
    """Five characters of augly's default font (notes v8); with `fewest` and `most`, that many of a random font's own
    characters in each of 1..`lines` lines (v48, v50). Random colour, starting in the upper left quarter."""
    font = dict(font_size=rng.uniform(0.1, 0.3), color=tuple(rng.integers(0, 256, 3).tolist()))
    x, y = rng.uniform(0, 0.5), rng.uniform(0, 0.5)
    if fewest is None:
        return imaugs.overlay_text(img, text=rng.integers(1, 1000, 5).tolist(), x_pos=x, y_pos=y, **font)
    file = rng.choice(fonts())
    for line in range(rng.integers(1, int(lines) + 1)):
        text = rng.integers(0, 2**31, rng.integers(int(fewest), int(most or fewest) + 1)).tolist()  # augly takes the remainder
        img = imaugs.overlay_text(img, text=text, x_pos=x, y_pos=y + line * font["font_size"], font_file=file, **font)
    return img


@functools.cache
def fonts():
    """Files of augly's fonts but for two that cannot be used (notes v48)."""
    names = Path(augly.utils.FONT_LIST_PATH).read_text(encoding="utf-8").split()
    names = sorted(Path(name).name for name in names if not re.search("TypeMyMusic|PainttheSky-Regular", name))
    return [os.path.join(augly.utils.FONTS_DIR, name) for name in names]


def overlay_emoji(img, rng):
    folder = Path(augly.utils.SMILEY_EMOJI_DIR)
    emoji = sorted(os.listdir(folder))
    return imaugs.overlay_emoji(img, emoji_path=str(folder / emoji[rng.integers(len(emoji))]),
                                emoji_size=rng.uniform(0.1, 0.3), x_pos=rng.uniform(0, 1), y_pos=rng.uniform(0, 1))


def overlay_onto_screenshot(img, rng):
    template = Path(augly.utils.SCREENSHOT_TEMPLATES_DIR) / ("web.png", "mobile.png")[rng.integers(2)]
    return imaugs.overlay_onto_screenshot(img, template_filepath=str(template)).convert("RGB")


def overlay_onto_photo(img, rng, views):
    """Paste the photo onto another training photo, 0.1..0.5 of its height (notes v32)."""
    return imaugs.overlay_image(views.random_photo(rng), overlay=img, overlay_size=rng.uniform(0.1, 0.5),
                                x_pos=rng.uniform(0, 0.5), y_pos=rng.uniform(0, 0.5))


def overlay_and_crop(img, rng, views, smallest, prob, low, high, opacity):
    """With `prob` one of the photo and another training photo is pasted into the other: `low`..`high` of its height,
    opacity from `opacity` up; then a crop of at least 0.7. Otherwise a crop of at least `smallest` (notes v79)."""
    if rng.random() >= prob:
        return random_resized_crop(img, rng, views.size, smallest)
    photos = [img, views.random_photo(rng)]
    below, above = photos if rng.random() < 0.5 else photos[::-1]
    size = rng.uniform(low, high)
    img = imaugs.overlay_image(below, overlay=above, opacity=rng.uniform(opacity, 1), overlay_size=size,
                               x_pos=rng.uniform(0, 1 - size), y_pos=rng.uniform(0, 1 - size))
    return random_resized_crop(img, rng, views.size, 0.7)


def random_erasing(tensor, rng):
    """A rectangle of 0.02..0.33 of the area, ratio 0.3..3.3, becomes N(0, 1) noise (before normalisation)."""
    _, height, width = tensor.shape
    for _ in range(10):
        area, ratio = height * width * rng.uniform(0.02, 0.33), math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            tensor[:, top:top + h, left:left + w] = torch.from_numpy(rng.standard_normal((3, h, w), dtype=np.float32))
            break
    return tensor


NEGATIVE_LABEL = 10**9  # the first label of negatives, beyond those of any training set


class Views(torch.utils.data.Dataset):
    """Training photos: item (epoch, i) -> views [ncrops + negatives, 3, size, size], their labels, unreadable
    [(path, reason)], failed ops.

    In place of an unreadable photo the next readable one is taken, with its own label. Negatives are whole photos with
    labels of their own (notes v98).
    """

    def __init__(self, args, root, paths, resize, mean, std):
        self.root, self.paths, self.seed, self.ncrops, self.strict = root, paths, args.seed, args.ncrops, args.strict
        self.size, self.resize, self.exif, self.mean, self.std = args.input_size, resize, args.exif_transpose, mean, std
        self.pipelines = [parse_ops(args.view0, args.op_prob), parse_ops(args.view1, args.op_prob)]
        self.negatives, self.negative_photos = args.negatives, args.negative_photos

    def __len__(self):
        return len(self.paths)

    def open(self, i):
        """The image of each view of photo `i`."""
        return [open_photo(os.path.join(self.root, self.paths[i]), self.exif)] * self.ncrops

    def name(self, i):
        return os.path.join(self.root, self.paths[i])

    def random_photo(self, rng):
        images, _, _ = self.open_near(int(rng.integers(len(self.paths))))
        return images[0]

    def open_near(self, i):
        """First readable photo from `i` on: images, its index, unreadable ones [(path, reason)] on the way."""
        unreadable = []
        while len(unreadable) < min(len(self.paths), 100):
            try:
                return self.open(i), i, unreadable
            except UNREADABLE as error:
                unreadable.append((self.name(i), f"{type(error).__name__}: {error}"))
                if self.strict:
                    break
                i = (i + 1) % len(self.paths)
        raise InputError(": ".join(unreadable[0])
                         + (f", nor can the {len(unreadable) - 1} photos after it be read" * (not self.strict)))

    def open_negatives(self, rng):
        """Random negatives [(image, label)] and unreadable ones; labels lie beyond those of all training photos."""
        opened, unreadable = [], []
        for j in rng.permutation(len(self.negative_photos)):
            if len(opened) == self.negatives:
                break
            try:
                opened.append((open_photo(self.negative_photos[j], self.exif), NEGATIVE_LABEL + int(j)))
            except UNREADABLE as error:
                unreadable.append((self.negative_photos[j], f"{type(error).__name__}: {error}"))
        return opened, unreadable

    def view(self, img, epoch, i, number):
        """View `number` of photo `i` as a normalised tensor, and the operations that failed (tiny or odd photos)."""
        rng = np.random.default_rng((self.seed, epoch, i, number))
        failed, is_tensor = [], False
        for group in self.pipelines[min(number, 1)]:
            for k in rng.permutation(len(group)):
                name, parameters, prob = group[k]
                if rng.random() >= prob:
                    continue
                if name == "erase" and not is_tensor:
                    img, is_tensor = TF.to_tensor(img), True
                try:
                    img = OPS[name](img, rng, self, *parameters)
                except (OSError, ValueError, RuntimeError, ZeroDivisionError) as error:
                    failed.append(f"{name}: {error}")
        img = img if is_tensor else TF.to_tensor(img)
        if img.shape[-2:] != (self.size, self.size):
            img = TF.resize(img, [self.size, self.size])
        return TF.normalize(img, self.mean, self.std), failed

    def __getitem__(self, key):
        epoch, i = key
        images, i, unreadable = self.open_near(i)
        views, failed = zip(*(self.view(img, epoch, i, number) for number, img in enumerate(images)))
        views, labels = list(views), [i] * len(views)
        if self.negatives:
            negatives, bad = self.open_negatives(np.random.default_rng((self.seed, epoch, i, self.ncrops)))
            unreadable += bad
            for img, label in negatives:
                views.append(TF.normalize(TF.to_tensor(self.resize(img, self.size)), self.mean, self.std))
                labels.append(label)
        return torch.stack(views), labels, unreadable, sum(failed, [])


class Pairs(Views):
    """Pairs of photos that show the same, `paths` [(query, reference)]: view 0 is made from the query, view 1 from the
    reference (notes v89)."""

    def open(self, i):
        return [open_photo(os.path.join(self.root, path), self.exif) for path in self.paths[i]]

    def name(self, i):
        return " or ".join(os.path.join(self.root, path) for path in self.paths[i])


def collate_views(items):
    """-> images [views * batch, 3, s, s] view after view, labels alike, unreadable photos, failed operations."""
    views, labels, unreadable, failed = zip(*items)
    images = torch.stack(views, 1).flatten(0, 1)
    return images, torch.tensor(labels).T.flatten(), sum(unreadable, []), sum(failed, [])


class EpochBatches(torch.utils.data.Sampler):
    """This process's batches of (epoch, photo index); the order depends on (seed, epoch) only, the tail is dropped.

    An epoch ends after `limit` steps, if that is not 0. Set `epoch` and `start` (steps already done) before each pass.
    """

    def __init__(self, count, batch, seed, rank, world, limit=0):
        self.count, self.batch, self.seed, self.rank, self.world, self.limit = count, batch, seed, rank, world, limit
        self.epoch = self.start = 0

    def steps(self):
        whole = self.count // (self.batch * self.world)
        return min(whole, self.limit) if self.limit else whole

    def __len__(self):
        return self.steps() - self.start

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        for step in range(self.start, self.steps()):
            first = (step * self.world + self.rank) * self.batch
            yield [(self.epoch, int(i)) for i in order[first:first + self.batch]]


def write_views_png(views, file):
    """Eight photos in rows: as they are, then their views of the first epoch, so that one look shows what is seen."""
    rows = []
    for i in np.linspace(0, len(views) - 1, min(8, len(views))).astype(int):
        images, i, _ = views.open_near(int(i))
        tensors = [TF.to_tensor(TF.resize(images[0], [views.size, views.size]))]
        for number, img in enumerate(images):
            view, _ = views.view(img, 0, i, number)
            tensors.append(view * torch.tensor(views.std)[:, None, None] + torch.tensor(views.mean)[:, None, None])
        rows += tensors
    grid = torchvision.utils.make_grid(torch.stack(rows), nrow=1 + views.ncrops, pad_value=1)
    with replacing(file) as temporary:
        TF.to_pil_image(grid.clamp(0, 1)).save(temporary, "PNG")


class WholePhotos(torch.utils.data.Dataset):
    """Item i -> i, whole photo as a normalised tensor [3, size, size] or None, reason why not."""

    def __init__(self, args, paths, resize, mean, std):
        self.paths, self.exif, self.size, self.resize = paths, args.exif_transpose, args.input_size, resize
        self.mean, self.std = mean, std

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            img = open_photo(self.paths[i], self.exif)
            return i, TF.normalize(TF.to_tensor(self.resize(img, self.size)), self.mean, self.std), None
        except UNREADABLE as error:
            return i, None, f"{type(error).__name__}: {error}"


def collate_photos(items):
    good = [(i, tensor) for i, tensor, reason in items if reason is None]
    images = torch.stack([tensor for _, tensor in good]) if good else None
    return [i for i, _ in good], images, [(i, reason) for i, _, reason in items if reason is not None]
