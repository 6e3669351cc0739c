"""Starting a rank under torchrun: its device and the process group."""

import os

import torch
import torch.distributed as dist


def start(ranks: int) -> torch.device:
    """Joins the process group that torchrun describes, which must have `ranks` ranks; returns this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    if dist.get_world_size() != ranks:
        raise SystemExit(f"this script runs on {ranks} ranks, not {dist.get_world_size()}")
    return device
