"""The published SatFusion as a peer, from a folder that the user names; nothing of it is in this repository.

``python -m benchmarks.published DIR`` builds every model and compares it with ours and with the golden cases. DIR is a
copy of the authors' repository, or its ``code_worldstrat``. It needs kornia, which `benchmarks/peers.txt` installs. Of
their other imports, a network and its training loss use only PyTorch and einops; the rest is replaced by empty modules
during the import.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.peers import FOLDER, Unused
from models.config import ModelConfig
from models.published import count_parameters, load_published
from models.registry import ABSENT, all_pairs, build_model
from tests.golden import cases

ENCODERS = {
    ABSENT: "None",
    "srcnn": "SRCNN",
    "highresnet": "HighResNet",
    "rams": "RAMS",
    "trnet": "TRNet",
    "trnet_pan": "TRNet_pan",
}
HEADS = {
    ABSENT: "None",
    "pnn": "PNN",
    "pannet": "PANNet",
    "innformer": "PSIT",
    "u2net": "U2Net",
    "pan_mamba": "Pan_Mamba",
    "arconv": "ARConv",
}
"""Our names, and the names in the published code."""

LR, HR = 50, 156
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-4

WEIGHTS = {"w_mse": 0.3, "w_mae": 0.3, "w_ssim": 0.2, "w_sam": 0.2}
SHIFTS = {"shift_px": 2, "shift_mode": "lanczos", "shift_step": 0.5}
"""Options of the published training command."""

SUPERVISED = ("train/MSE", "train/MAE", "train/SSIM_loss", "train/SAM_loss")
"""Weights of the loss. A published step also computes ERGAS, SSIM and SAM for its log; these are omitted here."""

UNUSED = (
    "kornia_rs",  # kornia's reader of image files
    "pandas",
    "pytorch_lightning",
    "pytorch_msssim",  # imported for a loss that no training uses
    "tkinter",
    "torchmetrics",
    "torchvision",  # augmentations, the grid of a logged picture
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.utils",
    "wandb",
)

SAMPLE_BYTES = 59
"""Bytes that ARConv keeps per sample, measured: four int64 indices (32), four values (16), their sum twice (8),
features."""

SMALL = 100
"""Side for the comparison of U2Net, pixels: divisible by 4, the size of the upsampler's image, and in 1.6 GB."""


class Unavailable(RuntimeError):
    """A published network is not available; the message gives the reason in a sentence."""


class Network(nn.Module):
    """A published network behind our calling convention.

    A head alone takes a revisit at random from Python's generator, one for the whole batch. ARConv counts its forward
    passes, chooses its kernel sizes by the batch in the first hundred, and keeps them from then on.

    Args:
        backbone: The published module; its state dict has the published names.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, lr: Tensor, pan: Tensor) -> Tensor:
        """Map revisits [B, 8, 3, 50, 50] and pan [B, 1, 156, 156] to the fused image [B, 3, 156, 156]."""
        return cast(Tensor, self.backbone(x=lr, pan=pan.unsqueeze(1))[0].squeeze(1))


def enable(folder: Path) -> None:
    """Import the published modules from ``folder``, the authors' repository or its ``code_worldstrat``.

    Raises:
        Unavailable: If they are absent, others were imported before, or a requirement is not installed.
    """
    root = _root(folder)
    loaded = sys.modules.get("src")
    if loaded is not None and str(root / "src") not in list(getattr(loaded, "__path__", ())):
        raise Unavailable(f"{root} cannot be imported: another package of the name src was, from {loaded.__path__}")
    try:
        _import_kornia()
        with _importable(root):
            importlib.import_module("src.modules")
            importlib.import_module("src.lightning_modules")
    except ImportError as error:
        advice = "; benchmarks/peers.txt says how to install it" if error.name == "kornia" else ""
        raise Unavailable(f"the published code in {root} cannot be imported: {error}{advice}") from error


def build(encoder: str, head: str) -> Network:
    """Return the published network of a pair, by our names, on the CPU and in train mode: dropout is on.

    Raises:
        Unavailable: If it cannot be built.
        KeyError: If a name is unknown.
    """
    return _build(encoder, head, HR)


def training_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the published training loss, a scalar; to be called under the same autocast as the network.

    It adjusts the bands' means, tries 81 shifts, and weighs MSE, MAE, SSIM and the spectral angle.

    Args:
        prediction: Fused images [B, 3, H, W].
        target: High-resolution images of the same shape, float32.
    """
    step = _training(target.device)
    adjusted = step.bias_adjust(target, prediction)
    step.initialise_shifters()
    metrics = {name: step.train_metrics[name] for name in SUPERVISED}
    _, mse, mae, ssim, sam = step.compute_metrics(target, adjusted, metrics, "train", None)
    weights = step.hparams
    loss = weights.w_mse * mse + weights.w_mae * mae + weights.w_ssim * ssim + weights.w_sam * sam
    return cast(Tensor, loss.mean())


def optimizer(network: nn.Module) -> torch.optim.Adam:
    """Return the published optimizer, with PyTorch's defaults; its rate falls by 1 % in 20 epochs and is fixed here."""
    return torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def attention_bytes(head: str, batch: int, side: int = HR) -> int:
    """Return the bytes of n x n similarities that a published head holds at once in a training step, in float32.

    That is at the beginning of its backward pass. U2Net keeps the weights of all five blocks and needs two more of
    its last block for their gradient; a forward pass without gradient needs the two alone. Under autocast it keeps
    the weights in both types. INNformer compares the 576 pixels of each window of 24 px, a window every 8 px, and
    holds one set of these similarities. Other heads have none.

    Args:
        head: Our name of the head.
        batch: Chips in a batch.
        side: Height and width of the result, pixels.
    """
    if head == "u2net":
        weights = [batch * heads * (side // scale) ** 4 for heads, scale in ((2, 1), (4, 2), (8, 4), (4, 2), (2, 1))]
        return 4 * (sum(weights) + 2 * weights[-1])
    if head == "innformer":
        windows = ((side + 2 * 8 - 24) // 8 + 1) ** 2
        return 4 * batch * windows * (24 * 24) ** 2
    return 0


def sampling_bytes(head: str, batch: int, side: int = HR, taps: int = 16) -> int:
    """Return approximately the bytes that ARConv keeps of its samples for the backward pass; 0 for other heads.

    Args:
        head: Our name of the head.
        batch: Chips in a batch.
        side: Height and width of the result, pixels.
        taps: Samples a pixel, 9 to 49; by its initial weights the ten convolutions choose 16 on the average.
    """
    if head != "arconv":
        return 0
    features = [convs * width * (side // scale) ** 2 for convs, width, scale in ((4, 32, 1), (4, 64, 2), (2, 128, 4))]
    return batch * sum(features) * taps * SAMPLE_BYTES


def head_bytes(head: str, batch: int, side: int = HR) -> int:
    """Return approximately the minimum bytes of a training step in float32, to skip a step that cannot fit."""
    return attention_bytes(head, batch, side) + sampling_bytes(head, batch, side)


def _root(folder: Path) -> Path:
    for root in (folder / "code_worldstrat", folder):
        if (root / "src" / "modules.py").is_file():
            return root.resolve()
    raise Unavailable(f"{folder} holds no published code: neither code_worldstrat/src/modules.py nor src/modules.py")


def _import_kornia() -> None:
    """Import kornia, which the published code uses for resizing and SSIM, and no replaced part of it."""
    if importlib.util.find_spec("kornia") is None and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    with _replaced(("kornia_rs",)):
        importlib.import_module("kornia")


@contextmanager
def _importable(root: Path) -> Iterator[None]:
    """Make the published modules importable, and remove every trace of the replacements afterwards."""
    sys.path.insert(0, str(root))
    try:
        with _replaced(UNUSED):
            yield
    finally:
        sys.path.remove(str(root))


@contextmanager
def _replaced(names: tuple[str, ...]) -> Iterator[None]:
    """Replace each of ``names`` by an empty module, or by the used part of Lightning."""
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        module = Unused(name)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        if name == "pytorch_lightning":
            module.LightningModule = _LightningModule  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name, original in before.items():
            if original is None:
                del sys.modules[name]
            else:
                sys.modules[name] = original


class _LightningModule(nn.Module):
    """The part of Lightning's class that the published loss uses."""

    current_epoch = 0

    def save_hyperparameters(self, values: dict[str, Any]) -> None:
        self.hparams = SimpleNamespace(**values)


@functools.cache
def _training(device: torch.device) -> Any:
    """Return the published training module, without a network, with its shifts' kernels on ``device``."""
    settings = {
        "use_artificial_dataset": False,
        "chip_size": (LR, LR),
        "revisits": 8,
        "temporal_noise": 0.0,
        "temporal_jitter": 0.0,
        "transform": None,
        "benchmark": False,
    }
    published = importlib.import_module("src.lightning_modules").LitModel
    return published(backbone=SimpleNamespace(out_channels=3), **settings, **WEIGHTS, **SHIFTS).to(device)


def _build(encoder: str, head: str, side: int) -> Network:
    if "src.modules" not in sys.modules:
        raise Unavailable("no published code was enabled")
    modules = sys.modules["src.modules"]
    if head == "pan_mamba":
        _add_pan_mamba(modules)
    settings = {
        "model_MISR": ENCODERS[encoder],
        "model_Sharpening": HEADS[head],
        "msi_channels": 3,
        "MISR_revisits": 8,
        "MISR_hidden_channels": 128,
        "MISR_kernel_size": 3,
        "output_size": (side, side),
        "out_channels": 3,
        "MISR_zoom_factor": 2,
        "MISR_sr_kernel_size": 1,
        "pan_channels": 1,
        "Sharpening_kernel_size": 3,
        "use_artificial_dataset": False,
        "use_sampling_model": False,
    }
    try:
        backbone = modules.OurFramework(**settings)
    except Exception as error:  # any error that a version of the code, or of its requirements, may raise
        raise Unavailable(f"the published constructor raises {type(error).__name__}: {error}") from error
    return Network(backbone).train()


def _add_pan_mamba(modules: ModuleType) -> None:
    """Add to ``modules`` the Pan-Mamba of the published code, which the code does not import by default."""
    try:
        block = importlib.import_module("mamba_ssm.modules.mamba_simple").Mamba
    except (ImportError, OSError) as error:
        raise Unavailable(f"Pan-Mamba needs mamba_ssm in the form of Vision Mamba, and CUDA: {error}") from error
    if "bimamba_type" not in inspect.signature(block).parameters:
        raise Unavailable("Pan-Mamba needs mamba_ssm in the form of Vision Mamba; this one has no bimamba_type")
    root = Path(str(modules.__file__)).parents[1]
    with _importable(root):
        network = importlib.import_module("src.sharp.mamba.panmamba_baseline_finalversion")
    for name in ("Net_With_MISR", "Net_Only_Sharpening"):
        setattr(modules, name, getattr(network, name))


@torch.no_grad()
def _check(encoder: str, head: str) -> str:
    """Return a line: parameters, and the largest relative difference to ours and to the golden case."""
    side = SMALL if head == "u2net" else HR
    theirs = _build(encoder, head, side).eval()
    ours = build_model(ModelConfig(encoder, head, published=True)).eval()
    state = theirs.backbone.state_dict()
    state = {name: cases.weight(name, v) if v.is_floating_point() else v for name, v in state.items()}
    theirs.backbone.load_state_dict(state)
    load_published(ours, state)
    count = count_parameters(theirs)
    assert count == count_parameters(ours), f"{count} parameters, where ours has {count_parameters(ours)}"
    lr, pan = cases.golden_inputs()
    if encoder == ABSENT:
        lr = lr[:, :1]  # random parts then have one outcome
    pan = pan[..., :side, :side]
    result, expected = theirs(lr, pan), ours(lr, pan).fused
    difference = ((result - expected).abs().max() / expected.abs().max()).item()
    golden = _from_golden(f"{ENCODERS[encoder]}+{HEADS[head]}", count, result) if side == HR else "-"
    return f"{count:12,d}{difference:16.1e}{golden:>16}{side:7d}"


def _from_golden(case: str, count: int, result: Tensor) -> str:
    """Return the relative difference to a golden case, if there is one."""
    if case not in cases.CONFIGS:
        return "-"
    golden = cases.published(case)
    assert count == golden.parameters, f"{count} parameters, where the golden case has {golden.parameters}"
    return f"{cases.distance(result, golden.outputs['fused']):.1e}"


def _check_loss() -> str:
    """Return a line: the relative difference of loss and gradient to the golden ones."""
    golden = cases.load("losses")
    prediction = torch.from_numpy(cases.load("losses_prediction")["prediction"]).requires_grad_()
    loss = training_loss(prediction, cases.image("target", 3, 3, HR, HR))
    (gradient,) = torch.autograd.grad(loss, prediction)
    of_loss = abs(loss.item() / float(golden["loss"]) - 1)
    of_gradient = cases.distance(gradient, golden["gradient"])
    return f"training loss: {of_loss:.1e} from the golden one, its gradient {of_gradient:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the authors' repository, or its code_worldstrat")
    options = parser.parse_args()
    try:
        enable(options.folder)
    except Unavailable as error:
        sys.exit(str(error))
    print(_check_loss())
    print(f"{'model':24}{'parameters':>12}{'from ours':>16}{'from golden':>16}{'side':>7}")
    for encoder, head in all_pairs():
        try:
            line = _check(encoder, head)
        except Unavailable as error:
            line = f" does not build: {error}"
        print(f"{encoder + '+' + head:24}{line}", flush=True)


if __name__ == "__main__":
    main()
