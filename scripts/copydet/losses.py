"""What training minimises: losses between descriptors, the memory of earlier batches, image classes, SimSiam.

A criterion is a module (outputs of the network, labels) -> scalar. pytorch-metric-learning's losses are used as they
are, but for those that are functions of the matrix of anchors and references: these are given here, with the same
values and no list of pairs.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_metric_learning as pml
import pytorch_metric_learning.distances
import pytorch_metric_learning.losses
import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from copydet.options import Args


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """[B, ...] of each process -> [processes * B, ...] in order of rank; the own block keeps its gradient."""
    if not dist.is_initialized():
        return x
    blocks = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(blocks, x.detach().contiguous())
    blocks[dist.get_rank()] = x
    return torch.cat(blocks)


class SNRDistance(pml.distances.SNRDistance):
    """Var(a - r) / Var(a) over the dimensions (Yuan et al., CVPR 2019; notes v15), for all anchors a [B, d] and
    references r [M, d] as Var(a) + Var(r) - 2 Cov(a, r): B x M values, where the library makes B x M x d."""

    def compute_mat(self, query_emb: torch.Tensor, ref_emb: torch.Tensor) -> torch.Tensor:
        a, r = (x - x.mean(1, keepdim=True) for x in (query_emb, ref_emb))
        var_a, var_r = (x.square().sum(1) for x in (a, r))
        return ((var_a[:, None] + var_r - 2 * a @ r.T) / var_a[:, None]).clamp(min=0)


def pair_masks(labels: torch.Tensor, ref_labels: torch.Tensor,
               own: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Positive and negative pairs of anchors with labels [B] and references with labels [M] as masks [B, M]; reference
    own[i] is anchor i itself."""
    positive = labels[:, None] == ref_labels
    negative = ~positive
    if own is not None:
        positive[torch.arange(len(labels), device=labels.device), own] = False
    return positive, negative


class MatrixLoss(pml.losses.BaseMetricLossFunction):
    """Makes a pair loss of the library a function of the matrix of anchors and references and the masks of its positive
    and negative pairs: `of_matrix`. The library lists all pairs instead, for which a GPU has to be waited for; it does
    so here for the pairs of a miner."""

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor, pairs: tuple | None = None,
                ref_emb: torch.Tensor | None = None, ref_labels: Any = None) -> torch.Tensor:
        """Anchors [B, d] with labels [B], references [M, d] with labels [M] (none: the anchors), pairs (none: all) as
        `pair_masks` or as a miner's lists -> scalar."""
        if ref_emb is None:
            ref_emb, ref_labels = embeddings, labels
        if pairs is None:
            own = torch.arange(len(labels), device=labels.device) if ref_emb is embeddings else None
            pairs = pair_masks(labels, ref_labels, own)
        elif len(pairs) > 2:
            return super().forward(embeddings, labels, pairs, ref_emb, ref_labels)
        return self.of_matrix(self.distance(embeddings, ref_emb), *pairs)


class ContrastiveLoss(MatrixLoss, pml.losses.ContrastiveLoss):
    """max(d - pos_margin, 0) of positive and max(neg_margin - d, 0) of negative pairs at distance d; of each kind the
    mean over the terms above 0 (Hadsell et al., CVPR 2006; notes v10)."""

    def of_matrix(self, distances: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Distances [B, M] and masks [B, M] -> scalar."""
        near, far = F.relu(distances - self.pos_margin) * positive, F.relu(self.neg_margin - distances) * negative
        mean = lambda x: x.sum() / (x > 0).sum().clamp(min=1)
        return mean(near) + mean(far)


class NTXentLoss(MatrixLoss, pml.losses.NTXentLoss):
    """Mean over positive pairs (a, p) of log(1 + sum over negatives n of a of e^((s_an - s_ap + margin) / t)).

    s is the cosine and t the temperature (arXiv 1807.03748; notes v14). `margin` is taken off the positives' cosine
    (notes v60). The library makes a matrix of positives x negatives.
    """

    def __init__(self, temperature: float, margin: float = 0.0) -> None:
        super().__init__(temperature)
        self.margin = margin

    def of_matrix(self, cosines: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Cosines [B, M] and masks [B, M] -> scalar."""
        logits = cosines / self.temperature
        negatives = logits.masked_fill(~negative, torch.finfo(logits.dtype).min).logsumexp(1, keepdim=True)
        terms = F.softplus(negatives - logits + self.margin / self.temperature) * positive
        return terms.sum() / positive.sum().clamp(min=1)


class ArcFaceLoss(pml.losses.ArcFaceLoss):
    """Cross-entropy over s cos(t + m) for the image's own class, s cos(t) for the others (arXiv 1801.07698; notes v3).
    `margin` m in radians."""

    per_view = False

    def __init__(self, classes: int, dim: int, margin: float, scale: float) -> None:
        super().__init__(classes, dim, margin, scale)

    def init_margin(self) -> None:
        pass  # given in radians


class SimSiamLoss(torch.nn.Module):
    """Minus the mean cosine between the prediction of one view and the projection of another, which gets no gradient
    (arXiv 2011.10566; notes v1)."""

    per_view = True  # the network sees each view by itself, with batch statistics of its own

    def forward(self, outputs: list[tuple[torch.Tensor, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
        """[(projection, prediction) of each view], each [B, dim] -> scalar."""
        pairs = [(p, z.detach()) for i, (_, p) in enumerate(outputs) for j, (z, _) in enumerate(outputs) if i != j]
        total: Any = sum(F.cosine_similarity(p, z).mean() for p, z in pairs)
        return -total / len(pairs)


class Memory(pml.losses.CrossBatchMemory):
    """The library's ring buffer of descriptors (arXiv 1912.06798), whose state_dict leaves out where it stands."""

    def create_indices_tuple(self, embeddings: torch.Tensor, labels: torch.Tensor, memory: torch.Tensor,
                             memory_labels: torch.Tensor, given: tuple | None, own_are_there: bool) -> tuple:
        """Pairs of embeddings [B, dim] and memory [M, dim]: as masks where the loss takes them."""
        if self.miner or given is not None or not isinstance(self.loss, MatrixLoss):
            return super().create_indices_tuple(embeddings, labels, memory, memory_labels, given, own_are_there)
        return pair_masks(labels, memory_labels, self.curr_batch_idx if own_are_there else None)

    def get_extra_state(self) -> dict:
        return {"next": self.queue_idx, "filled": self.has_been_filled}

    def set_extra_state(self, state: dict) -> None:
        self.queue_idx, self.has_been_filled = state["next"], state["filled"]


# --memory-enqueue -> for each memory: all rows enter it (None), only those of view 0, only the others
ENQUEUE: dict[str, list[bool | None]] = {
    "all": [None], "view0": [True], "crosswise": [True, False]}


class PairCriterion(torch.nn.Module):
    """Loss of the gathered batch, against the memory where there is one.

    Every process sees all descriptors in order of rank, so all compute the same loss and hold the same memory
    (pytorch-metric-learning's own distributed wrapper puts each rank's block first). Only the own block carries a
    gradient and DDP averages: gradients shrink with the number of processes, as in the notes (--world-scaled-loss).

    Rows that enter a memory alone (view0, crosswise: notes v12, v61) are no anchors of it. The bipartite miner (notes
    v11) compares view 0 with the other views only; against a memory it means all pairs, as without a miner (v13).
    """

    per_view = False

    def __init__(self, args: Args, loss: torch.nn.Module, miner: torch.nn.Module | None, dim: int,
                 world_size: int) -> None:
        super().__init__()
        self.loss, self.miner, self.memories = loss, miner, torch.nn.ModuleList()
        self.scale = world_size if args.world_scaled_loss else 1
        self.views, self.bipartite = args.ncrops + args.negatives, args.miner == "bipartite"
        self.enqueue = ENQUEUE[args.memory_enqueue]
        if args.memory_size:
            self.memories.extend(Memory(loss, dim, args.memory_size, miner) for _ in self.enqueue)

    def forward(self, descriptors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Descriptors [B, dim] and labels [B] of this process, view after view -> scalar."""
        view0 = torch.arange(len(labels), device=labels.device) < len(labels) // self.views
        descriptors, labels, view0 = (gather_rows(x) for x in (descriptors, labels, view0))
        if self.memories:
            masks = [None if which is None else view0 == which for which in self.enqueue]
            loss = sum(memory(descriptors, labels, enqueue_mask=mask) for memory, mask in zip(self.memories, masks))
        elif self.bipartite:
            loss = self.loss(descriptors[view0], labels[view0], ref_emb=descriptors[~view0], ref_labels=labels[~view0])
        else:
            loss = self.loss(descriptors, labels, self.miner(descriptors, labels) if self.miner else None)
        return loss * self.scale


class Objective(torch.nn.Module):
    """Network and criterion as one module, so that DDP sees the parameters of both: (images, labels) -> scalar.

    With `parts` > 1 the network sees the batch in that many parts and keeps no activations: the backward pass computes
    them again, part by part (gradient caching, arXiv 2101.06983). The criterion sees the whole batch at once.
    """

    def __init__(self, net: torch.nn.Module, criterion: torch.nn.Module, views: int, shuffled: bool,
                 parts: int = 1) -> None:
        super().__init__()
        self.net, self.criterion, self.views, self.shuffled, self.parts = net, criterion, views, shuffled, parts
        self._ddp_params_and_buffers_to_ignore = [  # DDP would send the memory, the same in all processes, at each step
            f"criterion.{name}" for name, _ in criterion.named_buffers()]

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Images [views * B, 3, s, s] and labels [views * B], view after view."""
        if self.criterion.per_view:
            return self.criterion([self.net(view) for view in images.chunk(self.views)], labels)
        outputs = forward_shuffled(self.describe, images) if self.shuffled else self.describe(images)
        return self.criterion(outputs, labels)

    def describe(self, images: torch.Tensor) -> torch.Tensor:
        """Images [n, 3, s, s] -> descriptors [n, dim]."""
        if self.parts == 1:
            return self.net(images)
        contexts = lambda: (contextlib.nullcontext(), running_statistics_kept(self.net))
        return torch.cat([checkpoint(self.net, part, use_reentrant=False, context_fn=contexts)
                          for part in images.chunk(self.parts)])


@contextlib.contextmanager
def running_statistics_kept(net: torch.nn.Module) -> Iterator[None]:
    """Batch norm as in training, but its running mean and variance stay as they are."""
    norms: list[Any] = [module for module in net.modules() if hasattr(module, "running_mean")]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum in zip(norms, momenta):
            module.momentum = momentum


def forward_shuffled(net: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Outputs for this process's images, computed in batches drawn from all processes, so that the batch statistics of
    one process tell nothing about which rows belong together (arXiv 1911.05722; notes v21, with its gradient)."""
    if not dist.is_initialized():
        return net(images)
    rank, rows = dist.get_rank(), len(images)
    order = torch.randperm(dist.get_world_size() * rows).to(images.device)
    dist.broadcast(order, 0)
    mine = slice(rank * rows, (rank + 1) * rows)
    outputs = torch.cat(all_gather(net(gather_rows(images)[order[mine]])))
    return outputs[order.argsort()[mine]]
