# torchrun --nproc-per-node 2 examples/train_ddp.py --root runs/digits-ddp
"""The CNN of train_digits.py, trained by several processes: on GPUs over NCCL where there are some, else on CPUs
over gloo. Kill one or all of them at any moment and run the same line again, or have torchrun do it by itself
(--max-restarts 3). The lines marked `# ckptmgr:` are all that it takes, and the same as for one process."""

import argparse
import hashlib
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr import CheckpointManager  # ckptmgr: the library

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--config", default=CONFIG, help="YAML file with everything about checkpoints")
parser.add_argument("--root", default="runs/digits-ddp", help="where checkpoints go: a folder or any fsspec URL")
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--batch", type=int, default=64, help="images per step, of all ranks together")
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
torch.manual_seed(args.seed + rank)  # every rank drops out others; the first weights are those of rank 0

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
data = TensorDataset(images, torch.tensor(digits.target))
sampler = DistributedSampler(data, seed=args.seed)
loader = StatefulDataLoader(data, batch_size=args.batch // ranks, sampler=sampler, drop_last=True)

layers = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Dropout(0.3),
    nn.Linear(32 * 4 * 4, 10),
)
# DDP lays its buckets out anew after the first step, which more than two ranks then add up in another order: a resumed
# run would differ in the last bits. Not with this flag; leave it out where that does not matter.
model = DistributedDataParallel(layers.to(device), find_unused_parameters=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=args.steps)


def batches_after(step):
    while True:
        sampler.set_epoch(step // len(loader))
        for x, y in loader:  # after a resume, the rest of the epoch
            yield x.to(device), y.to(device)
            step += 1


state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
manager = CheckpointManager(args.config, root=args.root)  # ckptmgr: every rank makes the same calls
start = manager.resume(**state)  # ckptmgr: the same step on every rank; falsy on a fresh run
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

if rank == 0:
    weights = b"".join(weight.cpu().numpy().tobytes() for weight in layers.state_dict().values())
    print(f"weights after step {step}: {hashlib.sha256(weights).hexdigest()[:16]}", flush=True)
dist.barrier()
dist.destroy_process_group()
