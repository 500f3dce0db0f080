"""Layers in parts: ``torchrun --nproc-per-node 2 docs/examples/tensor_parallel.py``."""

import torch
import torch.distributed as dist
from digits import EPOCHS, Net, accuracies, batches, losses_of, report
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gradbal
from gradbal.lab.problems.pictures import two_digits

dist.init_process_group("gloo")  # on GPUs "nccl", a mesh of "cuda", and each process moves data
train, _, test = two_digits(seed=0)
torch.manual_seed(0)  # what is not in parts must be the same everywhere
net, mesh = Net(), init_device_mesh("cpu", (dist.get_world_size(),))
parallelize_module(net.trunk, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
optimizer = gradbal.MTLOptimizer(torch.optim.AdamW(net.parameters(), lr=3e-3), "upgrad")
for epoch in range(EPOCHS):
    for batch in batches(train, epoch):  # all processes work on the same samples
        optimizer.step(losses_of(net, batch))
    scores = accuracies(net, test)
    if dist.get_rank() == 0:
        report(epoch, scores, optimizer)
dist.destroy_process_group()
