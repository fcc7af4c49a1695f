"""Losses, memory and batch norm against their definitions, in one process and in two."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss, NTXentLoss, SignalToNoiseRatioContrastiveLoss
from torch.nn import functional as F

import train
from copydet import losses
from copydet.distributed import Rank
from copydet.network import build_net
from copydet.options import parse_args
from helpers import ROOT, WITH_PACKAGE


def settings(**changes):
    args = parse_args(["--loss", "contrastive", "--memory-size", "20", "--batch-size", "1", "--dim", "8",
                       "--pos-margin", "0.1", "--neg-margin", "1.1", "--margin", "0.1", "x"])
    return args.replace(**changes)


def criterion(world_size=1, **changes):
    return train.build_criterion(settings(**changes), 6, Rank(world_size=world_size))


def batches_of(count, size, dim=8):
    generator = torch.Generator().manual_seed(1)
    return [(F.normalize(torch.randn(size, dim, generator=generator)),
             torch.randint(0, 6, (size,), generator=generator)) for _ in range(count)]


def value_and_gradient(loss, x, labels):
    x = x.clone().requires_grad_()
    value = loss(x, labels)
    value.backward()
    return value.item(), x.grad


def spawn(work, tmp_path, *args):
    """Run `work(rank, *args)` in two gloo processes; what they return, in order of rank."""
    torch.multiprocessing.spawn(spawned, (work, str(tmp_path), args), nprocs=2)
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]


def spawned(rank, work, folder, args):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(work(rank, *args), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Cross-batch memory (notes v10, v12, v13, v61)


def dense_contrastive(batches, memory_size, pos_margin, neg_margin, views=0):
    """Loss and gradient of the last of `batches` [(descriptors [B, d], labels [B])], by the definition: enqueue first,
    then each row against all of the memory but its own copy; means over non-zero terms, summed.

    views: only the rows of view 0 enter the memory, the other rows of that many views are compared with it.
    """
    memory = []
    for descriptors, labels in batches:
        x = descriptors.double().detach().requires_grad_()
        stored = range(len(x) // views if views else len(x))
        memory += [(x[i].detach(), int(labels[i]), i, x) for i in stored]
        memory = memory[-memory_size:]
        positive, negative = [], []
        for i in range(stored.stop if views else 0, len(x)):
            for vector, label, j, batch in memory:
                if batch is x and i == j:
                    continue
                distance = (F.normalize(x[i], dim=0) - vector / vector.norm()).norm()
                if label == int(labels[i]):
                    positive.append(torch.relu(distance - pos_margin))
                else:
                    negative.append(torch.relu(neg_margin - distance))
        terms = [torch.stack(part)[torch.stack(part) > 0] for part in (positive, negative) if part]
        loss = sum(part.mean() for part in terms if len(part))
    loss.backward()
    return loss.detach(), x.grad, [(vector, label) for vector, label, _, _ in memory]


def stored(memory):
    """Labels in the memory, oldest first."""
    order = [(memory.queue_idx + i) % memory.memory_size for i in range(memory.memory_size)]
    return memory.label_memory[order if memory.has_been_filled else range(memory.queue_idx)].tolist()


@pytest.mark.parametrize("count", [1, 2, 5])  # 5 x 8 rows wrap around the 20 slots of the memory
@pytest.mark.parametrize("enqueue", ["all", "view0"])
def test_memory_loss_equals_its_definition(count, enqueue):
    batches, ours = batches_of(count, 8), criterion(memory_enqueue=enqueue)
    for descriptors, labels in batches:
        loss, gradient = value_and_gradient(ours, descriptors, labels)
    expected, by_hand, memory = dense_contrastive(batches, 20, 0.1, 1.1, 2 * (enqueue == "view0"))
    assert abs(loss - expected) < 1e-5
    assert torch.allclose(gradient.double(), by_hand, atol=1e-5)
    assert stored(ours.memories[0]) == [label for _, label in memory]


def memory_of_rank(rank, enqueue):
    ours = criterion(world_size=2, memory_enqueue=enqueue)
    for descriptors, labels in batches_of(5, 8):
        half = torch.arange(4) + 4 * rank
        if enqueue == "view0":  # two images, view after view
            half = torch.tensor([0, 1, 4, 5]) + 2 * rank
        loss, gradient = value_and_gradient(ours, descriptors[half], labels[half])
    whole = torch.zeros(8, 8)
    whole[half] = gradient
    return loss, whole, stored(ours.memories[0]), ours.memories[0].embedding_memory


@pytest.mark.parametrize("enqueue", ["all", "view0"])
def test_memory_loss_on_two_ranks_equals_its_definition(tmp_path, enqueue):
    parts = spawn(memory_of_rank, tmp_path, enqueue)
    expected, gradient, memory = dense_contrastive(batches_of(5, 8), 20, 0.1, 1.1, 2 * (enqueue == "view0"))
    assert torch.allclose((parts[0][1] + parts[1][1]).double(), gradient, atol=1e-5)
    for loss, _, kept, embeddings in parts:
        assert abs(loss - expected) < 1e-5 and torch.equal(embeddings, parts[0][3])
        assert kept == [label for _, label in memory]


def test_bipartite_miner_in_memory_is_the_memory_of_clean_views():  # notes v13 = v12
    v12, v13 = criterion(memory_enqueue="view0"), criterion(memory_enqueue="view0", miner="bipartite")
    for descriptors, labels in batches_of(3, 8):
        a, b = value_and_gradient(v12, descriptors, labels), value_and_gradient(v13, descriptors, labels)
        assert a[0] == b[0] and torch.equal(a[1], b[1])


def test_crosswise_memories_hold_one_view_each_and_add_up():  # notes v61
    ours, directions = criterion(memory_enqueue="crosswise"), [criterion(memory_enqueue="view0") for _ in range(2)]
    for descriptors, labels in batches_of(3, 8):
        swapped = [torch.cat([descriptors[4:], descriptors[:4]]), torch.cat([labels[4:], labels[:4]])]
        loss, gradient = value_and_gradient(ours, descriptors, labels)
        one = value_and_gradient(directions[0], descriptors, labels)
        other = value_and_gradient(directions[1], *swapped)
        assert abs(loss - one[0] - other[0]) < 1e-6
        assert torch.allclose(gradient, one[1] + torch.cat([other[1][4:], other[1][:4]]), atol=1e-6)


def test_bipartite_pairs_cross_the_views_only():  # notes v11
    x, labels = F.normalize(batches_of(1, 8)[0][0] + 0.3), torch.arange(4).repeat(2)
    assert (torch.pdist(x[:4]) < 1.1).any()  # there are pairs within a view that would count
    loss, gradient = value_and_gradient(criterion(memory_size=0, miner="bipartite"), x, labels)
    y = x.double().requires_grad_()
    distance = (F.normalize(y[:4])[:, None] - F.normalize(y[4:])).norm(dim=2)
    same = torch.eye(4, dtype=bool)
    terms = torch.relu(distance[same] - 0.1), torch.relu(1.1 - distance[~same])
    expected = sum(part[part > 0].mean() for part in terms)
    expected.backward()
    assert abs(loss - expected.item()) < 1e-5 and torch.allclose(gradient.double(), y.grad, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Losses: the library's values from smaller matrices (notes v14, v15), v60, v3, v1


@pytest.mark.parametrize("ours, library", [
    (losses.NTXentLoss(0.1), NTXentLoss(0.1)), (losses.ContrastiveLoss(0.1, 0.7), ContrastiveLoss(0.1, 0.7)),
    (losses.ContrastiveLoss(0.0, 0.7, distance=losses.SNRDistance()),
     SignalToNoiseRatioContrastiveLoss(pos_margin=0.0, neg_margin=0.7))])
def test_loss_over_matrices_equals_the_library(ours, library):
    generator = torch.Generator().manual_seed(2)
    memories = [losses.Memory(loss, 16, 50) for loss in (ours, library)]
    for step in range(5):
        x = F.normalize(torch.randn(6, 16, generator=generator)).repeat(2, 1)
        x[6:] += 0.05 * torch.randn(6, 16, generator=generator)
        (a, da), (b, db) = (value_and_gradient(memory, x, torch.arange(6).repeat(2) + 2 * step)
                            for memory in memories)
        assert abs(a - b) < 1e-5 and torch.allclose(da, db, atol=1e-5) and db.abs().max() > 1e-3


def test_pairs_of_a_miner_are_the_librarys():
    miner = train.MINERS["triplet"](settings(margin=0.3, type_of_triplets="hard"))
    for ours, library in ((losses.ContrastiveLoss(0.1, 0.7), ContrastiveLoss(0.1, 0.7)),
                          (losses.NTXentLoss(0.1), NTXentLoss(0.1))):
        memories = [losses.Memory(loss, 8, 20, miner) for loss in (ours, library)]
        for x, labels in batches_of(3, 8):
            (a, da), (b, db) = (value_and_gradient(memory, x, labels) for memory in memories)
            assert abs(a - b) < 1e-6 and torch.allclose(da, db, atol=1e-6) and db.abs().max() > 1e-4


def test_loss_over_a_memory_of_the_notes_fits_in_4_gib():
    code = """
import resource, sys
from copydet import losses
import torch
for loss in (losses.NTXentLoss(0.1), losses.ContrastiveLoss(0, 0.7, distance=losses.SNRDistance())):
    memory = losses.Memory(loss, 256, 10000)
    memory.add_to_memory(torch.randn(10000, 256), torch.arange(10000) % 5000, 10000)
    memory(torch.randn(256, 256, requires_grad=True), torch.arange(128).repeat(2)).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                          env=WITH_PACKAGE)
    assert int(done.stdout) < 4 * 2**20  # KiB


def test_ntxent_margin_is_taken_off_the_positive():  # notes v60
    x, labels = batches_of(1, 8)[0][0], torch.arange(4).repeat(2)
    loss, _ = value_and_gradient(criterion(loss="ntxent-margin", memory_size=0, temperature=0.5, margin=0.3), x, labels)
    s, terms = (x @ x.T).double(), []
    for a in range(8):
        positive = math.exp((s[a, (a + 4) % 8] - 0.3) / 0.5)
        negatives = sum(math.exp(s[a, n] / 0.5) for n in range(8) if n % 4 != a % 4)
        terms.append(-math.log(positive / (positive + negatives)))
    assert abs(loss - np.mean(terms)) < 1e-5


@pytest.mark.parametrize("degrees", [0, 10, 173.9, 174.6, 179.99, 180])  # pi - 0.1 is 174.27 degrees
def test_arcface_logit_on_both_sides_of_its_boundary(degrees):  # notes v3
    ours, t, m = criterion(loss="arcface", scale=30.0, margin=0.1, dim=2), math.radians(degrees), 0.1
    ours.W.data = torch.tensor([[2.0, 0, -3, 0, 1, 1], [0, 1, 0, -1, 1, -1]])  # lengths do not matter
    x = 5 * torch.tensor([[math.cos(t), math.sin(t)]])
    loss, gradient = value_and_gradient(ours, x, torch.tensor([0]))
    logits = 30 * (F.normalize(x) @ F.normalize(ours.W.data, dim=0))[0].double()
    logits[0] = 30 * (math.cos(t + m) if math.cos(t) > math.cos(math.pi - m)
                      else math.cos(t) - m * math.sin(math.pi - m))
    assert abs(loss - F.cross_entropy(logits, torch.tensor(0))) < 1e-3 * loss + 1e-5 and gradient.isfinite().all()


def test_simsiam_loss_stops_the_gradient_at_the_projection():  # notes v1
    (z1, p1), (z2, p2) = views = [[torch.randn(4, 8, requires_grad=True) for _ in "zp"] for _ in range(2)]
    loss = losses.SimSiamLoss()(views, None)
    loss.backward()
    cosine = lambda p, z: (F.normalize(p) * F.normalize(z)).sum(1).mean()
    assert torch.allclose(loss, -0.5 * (cosine(p1, z2) + cosine(p2, z1)), atol=1e-6)
    assert z1.grad is None and z2.grad is None and p1.grad.abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm over shuffled batches (notes v21)


def shuffled_gradient(rank, order):
    """Gradient, averaged over both processes as by DDP, of images [4, 3] in `order`; shuffled if that is None."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8))
    images, labels = torch.randn(8, 3), torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    if order is None:
        torch.manual_seed(4 + rank)  # rank 0 draws for all
    else:
        images, labels = images[order], labels[order]
    ours = losses.Objective(net, criterion(memory_size=0, processes=2), 2, order is None)
    mine = slice(4 * rank, 4 * rank + 4)
    loss = ours(images[mine], labels[mine])
    loss.backward()
    for p in net.parameters():
        torch.distributed.all_reduce(p.grad)
    return loss.item(), net[0].weight.grad


def shuffled_gradients(rank, orders):
    return [shuffled_gradient(rank, order) for order in orders]


def test_shuffled_batch_norm_trains_as_batches_permuted_by_hand(tmp_path):
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4))
    shuffled, by_hand, plain = zip(*spawn(shuffled_gradients, tmp_path, [None, order, torch.arange(8)]))
    for rank in range(2):
        assert abs(shuffled[rank][0] - by_hand[0][0]) < 1e-6
        assert torch.allclose(shuffled[rank][1], by_hand[rank][1], atol=1e-6)
        assert not torch.allclose(shuffled[rank][1], plain[rank][1], atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# A batch in parts (--accumulate)


def one_step(parts, head, arch):
    torch.manual_seed(0)
    args = settings(arch=arch, head=head, dim=8, accumulate=parts)
    net = build_net(args, False).train()
    ours = losses.Objective(net, train.build_criterion(args, 0, Rank()), 2, False, parts)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        loss = ours(images, torch.arange(4).repeat(2))
    loss.backward()
    return loss.item(), net, ours.criterion.memories[0]


def test_a_batch_in_parts_has_the_same_loss_gradient_and_memory():
    (a, net, memory), (b, net2, memory2) = (one_step(parts, "linear", "test_nfnet") for parts in (1, 4))
    assert abs(a - b) < 1e-5 and memory.queue_idx == memory2.queue_idx == 16
    assert torch.allclose(memory.embedding_memory, memory2.embedding_memory, atol=1e-5)
    for (name, p), (_, q) in zip(net.named_parameters(), net2.named_parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-4 * max(1, p.grad.abs().max())), name


def test_a_batch_in_parts_updates_running_statistics_once_per_part():
    _, net, _ = one_step(2, "linear-bn", "test_efficientnet")
    torch.manual_seed(0)
    by_hand = build_net(settings(arch="test_efficientnet", head="linear-bn", dim=8), False).train()
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        for part in images.chunk(2):
            by_hand(part)
    assert torch.allclose(net.bn.running_mean, by_hand.bn.running_mean, atol=1e-6)
    assert torch.allclose(net.backbone.bn1.running_var, by_hand.backbone.bn1.running_var, atol=1e-6)
