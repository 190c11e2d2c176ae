"""One of two processes whose decoder layers are sharded (FSDP2): scores a forest and writes the gradients.

Started by torchrun; the argument is the file that the first process writes.
"""

import os
import sys

import torch
import torch.distributed as dist
from tiny_models import EXAMPLES
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from spl.data.collate import collate
from spl.logprobs.lora import FusedLinear
from spl.logprobs.score import base_of, prepare, score
from spl.models import load_policy

if __name__ == "__main__":
    dist.init_process_group("gloo")
    policy = load_policy("tiny", gradient_checkpointing=True, lora_layer=FusedLinear)
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if dist.get_world_size() > 1:
        for layer in base_of(policy).model.layers:
            fully_shard(layer)
    prepare(policy, "forest")
    logps = score(policy, collate(EXAMPLES)).logps  # both processes score the same, so the mean gradient is its own
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    gradients = {}
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            gradients[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    if dist.get_rank() == 0:
        torch.save({"logps": logps.detach(), "gradients": gradients}, sys.argv[1])
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way
