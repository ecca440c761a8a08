"""Export of a run's weights: safetensors, configuration and model card, and on request a program of `torch.export`."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import msgspec
import torch
from torch import Tensor, nn

from models.exported import FACTS, WEIGHTS, to_exported
from models.satfusion import SatFusion
from pipeline.data import ChipDataset
from pipeline.networks import Weights, load_weights
from pipeline.prediction.preparation import training_dataset
from pipeline.training.checkpoint import Checkpoint, read_checkpoint, select_checkpoint
from sharding.errors import UserError
from sharding.schema import Sha256, decode
from sharding.storage import NotFoundError, Storage, open_storage
from sharding.terminal import escaped

logger = logging.getLogger(__name__)

CARD, PROGRAM = "MODEL_CARD.md", "model.pt2"
NAMES = (WEIGHTS, CARD, PROGRAM, FACTS)
SAME = 1e-5
"""Largest difference of a program's image to the network's, relative to the largest value."""


def export_run(
    run_uri: str,
    checkpoint: str,
    to: str,
    *,
    weights: Weights = "raw",
    program: bool = False,
    overwrite: bool = False,
) -> tuple[str, list[str]]:
    """Write a checkpoint's weights into a folder of their own; ``model.json`` comes last.

    Args:
        run_uri: Run folder.
        checkpoint: ``best``, ``last`` or a step.
        to: Folder, local or s3://.
        weights: ``raw``, or ``ema`` for their moving average.
        program: Also write a program of `torch.export`, for chips of the training's size.
        overwrite: Replace another exported model, and a card that was edited.

    Returns:
        The folder and the names of the files written.

    Raises:
        UserError: No such run or checkpoint, no average, the model cannot become a program, or the folder holds
            something else.
    """
    run = open_storage(run_uri)
    found = read_checkpoint(run, select_checkpoint(run, checkpoint))
    network = load_weights(found, weights).eval()
    dataset = training_dataset(found)
    facts, files = _facts(found, weights, dataset), {}
    if program:
        if dataset is None:
            raise UserError(
                f"--program needs the size of the training's chips, and its dataset {found.config.data.uri} is not "
                "there: restore it, or drop --program"
            )
        files[PROGRAM], facts["program_chips"] = make_program(network, facts["lr_window"], facts["hr_window"])
    files |= to_exported(network, found.position.step, facts)
    files[CARD] = _card(found, facts).encode()
    folder = open_storage(to)
    _refuse_others(folder, files, overwrite)
    if not overwrite and folder.exists(CARD):  # it may be edited
        _keep_card(folder, files.pop(CARD))
    # After an interruption an earlier model.json tells the next call that the files are ours, and readers that they do
    # not fit it; where there is none, the weights tell the next call, so they come first.
    folder.delete(PROGRAM)
    for name in sorted(files, key=NAMES.index):
        folder.write(name, files[name])
    return folder.uri, sorted(files)


def make_program(network: SatFusion, lr_size: int, hr_size: int) -> tuple[bytes, int | None]:
    """Return a program of `torch.export` that maps (lr, pan, revisit) to the fused image.

    Args:
        network: The network, in evaluation mode.
        lr_size: Side of the revisits, pixels.
        hr_size: Side of PAN, pixels.

    Returns:
        The program, and the only number of chips that it takes: None for any number, else 1, because PyTorch fixes the
        number for some models.

    Raises:
        UserError: PyTorch cannot export this model, or the program computes something else.
    """
    try:
        return _program(network, lr_size, hr_size, traced=2, tried=3), None
    except _ProgramError:
        pass
    try:
        return _program(network, lr_size, hr_size, traced=1, tried=1), 1
    except _ProgramError as error:
        pair = f"{network.config.encoder}+{network.config.head}"
        raise UserError(f"PyTorch cannot export {pair} ({error}): drop --program") from error


class _ProgramError(Exception):
    """Error of a program that cannot be made, or that computes something else than its network."""


@torch.no_grad()
def _program(network: SatFusion, lr_size: int, hr_size: int, *, traced: int, tried: int) -> bytes:
    """Return the program traced with ``traced`` chips and compared with the network on ``tried`` other chips."""

    def chips(number: int) -> tuple[Tensor, Tensor, Tensor]:
        lr = torch.rand(number, network.config.revisits, network.config.bands, lr_size, lr_size)
        return lr, torch.rand(number, 1, hr_size, hr_size), torch.zeros(number, dtype=torch.int64)

    shapes = ({0: torch.export.Dim.AUTO},) * 3 if traced != tried else None
    buffer = io.BytesIO()
    try:
        made = torch.export.export(_Fused(network), chips(traced), dynamic_shapes=shapes, strict=False)
        torch.export.save(made, buffer)
        images = chips(tried)
        expected = network(*images).fused
        difference = (made.module()(*images) - expected).abs().max() / expected.abs().max()
    except Exception as error:  # torch.export has no base class of its errors
        raise _ProgramError(next(iter(str(error).splitlines()), type(error).__name__)) from error
    if not difference <= SAME:
        raise _ProgramError(f"the program differs from the network by {difference:.1e}")
    return buffer.getvalue()


class _Fused(nn.Module):
    """The network with its fused image as the only result."""

    def __init__(self, network: SatFusion) -> None:
        super().__init__()
        self.network = network

    def forward(self, lr: Tensor, pan: Tensor, revisit: Tensor) -> Tensor:
        """Map the inputs of `SatFusion.forward` to the fused image [B, C, H, W]."""
        return cast(Tensor, self.network(lr, pan, revisit).fused)


def _facts(checkpoint: Checkpoint, weights: Weights, dataset: ChipDataset | None) -> dict[str, Any]:
    """Return the facts about the training; None for each that is not known without its dataset."""
    facts: dict[str, Any] = {
        "checkpoint": checkpoint.name,
        "weights": weights,
        **dict.fromkeys(("source", "bands", "ratio", "lr_window", "hr_window", "preparation")),
        "radiometry": "inputs and output are reflectance, float32; 1 is white",
        "loss": asdict(checkpoint.config.loss),
        "dataset_sha256": checkpoint.position.index_digest,
    }
    if dataset is not None:
        known, window = dataset.index.facts, dataset.window(0)
        facts |= {
            "source": known.source,
            "bands": list(known.bands.lr),
            "ratio": known.ratio[0] / known.ratio[1] if known.ratio else None,
            "lr_window": window.size,
            "hr_window": window.hr_size,
            "preparation": dataset.index.preparation.to_json(),
        }
    return facts


def _card(checkpoint: Checkpoint, facts: dict[str, Any]) -> str:
    model, train = checkpoint.config.model, checkpoint.config.train
    loss = checkpoint.position.best_loss
    bands, ratio, lr_window = facts["bands"], facts["ratio"], facts["lr_window"]
    trained = f"{lr_window} px, and {facts['hr_window']} px of the panchromatic image" if lr_window else "not known"
    return f"""# {model.encoder}+{model.head}

SatFusion (https://arxiv.org/abs/2510.07905): {model.revisits} low-resolution revisits of {model.bands} bands and one
panchromatic image become one image of {model.bands} bands on the grid of the panchromatic image.

| | |
|---|---|
| Checkpoint | {checkpoint.name}, {checkpoint.position.step} optimizer steps of {train.global_batch} chips |
| Least validation loss | {"not measured" if loss is None else f"{loss:.4g}"} |
| Weights | {"as trained" if facts["weights"] == "raw" else f"their moving average, of decay {train.ema:g}"} |
| Bands | {f"{_text(bands)}, in this order" if bands else "not known"} |
| Ratio | {_ratio_line(ratio, bool(bands))} |
| Chips of the training | {trained} |
| Radiometry | {facts["radiometry"]} |
| Dataset | index of SHA-256 {facts["dataset_sha256"]} |

```python
import torch
from models.exported import load_exported

network = load_exported(".")  # this folder
with torch.no_grad():
    fused = network(lr, pan).fused  # lr [B, {model.revisits}, {model.bands}, h, w], pan [B, 1, H, W]
```

It needs torch, numpy, safetensors and the package `models`.{_program_line(facts)}

Limits: the weights know the sensors, the ratio and the preparation above; the image is an estimate and may show detail
that is not there.
"""


def _text(names: Sequence[str]) -> str:
    """Return names from outside as a cell of a table."""
    return escaped(", ".join(names)).replace("\\", "\\\\").replace("|", "\\|")


def _ratio_line(ratio: float | None, known: bool) -> str:
    if ratio is None:
        return "not the same for all samples" if known else "not known"
    return f"{ratio:g} pixels of the panchromatic image per low-resolution pixel"


def _program_line(facts: dict[str, Any]) -> str:
    if "program_chips" not in facts:
        return ""
    number = "one chip" if facts["program_chips"] else "any number of chips"
    return (
        f" `{PROGRAM}` needs torch alone:\n`torch.export.load({PROGRAM!r}).module()` maps (lr, pan, revisit) to the "
        f"fused image, for {number} of the\ntraining's size."
    )


def _keep_card(folder: Storage, card: bytes) -> None:
    """Say that an existing card is kept, if it differs."""
    if folder.read_range(CARD, 0, len(card) + 1) != card:
        logger.warning(
            "%s/%s differs from the card of this export and is kept: give --overwrite to replace it", folder.uri, CARD
        )


class _Exported(msgspec.Struct):
    """Schema of ``model.json``, by which an export is recognised."""

    format_version: int
    model: dict[str, Any]
    sha256: Sha256


def _refuse_others(folder: Storage, files: dict[str, bytes], overwrite: bool) -> None:
    """Refuse to replace another model, unless ``overwrite``, or files that `export` did not write."""
    try:
        decode(folder.read(FACTS), _Exported)
        ours = True
    except NotFoundError:
        ours = False
        # Without model.json, only the same weights may come from an export that was interrupted.
        if folder.exists(WEIGHTS) and folder.read(WEIGHTS) == files[WEIGHTS]:
            return
    except ValueError:
        ours = False
    existing = [name for name in NAMES if folder.exists(name)]
    if existing and not ours:
        raise UserError(f"{folder.uri}/{existing[0]} was not written by export: name another folder with --to")
    if existing and not overwrite and folder.read(FACTS) != files[FACTS]:
        raise UserError(f"{folder.uri} holds another export: give --overwrite to replace it, or another --to")
