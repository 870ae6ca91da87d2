# torchrun --nproc-per-node 2 examples/train_fsdp.py --root runs/digits-fsdp
"""A residual MLP learns scikit-learn's digits, its weights and optimizer sharded over all processes by FSDP2: on GPUs
over NCCL where there are some, else on CPUs over gloo. Kill one or all of them at any moment and run the same line
again, on as many processes as you have left. The lines marked `# ckptmgr:` are the same as for one process."""

import argparse
import hashlib
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DistributedSampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr import CheckpointManager  # ckptmgr: the library

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--config", default=CONFIG, help="YAML file with everything about checkpoints")
parser.add_argument("--root", default="runs/digits-fsdp", help="where checkpoints go: a folder or any fsspec URL")
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--batch", type=int, default=64, help="images per step, of all ranks together")
parser.add_argument("--blocks", type=int, default=4)
parser.add_argument("--width", type=int, default=64)
args = parser.parse_args()

warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata, under a recent torch
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
# A torchrun that restarts keeps its store, and in it the addresses of the dead ranks: look elsewhere each time.
store, rank, ranks = next(dist.rendezvous("env://"))
store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
dist.init_process_group(store=store, rank=rank, world_size=ranks)
torch.set_num_threads(1)  # sums are added in the same order every time
torch.manual_seed(args.seed)  # the first weights, the same on every rank

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32) / 16
data = TensorDataset(images, torch.tensor(digits.target))
sampler = DistributedSampler(data, seed=args.seed)
loader = StatefulDataLoader(data, batch_size=args.batch // ranks, sampler=sampler, drop_last=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(args.width),
            nn.Linear(args.width, 4 * args.width),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(4 * args.width, args.width),
        )

    def forward(self, x):
        return x + self.layers(x)


blocks = [Block() for _ in range(args.blocks)]
model = nn.Sequential(nn.Flatten(), nn.Linear(64, args.width), *blocks, nn.Linear(args.width, 10)).to(device)
mesh = init_device_mesh(device.type, (ranks,))
for part in [*blocks, model]:
    fully_shard(part, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=args.steps)
torch.manual_seed(args.seed + rank)  # every rank drops out others


def batches_after(step):
    while True:
        sampler.set_epoch(step // len(loader))
        for x, y in loader:  # after a resume, the rest of the epoch
            yield x.to(device), y.to(device)
            step += 1


state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
manager = CheckpointManager(args.config, root=args.root)  # ckptmgr: every rank makes the same calls
start = manager.resume(**state)  # ckptmgr: each rank's part, also of a checkpoint from more or fewer ranks
if rank == 0:
    print(f"resumed from step {start.step}" if start else "a fresh run", flush=True)

step, batches = start.step, batches_after(start.step)
for step in range(start.step + 1, args.steps + 1):
    x, y = next(batches)
    loss = cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()

    if step % 50 == 0 and rank == 0:
        print(f"step {step}: loss {loss.item():.4f}", flush=True)

    manager.maybe_save(state, step, epoch=step // len(loader), metrics={"loss": loss.item()})  # ckptmgr: if due
    if manager.should_stop:  # ckptmgr: a signal came to one of the ranks; this step is saved
        break
manager.close()  # ckptmgr: waits for the last save

weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    content = b"".join(weight.numpy().tobytes() for weight in weights.values())
    print(f"weights after step {step}: {hashlib.sha256(content).hexdigest()[:16]}", flush=True)
del state, model, blocks, part, optimizer, scheduler  # FSDP's before its process group
dist.barrier()
dist.destroy_process_group()
