"""Networks of many families: what extraction makes of them, what training survives, what is refused."""
import copy

import pytest
import timm
import torch
from torch.nn import functional as F

from copydet.common import InputError
from copydet.network import build_net, fold_batch_norms, memory_format, stride_before
from copydet.options import parse_args
from helpers import draw_images, run


@torch.no_grad()
def trained(net, seed=0):
    """`net` with statistics and weights as training leaves them: fresh ones hide what is left out or done twice."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for values, low, high in ((module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 1.5),
                                      (module.weight, 0.8, 1.2), (module.bias, -0.1, 0.1)):
                values.uniform_(low, high)
        else:  # those of residual branches start near 0
            for values in module.parameters(recurse=False):
                values += torch.empty_like(values).uniform_(-0.3, 0.3) if values.ndim == 1 else 0
    return net.eval().requires_grad_(False)


def count_norms(net):
    return sum(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())


def fold(net, size):
    """Fold `net` for images of side `size`: -> batch norms that are left, largest difference of the outputs for other
    images, relative to the largest output of each map."""
    images = torch.randn(2, 3, size, size)
    expected = net(images)
    fold_batch_norms(net, torch.randn(1, 3, size, size))
    pairs = [(expected, net(images))] if torch.is_tensor(expected) else list(zip(expected, net(images)))
    return count_norms(net), max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("arch, kept", [("tf_efficientnet_lite0", 0), ("tf_efficientnetv2_b0", 0), ("resnet18", 0),
                                        ("mobilenetv3_small_050", 0), ("densenet121", 62), ("test_byobnet", 0),
                                        ("resnetv2_50d_gn", 0), ("test_efficientnet_ln", 0), ("test_vit", 0)])
def test_batch_norms_go_into_the_convolutions_before_them(arch, kept):
    """`kept` come before a convolution or after several feature maps."""
    net = trained(timm.create_model(arch, num_classes=0))
    left, error = fold(net, 160 if arch == "test_vit" else 64)
    assert left == kept and error < 1e-4


@pytest.mark.parametrize("arch, size", [
    ("ghostnetv2_100", 64), ("repghostnet_050", 64), ("maxvit_rmlp_pico_rw_256", 64), ("coatnet_nano_rw_224", 64),
    ("ghostnet_050", 64), ("tinynet_e", 64), ("mixnet_s", 64), ("lcnet_050", 64), ("mobilenetv4_conv_small_050", 64),
    ("regnety_002", 64), ("repvgg_a0", 64), ("mobileone_s0", 32), ("fastvit_t8", 64), ("dla46_c", 64),
    ("res2net50_14w_8s", 64), ("skresnet18", 64), ("cs3darknet_s", 64), ("hgnetv2_b0", 64), ("xception41p", 64),
    ("efficientvit_b0", 64), ("levit_conv_128s", 224), ("starnet_s050", 64), ("botnet26t_256", 64)])
def test_feature_maps_of_folded_networks_are_the_same(arch, size):
    with torch.device("meta"):
        fixed = timm.create_model(arch).pretrained_cfg.get("fixed_input_size")
    net = trained(timm.create_model(arch, features_only=True, **{"img_size": size} if fixed else {}))
    norms = count_norms(net)
    left, error = fold(net, size)
    assert left < norms and error < 1e-4


class Odd(torch.nn.Module):
    """A convolution and a batch norm that are used as `forward` of these says."""

    def __init__(self, forward, conv=torch.nn.Conv2d):
        super().__init__()
        self.conv, self.norm = conv(3, 3, 3, padding=1), torch.nn.BatchNorm2d(3)
        self.other_name, self.use = self.conv, forward

    def forward(self, images):
        return self.use(self, images)


class Standardised(torch.nn.Conv2d):
    """A convolution that does not take the weights as they are."""

    def forward(self, images):
        return F.conv2d(images, self.weight / self.weight.std(), self.bias, padding=1)


def shortcut(net, x):
    x = net.conv(x)
    return net.norm(x) + x


def shortcut_in_place(net, x):
    return net.norm(net.conv(x).add_(x))


ODD = {  # name -> network, batch norms that stay
    "norm alone": (Odd(lambda net, x: net.norm(net.conv(x)).relu()), 0),
    "under another name": (Odd(lambda net, x: net.norm(net.other_name(x))), 0),
    "norm's output used twice": (Odd(lambda net, x: net.norm(net.conv(x)).mul(2).relu() + x), 0),
    "shortcut": (Odd(shortcut), 1),
    "shortcut in place": (Odd(shortcut_in_place), 1),
    "feature map": (Odd(lambda net, x: [y := net.conv(x), net.norm(y)]), 1),
    "convolution twice": (Odd(lambda net, x: net.norm(net.conv(net.conv(x)))), 1),
    "norm twice": (Odd(lambda net, x: net.norm(net.norm(net.conv(x)))), 1),
    "norm first": (Odd(lambda net, x: net.conv(net.norm(x))), 1),
    "weights of its own": (Odd(lambda net, x: net.norm(net.conv(x)), Standardised), 1),
}


@pytest.mark.parametrize("name", ODD)
def test_only_what_nothing_else_uses_is_folded(name):
    net, kept = ODD[name]
    left, error = fold(trained(net), 16)
    assert left == kept and error < 1e-6


def test_a_network_that_folding_changes_stays_as_it_was(capsys):
    """Nothing shows that these weights are used once more."""
    net = trained(Odd(lambda net, x: net.norm(net.conv(x)) + 9 * net.conv.weight.sum()))
    before = dict(net.named_modules())
    assert fold(net, 16) == (1, 0) and dict(net.named_modules()) == before
    assert len(capsys.readouterr().out.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("size", [8, 9])
def test_strides_before_a_convolution_give_the_same(size):
    conv = torch.nn.Conv2d(3, 5, 1, stride=(2, 3))
    images = torch.randn(2, 3, size, size)
    expected = conv(images)
    stride_before(conv)
    assert torch.equal(copy.deepcopy(conv)(images), expected) and conv.stride == (1, 1)


def test_kernels_of_five_dimensions_stay_as_they_are():
    flat, deep = torch.nn.Conv2d(3, 5, 3), torch.nn.Conv3d(3, 5, 3)
    for net in (torch.nn.Sequential(flat), torch.nn.Sequential(deep)):
        net.to(memory_format=memory_format(net))
    assert flat.weight.is_contiguous(memory_format=torch.channels_last) and deep.weight.is_contiguous()


def test_strided_convolutions_of_few_channels_do_not_end_training(tmp_path, exp):
    """It died with a signal."""
    images = draw_images(tmp_path, 8)
    run("train.py", "-a", "repvgg_a0", "--no-pretrained", "--input-size", 128, "--batch-size", 4, "--memory-size", 8,
        "--epochs", 1, "-j", 0, "--device", "cpu", "--seed", 1, "--exp", exp, images)


# ---------------------------------------------------------------------------------------------------------------------
# What does not work


def try_out(*flags):
    args = parse_args([*map(str, flags), "--no-pretrained", "x"])
    build_net(args, False).try_out(args)


@pytest.mark.parametrize("flags, words", [
    (["-a", "dla46_c", "--input-size", 100], "images of 100 px (its own size is 224)"),
    (["-a", "dla46_c", "--input-size", 64, "--eval-input-size", 100], "images of 100 px"),
    (["-a", "dla46_c", "--input-size", 224, "--eval-crops", "1,0.5"], "images of 224 px"),
    (["-a", "test_vit3", "--input-size", 160, "--eval-input-size", 224], "images of one size only"),
    (["-a", "test_vit3", "--input-size", 160, "--eval-crops", "1,0.5"], "images of one size only"),
    (["-a", "test_vit3", "--input-size", 8], "images of 8 px")])
def test_sizes_that_a_network_does_not_take(flags, words):
    with pytest.raises(InputError) as error:
        try_out(*flags)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_a_network_cannot_do_is_told_in_a_line(tmp_path, exp):
    images = draw_images(tmp_path, 8)
    done = run("train.py", "-a", "test_vit3", "--no-pretrained", "--input-size", 160, "--eval-input-size", 96,
               "--batch-size", 4, "--memory-size", 8, "--device", "cpu", "-j", 0, "--exp", exp, images, code=2)
    assert "images of one size only" in done.stderr and len(done.stderr.strip().splitlines()) == 1
