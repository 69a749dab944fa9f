"""Train an embedding table whose rows are distributed over processes; each process updates its own rows.

    torchrun --nproc-per-node 2 examples/distributed_embeddings.py        # gloo on CPUs, NCCL where there are GPUs

Row i of the table belongs to process i mod k. For its part of a batch a process requests the rows it needs from their
owners, computes, and sends the gradient of each lookup back; the owner sums those of a row and updates it with
row-sparse AdaGrad. Communication uses all_to_all_single of torch.distributed. Training needs nothing as large as the
table, and rows that nobody looked up are not sent.

Gradients arrive by rank, and within a rank in the order of its lookups: in the order of the whole batch. This library
sums the gradients of a row in this order, so the table equals the result of one process bit for bit. At the end process
0 trains alone on the same batches to show this.

The task is to predict whether a user likes an item. Both have hidden tastes, and both have a row in the table (even
rows are users, odd rows items); the model's log-odds are the inner product of the two rows.

Needs PyTorch and tqdm; from a clone:  pip install ".[torch,examples]"
"""

import argparse
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as log_loss
from tqdm import tqdm

from adagrad.torch import Adagrad

OPTIONS = {"lr": 0.1, "weight_decay": 1e-6}


class RowSharded:
    """A table of ``count * k`` rows, of which each of k processes holds ``count``."""

    def __init__(self, count: int, columns: int, device: torch.device) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        generator = torch.Generator().manual_seed(self.rank)
        self.weight = nn.Parameter(torch.randn(count, columns, generator=generator).div_(10).to(device))
        self.sent = 0  # bytes that went to other processes

    def exchange(self, tensor: Tensor, give: list[int], take: list[int]) -> Tensor:
        """Send each process its share of the rows of ``tensor``; return the rows received, in the order of ranks."""
        out = tensor.new_empty(sum(take), *tensor.shape[1:])
        dist.all_to_all_single(out, tensor.contiguous(), take, give)
        self.sent += (sum(give) - give[self.rank]) * tensor[:1].numel() * tensor.element_size()
        return out

    def look_up(self, ids: Tensor) -> Tensor:
        """Return the rows with these numbers from all processes."""
        owner = ids % self.world
        self.order = owner.argsort(stable=True)  # stable: occurrences of a row stay in the order of the batch
        counts = owner.bincount(minlength=self.world)
        ones = [1] * self.world
        self.give, self.take = counts.tolist(), self.exchange(counts, ones, ones).tolist()
        self.asked = self.exchange(ids[self.order] // self.world, self.give, self.take)
        rows = torch.empty(len(ids), self.weight.shape[1], device=ids.device)
        rows[self.order] = self.exchange(self.weight.detach()[self.asked], self.take, self.give)
        return rows.requires_grad_()

    def backward(self, gradient: Tensor) -> None:
        """Send the gradient of the rows that were looked up to their owners."""
        values = self.exchange(gradient[self.order], self.give, self.take)
        # Duplicate rows are not summed before sending: that would save bytes, but add in another order than one process
        # does.
        self.weight.grad = torch.sparse_coo_tensor(self.asked[None], values, self.weight.shape, check_invariants=False)

    def gather(self) -> Tensor:
        """Return the whole table, for the comparison: a real one would not fit in one process."""
        parts = [torch.empty_like(self.weight) for _ in range(self.world)]
        dist.all_gather(parts, self.weight.detach())
        return torch.stack(parts, 1).flatten(0, 1)


def batch(step: int, rank: int, size: int, tastes: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a process's part of a batch: pairs of row numbers, and whether the user liked the item."""
    generator = torch.Generator().manual_seed(1 + step * 1_000_003 + rank)
    popularity = torch.rand(size, 2, generator=generator) ** 3  # a few occur often, most rarely
    pairs = (popularity * (len(tastes) // 2)).long() * 2 + torch.tensor([0, 1])
    odds = (tastes[pairs[:, 0]] * tastes[pairs[:, 1]]).sum(1)
    likes = torch.rand(size, generator=generator) < odds.sigmoid()
    return pairs.to(device), likes.float().to(device)


def loss_and_gradient(rows: Tensor, likes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the loss of rows (user, item, user, item, ...), a mean over a batch of ``size``, and its gradient."""
    user, item = rows.unflatten(0, (-1, 2)).unbind(1)
    loss = log_loss((user * item).sum(1), likes, reduction="sum") / size
    return loss.detach(), torch.autograd.grad(loss, rows)[0]


def train_alone(weight: Tensor, steps: int, size: int, world: int, tastes: Tensor) -> Tensor:
    """Train in one process: an ordinary table, the whole batch at once."""
    weight = nn.Parameter(weight)
    optimizer = Adagrad([weight], **OPTIONS)
    for step in tqdm(range(steps), desc="one process", unit="step", disable=None):
        ids, gradients = [], []
        for rank in range(world):  # in the same parts: PyTorch's sums may depend on their length
            pairs, likes = batch(step, rank, size // world, tastes, weight.device)
            ids.append(pairs.flatten())
            gradients.append(loss_and_gradient(weight.detach()[ids[-1]].requires_grad_(), likes, size)[1])
        weight.grad = torch.sparse_coo_tensor(
            torch.cat(ids)[None], torch.cat(gradients), weight.shape, check_invariants=False
        )
        optimizer.step()
    return weight.detach()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an embedding table distributed over processes by rows.")
    parser.add_argument("--rows", type=int, default=20_000, help="rounded up to be even in each (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=4096, help="pairs in a batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    options = parser.parse_args()
    if min(options.rows, options.columns, options.pairs, options.steps) < 1:
        parser.error("--rows, --columns, --pairs and --steps must be >= 1")
    if "RANK" not in os.environ:
        parser.error("start it with: torchrun --nproc-per-node 2 examples/distributed_embeddings.py")
    return options


def main() -> None:
    options = parse_arguments()
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    count = 2 * -(-options.rows // (2 * world))
    size = world * -(-options.pairs // world)
    tastes = torch.randn(count * world, 4, generator=torch.Generator().manual_seed(0))

    table = RowSharded(count, options.columns, device)
    start = table.gather()
    optimizer = Adagrad([table.weight], **OPTIONS)
    losses, began = [], time.perf_counter()
    for step in tqdm(range(options.steps), desc=f"{world} processes", unit="step", disable=True if rank else None):
        pairs, likes = batch(step, rank, size // world, tastes, device)
        loss, gradient = loss_and_gradient(table.look_up(pairs.flatten()), likes, size)
        table.backward(gradient)
        optimizer.step()
        losses.append(loss)
    seconds = time.perf_counter() - began

    mean = torch.stack(losses)
    dist.all_reduce(mean)
    sent = torch.tensor(table.sent, device=device)
    dist.all_reduce(sent)
    trained = table.gather()
    equal = True
    if rank == 0:
        lookups, rest = 2 * size / world, 1 - 1 / world
        predicted = lookups * rest * (8 + 2 * 4 * options.columns)  # a row number, a row, a gradient
        print(f"table of {count * world:,} x {options.columns} in {world} processes on {device.type}")
        print(f"loss {mean[:10].mean():.4f} -> {mean[-10:].mean():.4f} in {options.steps} steps, {seconds:.1f} s")
        bytes_sent = int(sent) // (world * options.steps)
        print(f"sent {bytes_sent:,} bytes a process and step; the model predicts {predicted:,.0f}")
        equal = torch.equal(trained, train_alone(start, options.steps, size, world, tastes))
        print("equal to one process, bit for bit" if equal else "NOT equal to one process")
    dist.barrier()  # the others wait for process 0 before they exit
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(not equal)  # gloo's threads sometimes abort a process that ends as usual


if __name__ == "__main__":
    main()
