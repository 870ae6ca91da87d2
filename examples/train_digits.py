# python examples/train_digits.py --root runs/digits
"""A small CNN learns scikit-learn's digits. Kill it at any moment and run the same line again: it goes
on where it was, bit for bit. The lines marked `# ckptmgr:` are all that it takes."""

import argparse
import warnings
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr import CheckpointManager  # ckptmgr: the library

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--config", default=CONFIG, help="YAML file with everything about checkpoints")
parser.add_argument("--root", default="runs/digits", help="where checkpoints go: a folder or any fsspec URL")
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--curve", type=Path, help="append 'step loss' to this file, the loss as a hex float")
args = parser.parse_args()

warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata, under a recent torch
torch.set_num_threads(1)  # sums are added in the same order every time
torch.manual_seed(args.seed)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
data = TensorDataset(images, torch.tensor(digits.target))
loader = StatefulDataLoader(data, batch_size=64, shuffle=True)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Dropout(0.3),
    nn.Linear(32 * 4 * 4, 10),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=args.steps)


def endless_batches():
    while True:
        yield from loader


state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
manager = CheckpointManager(args.config, root=args.root)  # ckptmgr: where, when, what to keep: in the YAML file
start = manager.resume(**state)  # ckptmgr: fills every one of them; falsy on a fresh run
print(f"resumed from step {start.step}" if start else "a fresh run", flush=True)

batches = endless_batches()
for step in range(start.step + 1, args.steps + 1):
    x, y = next(batches)
    logits = model(x)
    loss = cross_entropy(logits, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()

    metrics = {"loss": loss.item(), "accuracy": (logits.argmax(1) == y).float().mean().item()}
    if args.curve:
        with args.curve.open("a") as curve:
            curve.write(f"{step} {metrics['loss'].hex()}\n")
    if step % 50 == 0:
        print(f"step {step}: loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.2f}", flush=True)

    manager.maybe_save(state, step, epoch=step // len(loader), metrics=metrics)  # ckptmgr: if due
    if manager.should_stop:  # ckptmgr: SIGTERM came; this step is saved
        break
manager.close()  # ckptmgr: waits for the last save
