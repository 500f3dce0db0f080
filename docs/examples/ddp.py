"""Replicas: ``torchrun --nproc-per-node 2 docs/examples/ddp.py``."""

import torch
import torch.distributed as dist
from digits import EPOCHS, Net, accuracies, batches, losses_of, report
from torch.nn.parallel import DistributedDataParallel

import gradbal
from gradbal.lab.problems.pictures import two_digits

dist.init_process_group("gloo")  # on GPUs "nccl", and each process moves all to its own
rank, size = dist.get_rank(), dist.get_world_size()
train, _, test = two_digits(seed=0)
torch.manual_seed(0)
net = DistributedDataParallel(Net())
optimizer = gradbal.MTLOptimizer(torch.optim.AdamW(net.parameters(), lr=3e-3), "upgrad")
for epoch in range(EPOCHS):
    for batch in batches(train, epoch, rank, size):
        optimizer.step(losses_of(net, batch))
    scores = accuracies(net, test)
    if rank == 0:
        report(epoch, scores, optimizer)
dist.destroy_process_group()
