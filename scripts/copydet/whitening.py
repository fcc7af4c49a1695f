"""A whitening learned from pairs of views, and the head that holds it."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from copydet.network import Descriptor


def covariance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[n, c] and [n, d], means 0 -> [c, d]."""
    return x.T @ y / len(x)


def learned_whitening(a: torch.Tensor, b: torch.Tensor, dim: int,
                      shrinkage: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Projection that shrinks what differs between views of an image, and keeps what differs between images.

    Args: a, b: pooled features [n, c] of two views of n images. shrinkage: fraction of the within-pair covariance that
    is replaced by the same variance in all directions.

    Returns mean [c] and projection [c, dim]: whitening of the within-pair covariance, then the `dim` directions of
    largest variance (Mikolajczyk and Matas, ICCV 2007; Radenovic et al., arXiv 1711.02512).
    """
    a, b = a.double(), b.double()
    within = covariance(a - b, a - b)
    within = (1 - shrinkage) * within + shrinkage * within.trace() / len(within) * torch.eye(len(within))
    values, vectors = torch.linalg.eigh(within)
    whitened = vectors / values.sqrt()
    mean = torch.cat([a, b]).mean(0)
    rows = (torch.cat([a, b]) - mean) @ whitened
    _, directions = torch.linalg.eigh(covariance(rows, rows))
    return mean, whitened @ directions.flip(1)[:, :dim]


@torch.no_grad()
def set_head(net: Descriptor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Make a linear-bn head the learned whitening of pooled features a, b [n, c]; batch norm keeps its scale."""
    mean, matrix = learned_whitening(a, b, net.dim)
    rows = (torch.cat([a, b]).double() - mean) @ matrix
    scale = rows.std(0).mean()  # a common factor: the descriptor has unit length anyway
    fc: Any = net.fc
    bn: Any = net.bn
    fc.weight.copy_(matrix.T / scale)
    bn.running_mean.copy_(mean @ matrix / scale)
    bn.running_var.copy_((rows / scale).var(0))
    bn.weight.copy_((bn.running_var + bn.eps).sqrt())
    bn.bias.zero_()
