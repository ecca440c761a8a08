"""Table of all models and their costs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from models.config import ModelConfig
from models.contracts import Stage
from models.cost import Cost, cost
from models.published import count_parameters
from models.registry import ENCODERS, HEADS, all_pairs, build_model, check_config, check_sizes


@dataclass(frozen=True)
class Entry:
    """A line of the table."""

    config: ModelConfig
    """The model."""
    cost: Cost | None
    """Cost of our form; None if it cannot take these sizes."""
    published_parameters: int | None
    """Parameters of its published form, unused ones included; None if that form does not support these options."""
    four_bands: str
    """``yes``, or the reason why it does not take 4 bands at a ratio of 4."""


def catalogue(like: ModelConfig, lr_size: int, hr_size: int) -> Iterator[Entry]:
    """Yield every pair, encoder and head, other options as in ``like``, for a chip of these sides in pixels."""
    for encoder, head in all_pairs():
        yield entry(replace(like, encoder=encoder, head=head), lr_size, hr_size)


def entry(config: ModelConfig, lr_size: int, hr_size: int) -> Entry:
    """Return the line of one model."""
    lr, pan = (lr_size, lr_size), (hr_size, hr_size)
    try:
        found = cost(config, lr, pan)
    except ValueError:
        found = None
    try:
        published = replace(config, published=True)
        check_sizes(published, lr, pan)
        with torch.device("meta"):
            return Entry(config, found, count_parameters(build_model(published)), takes_four_bands(config))
    except ValueError:
        return Entry(config, found, None, takes_four_bands(config))


def takes_four_bands(config: ModelConfig) -> str:
    """Return ``yes`` if a model takes 4 bands at a ratio of 4, chips of 50 and 200 px, else the reason."""
    try:
        four = replace(config, bands=4)
        check_config(four)
        check_sizes(four, (50, 50), (200, 200))
    except ValueError as error:
        return str(error)
    return "yes"


HEADINGS = ("encoder", "head", "parameters", "published", "GFLOP", "activations, MiB", "4 bands at 4x")


def cells(of: Entry) -> tuple[str, ...]:
    """Return the cells of HEADINGS; a dash stands for an absent value."""
    published = "-" if of.published_parameters is None else f"{of.published_parameters:,}"
    names = (of.config.encoder, of.config.head)
    if of.cost is None:
        return (*names, "-", published, "-", "-", of.four_bands)
    flops, memory = f"{of.cost.flops / 1e9:.1f}", f"{of.cost.activation_bytes / 2**20:,.0f}"
    return (*names, f"{of.cost.parameters:,}", published, flops, memory, of.four_bands)


def as_text(texts: Sequence[str]) -> str:
    """Return cells or headings as a line for a terminal."""
    encoder, head, *numbers = texts
    return f"{encoder:<12}{head:<12}" + "".join(f"{number:>18}" for number in numbers)


def as_markdown(entries: Sequence[Entry], lr_size: int, hr_size: int) -> str:
    """Return the page docs/models.md: a description of each stage, then the table of ``entries``."""
    like = entries[0].config
    stages: list[tuple[str, type[Stage]]] = [*ENCODERS.items(), *HEADS.items()]
    return "\n".join(
        [
            "# Models",
            "",
            "Written by `satfusion models --markdown`, for the sizes below.",
            "",
            *(f"- **{name}**: {' '.join((inspect.getdoc(kind) or '').split())}" for name, kind in stages),
            "",
            "Costs of one chip:",
            f"{like.revisits} revisits of {like.bands} x {lr_size} x {lr_size}, PAN of {hr_size} x {hr_size}, width"
            f" {like.hidden}, zoom {like.zoom}.",
            "*Parameters* are the trained ones; *published* counts all of the published code, unused ones included.",
            "GFLOP count a forward pass: two operations per multiply-add of convolutions, matrix products, attention",
            "and scans, and nothing else. *Activations* are its float32 memory for the backward pass.",
            "*4 bands at 4x* tells whether a model takes red, green, blue and near infrared at ratio 4 (chips of",
            "50 and 200 px). Any other number of bands, ratio and size is checked in the same way before a run begins.",
            "ARConv chooses its kernels during training, and is counted with its initial 3 x 3 kernels.",
            "",
            f"| {' | '.join(HEADINGS)} |",
            "|---|---|" + "---:|" * (len(HEADINGS) - 2),
            *(f"| {' | '.join(cells(entry))} |" for entry in entries),
            "",
        ]
    )
