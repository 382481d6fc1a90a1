"""A stranger's training loop: a small masked model learns a teacher's distributions from decoded rows, without tide.

    tide cache-to-datasets cache rows --temperature 1.0
    python examples/train_elsewhere.py rows/data

It needs torch and pyarrow alone. The loss of one target is the cross-entropy -sum p_i log s_i over the tokens that the
teacher's row names, plus one category for everything else: -tail log(1 - sum s_i). The teacher's own entropy is what
a perfect student would reach, so it is printed beside it.
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import nn


class Filler(nn.Module):
    """Reads both directions and says what stands behind the masks: ids [b, l] -> logits [b, l, v]."""

    def __init__(self, vocab_size: int, max_length: int, width: int = 64) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocab_size, width), nn.Embedding(max_length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits for every position."""
        return self.head(self.layers(self.token(ids) + self.place.weight[: ids.shape[1]]))


def row_loss(logp: torch.Tensor, row: dict) -> tuple[torch.Tensor, float]:
    """Sums over the row's targets: the student's cross-entropy (nats) and the teacher's entropy.

    Args: logp: [l, v], the student's log-probabilities at the temperature of the row.
    """
    loss, entropy = logp.new_zeros(()), 0.0
    targets = zip(row["target_position"], row["top_ids"], row["top_probabilities"], row["tail_mass"], strict=True)
    for position, ids, probabilities, tail in targets:
        p = torch.tensor([*probabilities, tail])
        kept = logp[position, ids]
        rest = torch.log((1 - kept.exp().sum()).clamp_min(1e-6))
        loss = loss - (p * torch.cat([kept, rest[None]])).sum()
        entropy -= float((p * p.clamp_min(1e-12).log()).sum())
    return loss, entropy


def train(folder: Path, *, epochs: int, lr: float = 3e-3, batch: int = 8) -> list[float]:
    """Mean loss per target of every epoch, in nats."""
    torch.manual_seed(0)
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    rows = [row for row in rows if row["target_position"]]
    vocab_size = 1 + max(max(row["x_0"] + row["x_t"] + [i for ids in row["top_ids"] for i in ids]) for row in rows)
    model = Filler(vocab_size, max(len(row["x_0"]) for row in rows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    history = []
    for epoch in range(epochs):
        total, floor, count = 0.0, 0.0, 0
        order = torch.randperm(len(rows)).tolist()
        for start in range(0, len(order), batch):
            chosen = [rows[i] for i in order[start : start + batch]]
            losses, entropies = zip(*(row_loss(_logp(model, row), row) for row in chosen), strict=True)
            num_targets = sum(len(row["target_position"]) for row in chosen)
            loss = torch.stack(losses).sum()
            optimizer.zero_grad()
            (loss / num_targets).backward()
            optimizer.step()
            total, floor, count = total + float(loss.detach()), floor + sum(entropies), count + num_targets
        history.append(total / count)
        print(f"epoch {epoch}: {history[-1]:.3f} nats a target; the teacher's own entropy is {floor / count:.3f}")
    return history


def _logp(model: Filler, row: dict) -> torch.Tensor:
    logits = model(torch.tensor(row["x_t"])[None])[0]
    return torch.log_softmax(logits / row["temperature"], dim=-1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small model on decoded rows.")
    parser.add_argument("folder", type=Path, help="folder of Parquet files")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    train(arguments.folder, epochs=arguments.epochs)
