"""The network: timm backbone, pooling, head, unit length; and the weights it starts from.

Shapes: images [B, 3, s, s] -> feature map [B, C, h, w] -> pooled features [B, C] -> descriptors [B, dim].
"""
from __future__ import annotations

import difflib
import itertools
import logging
import warnings

import timm
import torch
from timm.models import load_state_dict as load_timm_file
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from copydet.common import InputError, first_three
from copydet.options import Args


def gem(x, p, eps=1e-6):
    """Generalised mean pooling [B, C, H, W] -> [B, C]: (mean of max(x, eps)^p)^(1/p) (arXiv 1711.02512)."""
    return x.clamp(min=eps).pow(p).mean((-2, -1)).pow(1 / p)


def folded_grid(x, n):
    """[B, C, h, w] -> [B, C m^2], m = ceil(n / 2): means over the cells of an n x n grid, each averaged with the cells
    that a horizontal, a vertical or both flips put in its place."""
    rows, columns = (F.adaptive_avg_pool1d(torch.eye(size, device=x.device), n).T for size in map(int, x.shape[-2:]))
    fold = lambda cells: (cells + cells.flip(0))[:(n + 1) // 2] / 2
    return (fold(rows) @ x @ fold(columns).T).flatten(1)


def linear_bn(channels, dim, affine=True):
    return [torch.nn.Linear(channels, dim, bias=False), torch.nn.BatchNorm1d(dim, affine=affine)]


def projector(channels, dim):
    """Three linear layers with batch norm, the last without ReLU and affine part (arXiv 2011.10566; notes H-SS)."""
    return torch.nn.Sequential(*linear_bn(channels, dim), torch.nn.ReLU(), *linear_bn(dim, dim), torch.nn.ReLU(),
                               *linear_bn(dim, dim, affine=False))


def predictor(dim, hidden):
    return torch.nn.Sequential(*linear_bn(dim, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, dim))


HEADS = {  # name -> modules between pooled features [batch, channels] and the L2 normalisation, in order
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

    def __init__(self, args: Args, pretrained: bool | dict):
        super().__init__()
        self.pool, self.gem_p, self.gem_eval_p, self.amp_dtype = args.pool, args.gem_p, args.gem_eval_p, None
        self.grid, self.eval_crops = args.grid, parse_crops(args.eval_crops)
        self.stages = parse_stages(args)
        self.frozen_norms = args.batch_norm == "frozen"
        self.backbone = build_backbone(args, pretrained, self.stages)
        self.channels_last = str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC")
        self.mean, self.std = (list(self.backbone.pretrained_cfg[name]) for name in ("mean", "std"))
        if args.pool == "backbone":
            channels = self.backbone.head_hidden_size
        elif args.pool == "gem":
            channels = self.backbone.feature_info.channels()[-1]
        else:
            widths = [width * ((args.grid + 1) // 2) ** 2 for width in self.backbone.feature_info.channels()]
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

    def train(self, mode=True):
        super().train(mode)
        if self.frozen_norms:  # running statistics of the pretraining, and no update of them
            for module in itertools.chain(self.backbone.modules(), self.standard if self.pool == "grid" else ()):
                if hasattr(module, "running_mean"):
                    module.eval()
        return self

    def maps(self, images):
        """Images [B, 3, s, s] -> what is pooled, fp32: feature maps [B, C, h, w] of the stages or the last one; or the
        backbone's own features [B, C]."""
        with torch.autocast(images.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            features = self.backbone(images)
        if self.pool == "backbone":
            return features.float()
        maps = [x.float() for x in (features if self.stages else features[-1:])]
        return [x.permute(0, 3, 1, 2) for x in maps] if self.channels_last else maps

    def features(self, images):
        """Images [B, 3, s, s] -> [features [B, c] of each feature map], fp32."""
        if self.pool == "backbone":
            return [self.maps(images)]
        if self.pool == "gem":
            return [gem(self.maps(images)[-1], self.gem_p if self.training else self.gem_eval_p)]
        return [folded_grid(x, self.grid) for x in self.maps(images)]

    def eval_features(self, images):
        """The same, means over the images' crops (--eval-crops)."""
        crops = centre_crops(images, self.eval_crops)
        return [sum(parts) / len(crops) for parts in zip(*map(self.features, crops))]

    def standardised(self, parts):
        """Features of each feature map -> pooled features [B, channels]: each map's part has unit length."""
        return torch.cat([F.normalize(norm(part)) for norm, part in zip(self.standard, parts)], 1)

    @torch.no_grad()
    def fit_standard(self, *views):
        """Let each feature have mean 0 and variance 1 over images: views, each [n, channels] of `features` side by side
        -> the same standardised, each map's part of unit length."""
        parts = torch.cat(views).split([norm.num_features for norm in self.standard], 1)
        for norm, part in zip(self.standard, parts):
            norm.running_mean.copy_(part.mean(0))
            norm.running_var.copy_(part.var(0))
        return self.standardised([part.to(norm.running_mean) for norm, part in zip(self.standard, parts)]
                                 ).cpu().chunk(len(views))

    def pooled(self, images):
        """Images [B, 3, s, s] -> pooled features [B, channels], fp32."""
        parts = self.features(images) if self.training else self.eval_features(images)
        return self.standardised(parts) if self.pool == "grid" else parts[0]

    def embed(self, images):
        """Images [B, 3, s, s] -> descriptors [B, dim] before they get unit length."""
        features = self.pooled(images)
        for name in self.head:
            features = getattr(self, name)(features)
        return features

    def forward(self, images):
        return F.normalize(self.embed(images))

    def folded(self, size):
        """This network for evaluation alone, faster; images have side `size`."""
        fold_batch_norms(self.backbone, torch.zeros(1, 3, size, size))
        return self


class SimSiam(Descriptor):
    """In training -> projection and prediction, each [B, dim]; else what `extract_from` names (notes v1, v2)."""

    def __init__(self, args: Args, pretrained: bool | dict):
        super().__init__(args, pretrained)
        self.extract_from = args.extract_from

    def forward(self, images):
        z = self.projector(self.pooled(images))
        p = self.predictor(z)
        return (z, p) if self.training else F.normalize({"proj": z, "pred": p, "proj+pred": z + p}[self.extract_from])


def parse_crops(text):
    """--eval-crops "1,0.5" -> (1.0, 0.5): sides of the crops, of the image's side. InputError: not from 0.1 to 1."""
    try:
        crops = tuple(float(side) for side in text.split(","))
        if all(0.1 <= side <= 1 for side in crops):
            return crops
    except ValueError:
        pass
    raise InputError(f"--eval-crops {text}: give sides from 0.1 to 1 of the image's side, such as 1,0.5")


def centre_crops(images, sides):
    """Images [B, 3, s, s] -> [centre crops [B, 3, t, t]], all resized to t, the side of the smallest."""
    size = int(images.shape[-1])  # a tensor while TorchScript traces
    borders = [round(size * (1 - side) / 2) for side in sides]
    smallest = size - 2 * max(borders)
    crops = [images[..., border:size - border, border:size - border] for border in borders]
    return [crop if crop.shape[-1] == smallest else F.interpolate(crop, (smallest, smallest), mode="bilinear",
                                                                  antialias=True) for crop in crops]


def parse_stages(args):
    """--stages "2,3" -> (2, 3), or None: the last feature map."""
    if args.pool != "grid":
        return None
    try:
        return tuple(sorted({int(stage) for stage in args.stages.split(",")}))
    except ValueError:
        raise InputError(f"--stages {args.stages}: give numbers of feature maps, such as 2,3") from None


def fold_batch_norms(backbone, images):
    """Put each batch norm whose input is a convolution's output into that convolution's weights and bias: the same
    outputs in evaluation, to rounding. `images` [B, 3, s, s] show which these are.
    """
    pairs, last = [], (None, None)

    def remember(conv, _, output):
        nonlocal last
        last = conv, output

    def pair(norm, inputs):
        if inputs[0] is last[1]:
            pairs.append((last[0], norm))

    norms = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if not norms:
        return
    hooks = [norm.register_forward_pre_hook(pair) for norm in norms]
    hooks += [module.register_forward_hook(remember) for module in backbone.modules()
              if isinstance(module, torch.nn.Conv2d)]
    with torch.inference_mode():
        backbone(images)
    for hook in hooks:
        hook.remove()
    names = {module: name for name, module in backbone.named_modules()}
    for conv, norm in pairs:
        rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]  # timm's norms have them inside
        backbone.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        backbone.set_submodule(names[norm], torch.nn.Sequential(*rest))


def build_backbone(args, pretrained, stages):
    """timm network for `args.arch`: feature maps (of `stages` only, if given), pooled features with pool backbone.

    `pretrained`: True asks the hub, False gives random weights, a state dict of the whole network is loaded.
    """
    kwargs = dict(num_classes=0) if args.pool == "backbone" else dict(features_only=True)
    if stages:
        kwargs["out_indices"] = stages  # later layers are left out
    with torch.device("meta"):
        config = timm.create_model(args.arch).pretrained_cfg
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
        return backbone
    except (RuntimeError, AttributeError, AssertionError, IndexError) as error:
        raise InputError(f"--arch {args.arch} cannot be built with --pool {args.pool}"
                         + f" --stages {args.stages}" * bool(stages) + f": {error}") from None
    except OSError as error:
        raise InputError(f"the weights of {args.arch} cannot be downloaded ({str(error).splitlines()[0]}); give "
                         "--backbone-weights FILE, --weight FILE or --no-pretrained") from None


def drop_later_layers(backbone, stage):
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


def check_arch(name):
    """Resolved timm name 'arch.tag' of a possibly old name."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3, 0.5)
        raise InputError(f"--arch: timm has no model '{name}'" + (f"; close: {', '.join(close)}" if close else ""))
    with torch.device("meta"):
        config = timm.create_model(name).pretrained_cfg
    return config["architecture"] + (f".{config['tag']}" if config.get("tag") else "")


def read_backbone_weights(file, arch):
    """State dict of a local file under timm's names; weights of another implementation with the same tensors in the
    same order are renamed by position. Whatever does not fit is an error."""
    try:
        given = load_timm_file(file)
    except Exception as error:  # timm and pickle raise many kinds
        raise InputError(f"--backbone-weights {file}: {str(error).splitlines()[0]}") from None
    with torch.device("meta"):
        net = timm.create_model(arch)
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
