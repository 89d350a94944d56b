"""Makes the demo model: `python -m camserve.server.demo.train --out model.pt`.

Arrives: a seed, a number of pictures and of rounds. Leaves: a scripted archive, and its figures on families it has never
seen, printed beside those of a classifier that sees colour alone. Run by whoever changes the generator or the network;
docs/demo-model.md holds the printed figures of the shipped file.
"""

# ruff: noqa: F722
# jaxtyping writes shapes as strings that are no Python.

from __future__ import annotations

import functools
import multiprocessing
import time
from pathlib import Path

import click
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from camserve.server.demo.baseline import histogram_accuracy
from camserve.server.demo.evaluate import Figures, evaluate, normalised
from camserve.server.demo.network import SurfaceNet, front, tail
from camserve.server.demo.surfaces import LABELS, TRAINING_FAMILIES, Surface, surface_at, test_set

__all__ = ["fit", "main", "training_set"]

# A flaw covers a few of the 400 cells, so that the average alone hardly moves when one is found and nothing is learned for
# many rounds. A second loss on the strongest cells teaches from the first round, from class labels alone: no mask is used.
_CELLS = 8
_SCALE = 8


def training_set(count: int, seed: int = 0, workers: int = 1) -> list[Surface]:
    """Makes pictures of the training families; the workers do not change them.

    Args:
        count: how many; a multiple of 60 is balanced over classes and families.
        seed: which series.
        workers: processes to share the work among.
    """
    make = functools.partial(surface_at, seed=seed, families=TRAINING_FAMILIES)
    if workers == 1:
        return [make(index) for index in range(count)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(make, range(count), chunksize=50)


def _varied(inputs: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """Turns and mirrors each row, swaps its colour channels and changes its brightness a little."""
    rows = []
    for row in inputs:
        turns, mirrored = torch.randint(0, 8, (1,), generator=generator).item() % 4, torch.rand((), generator=generator)
        turned = torch.rot90(row, int(turns), (1, 2))
        turned = turned.flip(2) if mirrored < 0.5 else turned
        rows.append(turned[torch.randperm(3, generator=generator)])
    gain = 1 + 0.1 * torch.randn(len(inputs), 1, 1, 1, generator=generator)
    offset = 0.2 * torch.randn(len(inputs), 3, 1, 1, generator=generator)
    return torch.stack(rows) * gain + offset


def _strongest(model: SurfaceNet, features: Float[Tensor, "b c i j"]) -> Float[Tensor, "b n"]:
    """Scores each class by its `_CELLS` strongest cells, by the weights that also score the average of all cells."""
    maps = torch.einsum("bcij,nc->bnij", features, model.fc.weight)
    return maps.flatten(2).topk(_CELLS, dim=2).values.mean(2) / _SCALE + model.fc.bias


def fit(surfaces: list[Surface], *, rounds: int, seed: int, rows: int = 32) -> nn.Module:
    """Fits a network.

    Args:
        surfaces: pictures to learn from.
        rounds: how often each picture is seen.
        seed: of the weights, the order and the variations.
        rows: batch size.

    Returns:
        The network in evaluation mode.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    # On the CPUs this was measured on, channels-last trains five times as fast.
    model = SurfaceNet(len(LABELS)).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = len(surfaces) // rows
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=rounds * steps, pct_start=0.2)
    # With smoothed labels no single cell can push a logit ever further; maps stay broader than one cell.
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    start = time.monotonic()
    for number in range(rounds):
        order = torch.randperm(len(surfaces), generator=generator).tolist()
        losses, right = [], 0
        for step in range(steps):
            batch = [surfaces[index] for index in order[step * rows : (step + 1) * rows]]
            inputs = _varied(normalised(batch), generator).contiguous(memory_format=torch.channels_last)
            labels: Int[Tensor, " b"] = torch.tensor([surface.label for surface in batch])
            features = front(model, inputs)
            logits = tail(model, features)
            loss = criterion(logits, labels) + criterion(_strongest(model, features), labels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            right += int((logits.argmax(1) == labels).sum())
        seconds = time.monotonic() - start
        accuracy = right / (steps * rows)
        click.echo(f"round {number + 1}/{rounds}: loss {np.mean(losses):.3f}, accuracy {accuracy:.3f}, {seconds:.0f} s")
    return model.to(memory_format=torch.contiguous_format).eval()


def report(figures: Figures, baseline: dict[str, float]) -> str:
    """Writes the figures as a few lines of text."""
    lines = [
        f"{figures.count} pictures of families never seen in training",
        f"accuracy                    {figures.accuracy:.3f}",
        *(f"pointing game, {method:<12} {rate:.3f}" for method, rate in figures.pointing.items()),
        f"pointing game, chance       {figures.chance:.3f}",
        *(f"colour, {name:<19} {rate:.3f}" for name, rate in baseline.items()),
        "true class (rows) by predicted class (columns):",
        " " * 8 + "".join(f"{label:>8}" for label in LABELS),
        *(f"{LABELS[row]:<8}" + "".join(f"{n:>8}" for n in counts) for row, counts in enumerate(figures.confusion)),
    ]
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Archive to write.")
@click.option("--count", default=7200, show_default=True, help="Training pictures to generate.")
@click.option("--rounds", default=4, show_default=True, help="How often each picture is seen.")
@click.option("--test-count", default=1000, show_default=True, help="Test pictures; a multiple of 20.")
@click.option("--seed", default=0, show_default=True, help="Of pictures and weights.")
@click.option("--workers", default=2, show_default=True, help="Processes that generate pictures.")
def main(out: Path, count: int, rounds: int, test_count: int, seed: int, workers: int) -> None:
    """Trains the demo model and prints its figures."""
    start = time.monotonic()
    surfaces = training_set(count, seed, workers)
    click.echo(f"{count} training pictures in {time.monotonic() - start:.0f} s")
    model = fit(surfaces, rounds=rounds, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    archive = torch.jit.script(model)
    archive.save(str(out))  # type: ignore[no-untyped-call]  # Untyped upstream.
    click.echo(f"{out}: {out.stat().st_size / 1e6:.2f} MB")
    test = test_set(test_count)
    # The archive is judged, not the network it came from: it is what is shipped.
    shipped = torch.jit.load(str(out))  # type: ignore[no-untyped-call]  # Untyped upstream.
    click.echo(report(evaluate(shipped, test), histogram_accuracy(surfaces, test)))


if __name__ == "__main__":
    main()
