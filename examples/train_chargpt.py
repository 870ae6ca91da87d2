# python examples/train_chargpt.py --root runs/chargpt
"""A small GPT learns to write Python, character by character, from Python's own standard library. Kill it
at any moment and run the same line again. The lines marked `# ckptmgr:` are all that it takes."""

import argparse
import math
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from ckptmgr import CheckpointManager  # ckptmgr: the library

CONFIG = Path(__file__).parent.parent / "configs" / "chargpt.yaml"
FILES = ["argparse.py", "ast.py", "dataclasses.py", "datetime.py", "enum.py", "inspect.py", "pathlib.py", "typing.py"]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--config", default=CONFIG, help="YAML file with everything about checkpoints")
parser.add_argument("--root", default="runs/chargpt", help="where checkpoints go: a folder or any fsspec URL")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--curve", type=Path, help="append 'step loss' to this file, the loss as a hex float")
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--context", type=int, default=64, help="characters that the model sees")
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--sample", type=int, default=300, help="characters to write at the end")
args = parser.parse_args()

torch.set_num_threads(1)  # sums are added in the same order every time
torch.manual_seed(args.seed)
device = "cuda" if torch.cuda.is_available() else "cpu"

library = Path(sysconfig.get_path("stdlib"))
text = "".join(path.read_text(encoding="utf-8") for path in map(library.joinpath, FILES) if path.exists())
alphabet = sorted(set(text))
number = {character: i for i, character in enumerate(alphabet)}
data = torch.tensor([number[character] for character in text])


def get_batch():
    starts = torch.randint(len(data) - args.context, (args.batch,)).tolist()
    x = torch.stack([data[i : i + args.context] for i in starts])
    y = torch.stack([data[i + 1 : i + 1 + args.context] for i in starts])
    return x.to(device), y.to(device)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(args.width), nn.LayerNorm(args.width)
        self.qkv, self.out = nn.Linear(args.width, 3 * args.width), nn.Linear(args.width, args.width)
        self.mlp = nn.Sequential(
            nn.Linear(args.width, 4 * args.width), nn.GELU(), nn.Linear(4 * args.width, args.width)
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, args.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.characters = nn.Embedding(len(alphabet), args.width)
        self.positions = nn.Embedding(args.context, args.width)
        self.blocks = nn.Sequential(*(Block() for _ in range(args.layers)))
        self.norm = nn.LayerNorm(args.width)
        self.head = nn.Linear(args.width, len(alphabet), bias=False)
        nn.init.normal_(self.characters.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.head.weight = self.characters.weight  # tied

    def forward(self, x):
        positions = self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(self.characters(x) + positions)))


def learning_rate(done):
    warmup = min(100, args.steps // 10)
    if done < warmup:
        return (done + 1) / (warmup + 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (done - warmup) / max(1, args.steps - warmup)))


model = GPT().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)

state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
manager = CheckpointManager(args.config, root=args.root)  # ckptmgr: where, when, what to keep: in the YAML file
start = manager.resume(**state)  # ckptmgr: fills every one of them; falsy on a fresh run
print(f"resumed from step {start.step}" if start else "a fresh run", flush=True)

for step in range(start.step + 1, args.steps + 1):
    x, y = get_batch()
    loss = cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()

    value = loss.item()
    if args.curve:
        with args.curve.open("a") as curve:
            curve.write(f"{step} {value.hex()}\n")
    if step % 50 == 0:
        print(f"step {step}: loss {value:.4f}", flush=True)

    manager.maybe_save(state, step, metrics={"loss": value})  # ckptmgr: if due
    if manager.should_stop:  # ckptmgr: SIGTERM came; this step is saved
        break
manager.close()  # ckptmgr: waits for the last save

if args.sample:
    model.eval()
    written = data[:1].tolist()
    with torch.no_grad():
        for _ in range(args.sample):
            seen = torch.tensor([written[-args.context :]], device=device)
            chances = model(seen)[0, -1].softmax(0)
            written.append(int(torch.multinomial(chances, 1)))
    print("".join(alphabet[i] for i in written))
