"""Shards: ``torchrun --nproc-per-node 2 docs/examples/fsdp2.py``."""

import torch
import torch.distributed as dist
from digits import EPOCHS, Net, accuracies, batches, losses_of, report
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradbal
from gradbal.lab.problems.pictures import two_digits

dist.init_process_group("gloo")  # on GPUs "nccl", a mesh of "cuda", and each process moves data
rank, size = dist.get_rank(), dist.get_world_size()
train, _, test = two_digits(seed=0)
torch.manual_seed(0)  # the shards must be those of one network
net, mesh = Net(), init_device_mesh("cpu", (size,))
for part in (net.trunk, net):
    fully_shard(part, mesh=mesh)
optimizer = gradbal.MTLOptimizer(torch.optim.AdamW(net.parameters(), lr=3e-3), "upgrad")
for epoch in range(EPOCHS):
    for batch in batches(train, epoch, rank, size):
        optimizer.step(losses_of(net, batch))
    scores = accuracies(net, test)
    if rank == 0:
        report(epoch, scores, optimizer)
dist.destroy_process_group()
