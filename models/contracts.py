"""Contracts of the composition with encoders and heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from models.config import ModelConfig

NamePairs = tuple[tuple[str, str], ...]
"""(published prefix, own prefix) of each group of parameters, in the order of the published state dict.

A prefix is a module's name, a parameter's whole name, or empty for the stage itself. A published prefix that repeats an
own one is a second name of the same tensor. Groups that are absent from a model are skipped.
"""

Size = tuple[int, int]
"""Height and width, pixels."""


def under(published: str, own: str, *pairs: tuple[str, str]) -> NamePairs:
    """Prefix names within modules by the modules' names; an empty name stands for the module itself."""
    return tuple((f"{published}.{theirs}".rstrip("."), f"{own}.{ours}".rstrip(".")) for theirs, ours in pairs)


class Stage(nn.Module, ABC):
    """Common base of encoders and heads: their refusals and their published names."""

    @classmethod
    def check_config(cls, config: ModelConfig) -> None:
        """Raise ValueError, with the reason and the change needed, if this stage cannot be built for ``config``."""

    @classmethod
    def check_sizes(cls, config: ModelConfig, lr: Size, pan: Size) -> None:
        """Raise ValueError if this stage cannot take revisits of size ``lr`` beside a PAN of size ``pan``."""

    may_leave_idle: ClassVar[bool] = False
    """Whether a training step may leave parameters without gradient."""

    @property
    def is_settled(self) -> bool:
        """Return whether the stage's computation no longer depends on earlier steps: its graph can be cached."""
        return True

    def at_step(self, step: int) -> None:
        """Receive, before an optimizer step in training, the number of steps taken; most stages ignore it."""

    def published_names(self) -> NamePairs:
        """Return the published names of this stage, paired with our own; by default both are equal."""
        return (("", ""),)


class Encoder(Stage):
    """Multi-frame image fusion (MFIF): R revisits become one feature map on their own grid.

    Its published names start with ``MISR.``.
    """

    @abstractmethod
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, lr: Tensor, pan: Tensor) -> Tensor:
        """Fuse the revisits.

        Args:
            lr: Revisits [B, R, C, h, w], reflectance.
            pan: Panchromatic image [B, 1, H, W]; encoders without guidance by PAN ignore it.

        Returns:
            Features [B, D, h, w], D being ``config.hidden``.

        Raises:
            ValueError: If the encoder cannot take this number of revisits.
        """


class Head(Stage):
    """Multi-source image fusion (MSIF): adds the detail of a panchromatic image to a multispectral one.

    Its published names start with ``Sharpening.blockSharp.``.
    """

    adds_input: ClassVar[bool] = True
    """Whether a head without encoder adds its input image to its result."""

    @abstractmethod
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, ms: Tensor, pan: Tensor) -> Tensor:
        """Return the detail [B, C, H, W] for a multispectral ``ms`` [B, C, H, W] and ``pan`` [B, 1, H, W]."""
