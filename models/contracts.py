"""What the composition expects of an encoder and of a head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from models.config import ModelConfig

NamePairs = tuple[tuple[str, str], ...]
"""(published prefix, own prefix) of each group of parameters, in the order of the published state dict.

A prefix is a module's name, a parameter's whole name, or empty for the stage itself. A published prefix that repeats an
own one is a second name of the same tensor. Groups that a model was built without are passed over.
"""

Size = tuple[int, int]
"""Height and width, pixels."""


def under(published: str, own: str, *pairs: tuple[str, str]) -> NamePairs:
    """Put the names of modules before names within them; an empty name stands for the module itself."""
    return tuple((f"{published}.{theirs}".rstrip("."), f"{own}.{ours}".rstrip(".")) for theirs, ours in pairs)


class Stage(nn.Module, ABC):
    """What encoders and heads share: what they refuse, and their published names."""

    @classmethod
    def check_config(cls, config: ModelConfig) -> None:
        """Raise ValueError where this stage cannot be built as ``config`` asks; it says why and what to change."""

    @classmethod
    def check_sizes(cls, config: ModelConfig, lr: Size, pan: Size) -> None:
        """Raise ValueError where this stage cannot take revisits of size ``lr`` beside a PAN of size ``pan``."""

    may_leave_idle: ClassVar[bool] = False
    """Whether a training step may leave parameters without gradient."""

    @property
    def is_settled(self) -> bool:
        """Whether what the stage computes depends no longer on what was computed before; a graph of it can be kept."""
        return True

    def at_step(self, step: int) -> None:
        """Hear, before an optimizer step in training, how many were taken; most stages need not know."""

    def published_names(self) -> NamePairs:
        """Return the published names of this stage, paired with our own; by default they are the same."""
        return (("", ""),)


class Encoder(Stage):
    """Multi-frame image fusion (MFIF): R revisits become one feature map on their own grid.

    Its published names stand below ``MISR.``.
    """

    @abstractmethod
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, lr: Tensor, pan: Tensor) -> Tensor:
        """Fuse the revisits.

        Args:
            lr: Revisits [B, R, C, h, w], reflectance.
            pan: Panchromatic image [B, 1, H, W]; encoders that are not guided by it ignore it.

        Returns:
            Features [B, D, h, w], D being ``config.hidden``.

        Raises:
            ValueError: If the encoder cannot take this number of revisits.
        """


class Head(Stage):
    """Multi-source image fusion (MSIF): a multispectral image takes detail from a panchromatic one.

    Its published names stand below ``Sharpening.blockSharp.``.
    """

    adds_input: ClassVar[bool] = True
    """Whether a head without encoder adds the image it was given to its result."""

    @abstractmethod
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, ms: Tensor, pan: Tensor) -> Tensor:
        """Return the detail [B, C, H, W] for a multispectral ``ms`` [B, C, H, W] and ``pan`` [B, 1, H, W]."""
