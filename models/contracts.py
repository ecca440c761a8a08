"""What the composition expects of an encoder and of a head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:  # the registry imports the encoders and heads, so at run time the arrow points the other way
    from models.registry import ModelConfig

NamePairs = tuple[tuple[str, str], ...]
"""(published prefix, own prefix) of each group of parameters, in the order of the published state dict.

A published prefix that repeats an own one is a second name of the same tensor.
"""


class Encoder(nn.Module, ABC):
    """Multi-frame image fusion (MFIF): R revisits become one feature map on their own grid."""

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
            ValueError: If the encoder cannot take this number of revisits or this size.
        """

    @abstractmethod
    def published_names(self) -> NamePairs:
        """Return the published names below ``MISR.``, paired with the names of this module."""


class Head(nn.Module, ABC):
    """Multi-source image fusion (MSIF): a multispectral image takes detail from a panchromatic one."""

    adds_input: ClassVar[bool] = True
    """Whether a head without encoder adds the image it was given to its result."""

    @abstractmethod
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, ms: Tensor, pan: Tensor) -> Tensor:
        """Return the detail [B, C, H, W] for a multispectral ``ms`` [B, C, H, W] and ``pan`` [B, 1, H, W]."""

    def published_names(self) -> NamePairs:
        """Return the published names below ``Sharpening.blockSharp.``; by default they are our own."""
        return (("", ""),)
