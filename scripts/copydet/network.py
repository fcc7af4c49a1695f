"""The network: timm backbone, pooling, head, unit length; and the weights it starts from.

Shapes: images [B, 3, s, s] -> feature map [B, C, h, w] -> pooled features [B, C] -> descriptors [B, dim].
"""
from __future__ import annotations

import collections
import difflib
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.models import load_state_dict as load_timm_file
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from copydet.common import InputError, first_line, first_three
from copydet.options import Args

STANDARDISED = ("grid", "conv-gem")  # poolings over --stages: features get mean 0 and variance 1, maps unit length
CONVS, NORMS = (torch.nn.Conv2d, Conv2dSame), (torch.nn.BatchNorm2d, BatchNormAct2d)  # what is folded, subclasses not


def gem(x: torch.Tensor, p: float, eps: float = 1e-6) -> torch.Tensor:
    """Generalised mean pooling [B, C, H, W] -> [B, C]: (mean of max(x, eps)^p)^(1/p) (arXiv 1711.02512)."""
    return x.clamp(min=eps).pow(p).mean((-2, -1)).pow(1 / p)


def folded_grid(x: torch.Tensor, n: int) -> torch.Tensor:
    """[B, C, h, w] -> [B, C m^2], m = ceil(n / 2): means over the cells of an n x n grid, each averaged with the cells
    that a horizontal, a vertical or both flips put in its place."""
    rows, columns = (F.adaptive_avg_pool1d(torch.eye(size, device=x.device), n).T for size in map(int, x.shape[-2:]))
    fold = lambda cells: (cells + cells.flip(0))[:(n + 1) // 2] / 2
    return (fold(rows) @ x @ fold(columns).T).flatten(1)


def linear_bn(channels: int, dim: int, affine: bool = True) -> list[torch.nn.Module]:
    return [torch.nn.Linear(channels, dim, bias=False), torch.nn.BatchNorm1d(dim, affine=affine)]


def conv_bn_relu(channels: int, width: int) -> torch.nn.Module:
    """A 1 x 1 convolution with batch norm and ReLU: what GeM takes the mean of, of each place by itself."""
    return torch.nn.Sequential(torch.nn.Conv2d(channels, width, 1, bias=False), torch.nn.BatchNorm2d(width),
                               torch.nn.ReLU())


def projector(channels: int, dim: int) -> torch.nn.Module:
    """Three linear layers with batch norm, the last without ReLU and affine part (arXiv 2011.10566; notes H-SS)."""
    return torch.nn.Sequential(*linear_bn(channels, dim), torch.nn.ReLU(), *linear_bn(dim, dim), torch.nn.ReLU(),
                               *linear_bn(dim, dim, affine=False))


def predictor(dim: int, hidden: int) -> torch.nn.Module:
    return torch.nn.Sequential(*linear_bn(dim, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, dim))


# name -> modules between pooled features [batch, channels] and the L2 normalisation, in order
HEADS: dict[str, Callable[[int, Args], dict[str, torch.nn.Module]]] = {
    "linear-bn": lambda c, a: dict(zip(("fc", "bn"), linear_bn(c, a.dim))),  # notes H-A
    "deep": lambda c, a: {"fc": torch.nn.Sequential(*linear_bn(c, a.dim), torch.nn.ReLU(), *linear_bn(a.dim, a.dim))},
    "linear": lambda c, a: {"fc": torch.nn.Linear(c, a.dim)},  # notes H-nobn
    "simsiam": lambda c, a: {"projector": projector(c, a.dim), "predictor": predictor(a.dim, a.pred_dim)},
    "none": lambda c, a: {},  # pooled features as they are
}


def build_net(args: Args, pretrained: bool | dict) -> Descriptor:
    """The network of a command line; `pretrained` as in `build_backbone`."""
    return (SimSiam if args.head == "simsiam" else Descriptor)(args, pretrained)


class Descriptor(torch.nn.Module):
    """Images [B, 3, s, s] -> descriptors [B, dim] of unit length, fp32. State keys: backbone.*, then the head's.

    Only the backbone runs under autocast (`amp_dtype`); pooling, head and normalisation stay in fp32.
    """

    backbone: Any
    fc: Any
    bn: Any
    standard: Any
    convs: Any

    def __init__(self, args: Args, pretrained: bool | dict) -> None:
        super().__init__()
        self.pool, self.gem_p, self.gem_eval_p = args.pool, args.gem_p, args.gem_eval_p
        self.amp_dtype: torch.dtype | None = None
        self.grid, self.eval_crops = args.grid, parse_crops(args.eval_crops)
        self.stages = parse_stages(args)
        self.frozen_norms = args.batch_norm == "frozen"
        self.backbone = build_backbone(args, pretrained, self.stages)
        self.channels_last = str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC")
        self.mean, self.std = (list(self.backbone.pretrained_cfg[name]) for name in ("mean", "std"))
        if args.pool == "backbone":
            channels = getattr(self.backbone, "head_hidden_size", None)
            if not channels:
                raise InputError(f"--pool backbone: {args.arch} has no pooling of its own")
        elif args.pool == "gem":
            channels = self.backbone.feature_info.channels()[-1]
        else:
            maps = self.backbone.feature_info.channels()
            if args.pool == "conv-gem":
                self.convs = torch.nn.ModuleList(conv_bn_relu(width, args.width) for width in maps)
            widths = [args.width if args.pool == "conv-gem" else width * ((args.grid + 1) // 2) ** 2 for width in maps]
            self.standard = torch.nn.ModuleList(torch.nn.BatchNorm1d(width, affine=False) for width in widths)
            channels = sum(widths)
        modules = HEADS[args.head](channels, args)
        self.head = list(modules)
        self.dim = args.dim if modules else channels
        for name, module in modules.items():
            self.add_module(name, module)
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)

    def try_out(self, args: Args) -> None:
        """Describe a black image of each size, so that what does not work is told before work starts, as InputError."""
        training = self.training
        self.eval()
        for size in {args.input_size, args.eval_input_size or args.input_size}:
            try:
                with torch.no_grad():
                    wide = size * (2 if args.resize == "short" else 1)
                    shape = tuple(self.embed(torch.zeros(1, 3, size, wide)).shape)
                if shape != (1, self.dim):
                    raise ValueError(f"output {shape}, not {(1, self.dim)}")
            except Exception as error:  # networks raise many kinds
                raise InputError(
                    f"--arch {args.arch} --pool {args.pool} cannot describe images of {size} px (its own size is "
                    f"{self.backbone.pretrained_cfg['input_size'][-1]}): {first_line(error)}") from None
        self.train(training)

    def train(self, mode: bool = True) -> Descriptor:
        super().train(mode)
        if self.frozen_norms:  # running statistics of the pretraining, and no update of them
            for module in itertools.chain(self.backbone.modules(), self.standard if self.pool == "grid" else ()):
                if hasattr(module, "running_mean"):
                    module.eval()
        return self

    def maps(self, images: torch.Tensor) -> Any:
        """Images [B, 3, s, s] -> what is pooled, fp32: feature maps [B, C, h, w] of the stages or the last one; or the
        backbone's own features [B, C]."""
        with torch.autocast(images.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            features = self.backbone(images)
        if self.pool == "backbone":
            return features.float()
        maps = [x.float() for x in (features if self.stages else features[-1:])]
        return [x.permute(0, 3, 1, 2) for x in maps] if self.channels_last else maps

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images [B, 3, s, s] -> [features [B, c] of each feature map], fp32."""
        p = self.gem_p if self.training else self.gem_eval_p
        if self.pool == "backbone":
            return [self.maps(images)]
        if self.pool == "gem":
            return [gem(self.maps(images)[-1], p)]
        if self.pool == "conv-gem":
            return [gem(conv(x), p) for conv, x in zip(self.convs, self.maps(images))]
        return [folded_grid(x, self.grid) for x in self.maps(images)]

    def eval_features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The same, means over the images' crops (--eval-crops)."""
        crops = centre_crops(images, self.eval_crops)
        return [sum(parts) / len(crops) for parts in zip(*map(self.features, crops))]

    def standardised(self, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        """Features of each feature map -> pooled features [B, channels]: each map's part has unit length."""
        return torch.cat([F.normalize(norm(part)) for norm, part in zip(self.standard, parts)], 1)

    @torch.no_grad()
    def fit_standard(self, *views: torch.Tensor) -> Sequence[torch.Tensor]:
        """Let each feature have mean 0 and variance 1 over images: views, each [n, channels] of `features` side by side
        -> the same standardised, each map's part of unit length."""
        parts = torch.cat(views).split([norm.num_features for norm in self.standard], 1)
        for norm, part in zip(self.standard, parts):
            norm.running_mean.copy_(part.mean(0))
            norm.running_var.copy_(part.var(0))
        return self.standardised([part.to(norm.running_mean) for norm, part in zip(self.standard, parts)]
                                 ).cpu().chunk(len(views))

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, s, s] -> pooled features [B, channels], fp32."""
        parts = self.features(images) if self.training else self.eval_features(images)
        return self.standardised(parts) if self.pool in STANDARDISED else parts[0]

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, s, s] -> descriptors [B, dim] before they get unit length."""
        features = self.pooled(images)
        for name in self.head:
            features = getattr(self, name)(features)
        return features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.embed(images))

    def folded(self, size: int) -> Descriptor:
        """This network for evaluation alone, faster; images have side `size`."""
        fold_batch_norms(self.backbone, torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)))
        return self

    def ready(self, size: int, device: torch.device, amp_dtype: torch.dtype | None = None) -> Descriptor:
        """The same on a device, its backbone in this precision."""
        self.amp_dtype = amp_dtype
        return self.folded(size).to(memory_format=memory_format(self)).to(device)


class SimSiam(Descriptor):
    """In training -> projection and prediction, each [B, dim]; else what `extract_from` names (notes v1, v2)."""

    projector: Any
    predictor: Any

    def __init__(self, args: Args, pretrained: bool | dict) -> None:
        super().__init__(args, pretrained)
        self.extract_from = args.extract_from

    def forward(self, images: torch.Tensor) -> Any:
        z = self.projector(self.pooled(images))
        p = self.predictor(z)
        return (z, p) if self.training else F.normalize({"proj": z, "pred": p, "proj+pred": z + p}[self.extract_from])


def parse_crops(text: str) -> tuple[float, ...]:
    """--eval-crops "1,0.5" -> (1.0, 0.5): sides of the crops, of the image's side. InputError: not from 0.1 to 1."""
    try:
        crops = tuple(float(side) for side in text.split(","))
        if all(0.1 <= side <= 1 for side in crops):
            return crops
    except ValueError:
        pass
    raise InputError(f"--eval-crops {text}: give sides from 0.1 to 1 of the image's side, such as 1,0.5")


def centre_crops(images: torch.Tensor, sides: Sequence[float]) -> list[torch.Tensor]:
    """Images [B, 3, h, w] -> [centre crops [B, 3, t, u]], all resized to the smallest."""
    height, width = map(int, images.shape[-2:])  # tensors while TorchScript traces
    borders = [(round(height * (1 - side) / 2), round(width * (1 - side) / 2)) for side in sides]
    crops = [images[..., y:height - y, x:width - x] for y, x in borders]
    smallest = height - 2 * max(y for y, _ in borders), width - 2 * max(x for _, x in borders)
    return [crop if tuple(crop.shape[-2:]) == smallest else F.interpolate(crop, smallest, mode="bilinear",
                                                                          antialias=True) for crop in crops]


def parse_stages(args: Args) -> tuple[int, ...] | None:
    """--stages "2,3" -> (2, 3), or None: the last feature map."""
    if args.pool not in STANDARDISED:
        return None
    try:
        return tuple(sorted({int(stage) for stage in args.stages.split(",")}))
    except ValueError:
        raise InputError(f"--stages {args.stages}: give numbers of feature maps, such as 2,3") from None


def fold_batch_norms(backbone: torch.nn.Module, images: torch.Tensor) -> None:
    """Put each batch norm into the convolution before it, if nothing else uses that convolution's output: the same
    outputs in evaluation, to rounding. Random `images` [B, 3, s, s] show which norms these are, and whether the outputs
    stay within 1e-4 of the largest; if not, the network is left as it was, and a line says so.
    """
    if not any(type(module) in NORMS for module in backbone.modules()):
        return
    pairs, expected = convs_with_norms(backbone, images)
    folded: dict[torch.nn.Module, torch.nn.Module] = {}
    for conv, norm in pairs:
        rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]  # timm's norms have them inside
        folded |= {conv: fuse_conv_bn_eval(conv, norm), norm: torch.nn.Sequential(*rest)}
    places = [place for place in backbone.named_modules(remove_duplicate=False) if place[1] in folded]
    for name, module in places:
        backbone.set_submodule(name, folded[module])
    with torch.no_grad():
        found = as_list(backbone(images))
    if not all((a - b).abs().max() <= 1e-4 * a.abs().max() for a, b in zip(expected, found)):
        for name, module in places:
            backbone.set_submodule(name, module)
        print("=> batch norms stay apart: folded into the convolutions, they change what this network puts out")


def convs_with_norms(backbone: torch.nn.Module, images: torch.Tensor
                     ) -> tuple[list[tuple[Any, Any]], list[torch.Tensor]]:
    """[(convolution, batch norm)] where the norm alone takes the convolution's output and each is called once; and the
    outputs for `images`. Autograd's graph knows what takes what, operations in place too."""
    calls: list[tuple[Any, Any]] = []  # (module, node of the graph that makes its output; in case of a norm: its input)
    hooks = [module.register_forward_hook(lambda conv, _, output: calls.append((conv, output.grad_fn)))
             if type(module) in CONVS else
             module.register_forward_pre_hook(lambda norm, inputs: calls.append((norm, inputs[0].grad_fn)))
             for module in backbone.modules() if type(module) in CONVS + NORMS]
    nothing_saved = torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x)
    with torch.enable_grad(), nothing_saved:
        outputs = as_list(backbone(images.clone().requires_grad_() + 0))
    for hook in hooks:
        hook.remove()
    uses: collections.Counter = collections.Counter()
    todo: list[Any] = [x.grad_fn for x in outputs]
    while todo:
        node = todo.pop()
        uses[node] += 1
        if uses[node] == 1:
            todo += [maker for maker, _ in node.next_functions if maker]
    times = collections.Counter(module for module, _ in calls)
    once = [(module, node) for module, node in calls if times[module] == 1 and uses[node] == 1]
    makers = {node: module for module, node in once if type(module) in CONVS}
    pairs = [(makers[node], module) for module, node in once if type(module) in NORMS and node in makers]
    return pairs, [x.detach() for x in outputs]


def as_list(outputs: Any) -> list[torch.Tensor]:
    return [outputs] if torch.is_tensor(outputs) else list(outputs)


def memory_format(net: torch.nn.Module) -> torch.memory_format:
    """Of the network's kernels: channels last, as images come, which is faster; but not for kernels of 5 dimensions."""
    cubes = any(values.ndim == 5 for values in net.parameters())
    return torch.contiguous_format if cubes else torch.channels_last


def stride_before(backbone: torch.nn.Module) -> None:
    """Let 1 x 1 convolutions with stride n see every n-th pixel, in place of moving n pixels on: the same outputs.

    With 2 to 15 channels in channels_last, PyTorch's gradient of the latter reads or writes beyond its memory on CPUs
    (2.14, oneDNN's jit_1x1).
    """
    for conv in backbone.modules():
        if (isinstance(conv, torch.nn.Conv2d) and conv.kernel_size == (1, 1) and conv.padding == (0, 0)
                and conv.in_channels < 16 and conv.stride != (1, 1)):
            conv.register_forward_pre_hook(lambda _, images, s=conv.stride: images[0][..., ::s[0], ::s[1]])
            conv.stride = (1, 1)


def build_backbone(args: Args, pretrained: bool | dict, stages: tuple[int, ...] | None) -> Any:
    """timm network for `args.arch`: feature maps (of `stages` only, if given), pooled features with pool backbone.

    `pretrained`: True asks the hub, False gives random weights, a state dict of the whole network is loaded.
    """
    kwargs: dict[str, Any] = dict(num_classes=0) if args.pool == "backbone" else dict(features_only=True)
    if stages:
        kwargs["out_indices"] = stages  # later layers are left out
    config = shape_only(args.arch).pretrained_cfg
    if config.get("fixed_input_size"):
        kwargs["img_size"] = args.input_size
        if args.mode == "train" and args.eval_input_size not in (None, args.input_size):
            raise InputError(f"--eval-input-size {args.eval_input_size}: {args.arch} takes images of one size only, "
                             f"--input-size {args.input_size}")
        if min(parse_crops(args.eval_crops)) < 1:
            raise InputError(f"--eval-crops {args.eval_crops}: {args.arch} takes images of one size only")
    if isinstance(pretrained, dict):
        kwargs["pretrained_cfg_overlay"] = dict(state_dict=pretrained)
    try:
        backbone = timm.create_model(args.arch, pretrained=bool(pretrained), **kwargs)
        if stages:
            drop_later_layers(backbone, stages[-1])
        stride_before(backbone)
        return backbone
    except (RuntimeError, AttributeError, AssertionError, IndexError) as error:
        raise InputError(f"--arch {args.arch} cannot be built with --pool {args.pool}"
                         + f" --stages {args.stages}" * bool(stages) + f": {first_line(error)}") from None
    except OSError as error:
        raise InputError(f"the weights of {args.arch} cannot be downloaded ({str(error).splitlines()[0]}); give "
                         "--backbone-weights FILE, --weight FILE or --no-pretrained") from None


def drop_later_layers(backbone: Any, stage: int) -> None:
    """Remove what comes after a feature map, where timm keeps and computes it (EfficientNets)."""
    parent, _, index = backbone.feature_info.info[stage]["module"].rpartition(".")
    layers = getattr(backbone, parent, None)
    if index.isdigit() and isinstance(layers, torch.nn.Sequential):
        setattr(backbone, parent, layers[:int(index) + 1])


def quiet_timm() -> None:
    """Without what timm says of old names and of classifiers left out: the resolved name is printed. Call it in each
    process."""
    warnings.filterwarnings("ignore", "Mapping deprecated model name")
    logging.getLogger("timm").setLevel(logging.ERROR)


def shape_only(arch: str) -> Any:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return timm.create_model(arch)


def check_arch(name: str) -> str:
    """Resolved timm name 'arch.tag' of a possibly old name."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3, 0.5)
        raise InputError(f"--arch: timm has no model '{name}'" + (f"; close: {', '.join(close)}" if close else ""))
    config = shape_only(name).pretrained_cfg
    return config["architecture"] + (f".{config['tag']}" if config.get("tag") else "")


def read_backbone_weights(file: str | Path, arch: str) -> dict:
    """State dict of a local file under timm's names; weights of another implementation with the same tensors in the
    same order are renamed by position. Whatever does not fit is an error."""
    try:
        given = load_timm_file(str(file))
    except Exception as error:  # timm and pickle raise many kinds
        raise InputError(f"--backbone-weights {file}: {first_line(error)}") from None
    if not (isinstance(given, dict) and given and all(map(torch.is_tensor, given.values()))):
        raise InputError(f"--backbone-weights {file}: holds no weights, tensors by name")
    net = shape_only(arch)
    wanted = net.state_dict()
    classifier = net.pretrained_cfg.get("classifier") or ()
    classifier = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    missing = [name for name in wanted if name not in given and not name.startswith(classifier)]
    if missing and [v.shape for v in given.values()] == [v.shape for v in wanted.values()]:
        print(f"=> {file}: other names, same shapes in the same order as {arch}; matched by position")
        return dict(zip(wanted, given.values()))
    odd = missing or [name for name in wanted if not name.startswith(classifier)
                      and given[name].shape != wanted[name].shape]
    if odd:
        raise InputError(f"--backbone-weights {file} does not fit {arch}: {len(odd)} tensors missing or of another "
                         f"shape, first: {first_three(odd)}")
    return given
