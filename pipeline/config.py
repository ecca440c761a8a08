"""Typed run configuration: TOML recipes, dotted overrides, and errors that name the nearest valid key."""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from models.config import ModelConfig
from models.registry import ABSENT, check_config
from pipeline.clouds import CLOUDY, Cloudy
from pipeline.deepspeed_keys import DeepSpeedKeys, check_keys
from pipeline.quality.losses import LossConfig
from pipeline.reporting.alerts import AlertsConfig
from pipeline.values import TEXTS, build_config, require, require_one_of
from sharding.errors import UserError, nearest
from sharding.files import read_text
from sharding.names import absolute_uri, check_uri, refuse_secret, refuse_secrets
from sharding.schema import Seed, check_ranges

Section = dict[str, str | int | float | bool | list[str] | dict[str, int | float | bool]]
"""Values of a section, as JSON holds them."""
Sections = dict[str, Section]

SIMULATIONS = ("off", "sensor", "shifts")
"""Modes of simulating revisits from the target (`pipeline.data.simulate`)."""


@dataclass(frozen=True)
class DataConfig:
    """Source of the chips and their augmentation in training."""

    uri: str | tuple[str, ...] = ""
    """Folder or s3:// prefix of a dataset with an index.json, written by ``satfusion shard``. A list mixes datasets of
    one geometry: each is a URI, or ``URI*weight`` with its passes per epoch, such as 2 or 0.5; without weight 1."""
    rotate_flip: bool = True
    """Rotate by a random quarter turn and flip in training; keyed by (seed, epoch, chip)."""
    random_windows: bool = False
    """Replace each chip's window in training by a random one of the same scene and size."""
    simulate: str = "off"
    """Revisits simulated from the target (`pipeline.data.simulate`): ``sensor`` or ``shifts``, in training, validation
    and test, as the published training does; ``off`` reads the revisits of the dataset."""
    simulated_revisits: Annotated[int, Meta(ge=0, le=1000)] = 0
    """Revisits of a chip that are simulated; 0 simulates as many as the dataset holds."""
    cloudy: Cloudy = "keep"
    """Revisits that clouds hide: ``keep`` them; ``drop`` gives the places of those that hide more than a fifth of a
    chip to the others; ``weight`` gives each revisit places in proportion to what it shows. In training, validation
    and test."""
    shuffle_window: Annotated[int, Meta(ge=1, le=10**6)] = 4
    """Shards whose chips are shuffled together, >= 1."""
    lanes: Annotated[int, Meta(ge=1, le=10**6)] = 8
    """Upper bound of the contiguous stretches of an epoch that each global batch is taken from, >= 1; the largest
    divisor of the global batch up to it is used."""
    cache_mib: Annotated[int, Meta(ge=0, le=2**30)] = 4096
    """Memory limit of each rank's scene cache, MiB. Scenes that threads are working on always fit; buffers of reads in
    progress, up to one sample per thread, come on top."""
    cache_dir: str = ""
    """Absolute path of a folder on each node where its ranks cache the samples that they read; "" disables the disk
    cache."""
    cache_dir_gib: Annotated[float, Meta(gt=0, le=2**30)] = 100.0
    """Size limit of that folder, GiB; the least recently used samples are evicted."""
    damaged: str = "stop"
    """Reaction to a sample that is damaged in the store (it is read at least twice): ``stop`` the run, or
    ``quarantine``, which continues with the sample's chips at weight 0 and counts them."""
    prefetch_batches: Annotated[int, Meta(ge=1, le=1000)] = 4
    """Batches prepared ahead of the step, >= 1."""
    loader_threads: Annotated[int, Meta(ge=1, le=256)] = 4
    """Threads that read scenes and prepare batches, >= 1."""
    store_wait_seconds: Annotated[float, Meta(gt=0, le=1500)] = 600.0
    """Time that a rank waits for a store that is away, of the dataset or of the run folder, before this counts as a
    failure, seconds; less than the 30 minutes that other ranks wait in a collective."""

    def __post_init__(self) -> None:
        """Refuse values that are out of range."""
        for uri in self.uris:
            check_uri("data.uri", uri)
        check_ranges(self, lambda item: f"data.{item.name} =")
        require_one_of("data.simulate", self.simulate, SIMULATIONS)
        count, off = self.simulated_revisits, self.simulate == "off"
        require(not (count and off), "data.simulated_revisits", count, "0, since data.simulate is off")
        require_one_of("data.cloudy", self.cloudy, CLOUDY)
        require(off or self.cloudy == "keep", "data.cloudy", self.cloudy, "keep, since data.simulate replaces revisits")
        require_one_of("data.damaged", self.damaged, ("stop", "quarantine"))
        absolute = not self.cache_dir or Path(self.cache_dir).is_absolute()
        require(absolute, "data.cache_dir", self.cache_dir, "an absolute path, of a folder on each node")

    @property
    def uris(self) -> tuple[str, ...]:
        """Return the URIs without their weights; none if ``uri`` is empty.

        Raises:
            UserError: A weight is out of range.
        """
        if isinstance(self.uri, str):
            return (self.uri,) if self.uri else ()
        return tuple(split_weight(text)[0] for text in self.uri)


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation: batch, schedule, precision, ZeRO, checkpoints."""

    epochs: Annotated[int, Meta(ge=1, le=10**9)] = 20
    """Passes over the training split, >= 1."""
    max_steps: Annotated[int, Meta(ge=0, le=10**12)] = 0
    """Stop after this many optimizer steps, even in mid-epoch; 0 means no limit."""
    global_batch: Annotated[int, Meta(ge=1, le=10**6)] = 8
    """Chips per optimizer step over all ranks, >= 1."""
    micro_batch: Annotated[int, Meta(ge=0, le=10**6)] = 0
    """Upper bound of the chips per forward pass of one rank: the largest number that divides global_batch / ranks is
    taken; 0 means no bound (no accumulation)."""
    learning_rate: Annotated[float, Meta(gt=0, le=1e30)] = 1e-4
    """Peak learning rate, > 0."""
    encoder_rate: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    """Factor of the learning rate for the encoder and the upsampler, > 0."""
    head_rate: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    """Factor of the learning rate for the head, > 0."""
    init: str = ""
    """Weights that a new run starts from: a run folder of ours, or a checkpoint file of the published code. Parameters
    that it lacks or holds in another shape start fresh, and are named."""
    init_checkpoint: str = "best"
    """Checkpoint of the run that ``init`` names: ``best``, ``last`` or a step."""
    freeze: str = ""
    """Stage that is not trained, ``encoder`` (with the upsampler) or ``head``; empty for none."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, kept beside them, in [0, 1); 0 keeps none. Not with ZeRO
    3."""
    weight_decay: Annotated[float, Meta(ge=0, le=1000)] = 1e-4
    """L2 term added to the gradient (Adam's, not AdamW's), >= 0."""
    schedule: str = "warm_restarts"
    """``warm_restarts`` (cosine, SGDR, stepped once per epoch) or ``warmup_cosine`` (stepped each step)."""
    restart_epochs: Annotated[int, Meta(ge=1, le=10**9)] = 300
    """T0 of the warm restarts, epochs, >= 1."""
    warmup_steps: Annotated[int, Meta(ge=0, le=10**12)] = 0
    """Linear warm-up of ``warmup_cosine``, steps, >= 0."""
    min_learning_rate: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    """Floor of both schedules, >= 0."""
    clip_norm: Annotated[float, Meta(ge=0, le=10**9)] = 0.0
    """Limit that the global gradient norm is clipped to; 0 means no clipping."""
    engine: str = "deepspeed"
    """Training engine: ``deepspeed``, or ``torch``: plain PyTorch, DistributedDataParallel over several ranks, no
    ZeRO."""
    precision: str = "fp32"
    """Precision: ``fp32``, or ``bf16``: forward under bfloat16 autocast; weights, loss and optimizer in fp32."""
    tf32: bool = False
    """On CUDA, round inputs of float32 matrix products and convolutions to TF32: faster, with 10 bits of mantissa."""
    channels_last: bool = False
    """Store weights and images with the bands last in memory; faster on some devices. Not with ZeRO 1 to 3."""
    compile: bool = False
    """Compile network and loss with torch.compile: takes minutes at the start, then steps are faster. Not with ZeRO 3;
    ARConv is compiled from its freeze step on."""
    recompute: bool = False
    """Activation checkpointing: the networks' blocks compute their activations again in the backward pass, which takes
    less memory and more time. Not with compile or ARConv."""
    profile: Annotated[int, Meta(ge=0, le=10**6)] = 0
    """Number of steps that each rank profiles after its first four, into ``events/rank-<r>/``; 0 disables profiling."""
    zero_stage: Annotated[int, Meta(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage, 0 to 3."""
    seed: Seed = 122938034
    """Seed of the initial weights, the order and the augmentation."""
    checkpoint_every: Annotated[int, Meta(ge=1, le=10**12)] = 500
    """Optimizer steps between checkpoints, >= 1."""
    checkpoint_seconds: Annotated[float, Meta(ge=0, le=10**7)] = 0.0
    """Also a checkpoint this long after the last one, seconds; 0 disables it."""
    keep_checkpoints: Annotated[int, Meta(ge=1, le=10**6)] = 3
    """Number of newest full checkpoints kept (the best weights are kept in addition), >= 1."""
    log_every: Annotated[int, Meta(ge=1, le=10**12)] = 1
    """Optimizer steps between rows of metrics and events, >= 1."""
    log_batches: bool = False
    """Write every global batch's chip ids to batches.csv."""
    hang_seconds: Annotated[float, Meta(ge=0, le=10**7)] = 120.0
    """Time without progress of any rank after which the ranks end (docs/operations.md), seconds; 0 disables it."""
    hang_start_seconds: Annotated[float, Meta(gt=0, le=10**7)] = 1800.0
    """The same for the start, steps that compile and waiting for a checkpoint to be stored, seconds."""
    threads_per_rank: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Torch threads of each rank; 0 keeps the setting of the environment. The number changes the last bits of
    results."""

    def __post_init__(self) -> None:
        """Refuse values that are out of range."""
        check_ranges(self, lambda item: f"train.{item.name} =")
        check_uri("train.init", self.init)
        require_one_of("train.freeze", self.freeze, ("", "encoder", "head"))
        require(0 <= self.ema < 1, "train.ema", self.ema, "a number from 0 up and below 1")
        gathered = not self.ema or self.zero_stage < 3
        require(gathered, "train.ema", self.ema, "0 with ZeRO 3, where no rank holds the whole weights")
        require_one_of("train.schedule", self.schedule, ("warm_restarts", "warmup_cosine"))
        require_one_of("train.precision", self.precision, ("fp32", "bf16"))
        require_one_of("train.engine", self.engine, ("deepspeed", "torch"))
        plain = self.engine == "deepspeed" or self.zero_stage == 0
        require(plain, "train.zero_stage", self.zero_stage, "0 with train.engine = 'torch', which has no ZeRO")
        flat = not self.channels_last or self.zero_stage == 0
        require(flat, "train.channels_last", self.channels_last, "false with ZeRO 1 to 3, which flatten the weights")
        whole = not self.compile or self.zero_stage < 3
        require(whole, "train.compile", self.compile, "false with ZeRO 3, which gathers weights layer by layer")
        kept = not self.recompute or not self.compile
        require(kept, "train.recompute", self.recompute, "false with train.compile, which chooses what to recompute")


@dataclass(frozen=True)
class OutputConfig:
    """Run folder, its upload to S3, and image panels."""

    uri: str = "runs/satfusion"
    """Run folder, a local path or s3:// prefix."""
    sync_seconds: Annotated[float, Meta(gt=0, le=10**6)] = 10.0
    """Seconds between uploads of events and metrics when the run folder is on S3, > 0."""
    panels: Annotated[int, Meta(ge=0, le=10**6)] = 4
    """Number of validation chips drawn as image panels, the first ones of the split, >= 0."""
    panels_every: Annotated[int, Meta(ge=0, le=10**6)] = 0
    """Epochs between validations whose panels are drawn, >= 0; 0 draws after epochs 1, 2, 4, 8, ... and always after
    the last step."""
    tracker: str = ""
    """Experiment tracker that gets the scalars too, ``wandb`` or ``mlflow`` (docs/monitor.md); empty for none."""

    def __post_init__(self) -> None:
        """Refuse values that are out of range."""
        check_uri("output.uri", self.uri)
        require(self.uri != "", "output.uri", self.uri, "a folder or an s3:// prefix")
        check_ranges(self, lambda item: f"output.{item.name} =")
        require_one_of("output.tracker", self.tracker, ("", "wandb", "mlflow"))


@dataclass(frozen=True)
class RunConfig:
    """Complete configuration of a run; saved in the run folder and in each checkpoint."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoder, head and their sizes."""
    data: DataConfig = field(default_factory=DataConfig)
    """The dataset and its augmentation."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights, registration and bias adjustment of the loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimisation."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """Run folder."""
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    """Rules of alerts."""
    deepspeed: DeepSpeedKeys = field(default_factory=dict)
    """Further keys of DeepSpeed, as its JSON has them (`pipeline.deepspeed_keys`)."""

    def __post_init__(self) -> None:
        """Refuse a model that cannot be built, and a stage to freeze that it lacks or is all of it."""
        check_config(self.model)
        check_keys(self.deepspeed, self.train.engine)
        both = ABSENT not in (self.model.encoder, self.model.head)
        frozen = self.train.freeze
        require(not frozen or both, "train.freeze", frozen, "empty for a model of one stage")
        steady = not self.train.recompute or self.model.head != "arconv"
        require(steady, "train.recompute", self.train.recompute, "false with ARConv, whose norms would count twice")
        require(not frozen or self.train.init != "", "train.freeze", frozen, "empty without train.init: random weights")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by section, as JSON and TOML hold them."""
        return {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
            for name, section in dataclasses.asdict(self).items()
        }

    def to_toml(self) -> str:
        """Return the whole configuration as TOML; `load_config` reads it back unchanged."""
        sections = self.to_dict().items()
        return "\n".join(
            f"[{name}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in section.items())
            for name, section in sections
        )

    def with_absolute_uris(self, folder: Path) -> RunConfig:
        """Return the configuration with absolute local paths: ``~`` is the home, relative paths start at ``folder``."""

        def absolute(uri: str) -> str:
            return absolute_uri(uri, folder) if uri else uri

        return dataclasses.replace(
            self,
            data=dataclasses.replace(
                self.data,
                uri=absolute(self.data.uri) if isinstance(self.data.uri, str) else tuple(map(absolute, self.data.uri)),
            ),
            train=dataclasses.replace(self.train, init=absolute(self.train.init)),
            output=dataclasses.replace(self.output, uri=absolute(self.output.uri)),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "configuration") -> RunConfig:
        """Build a configuration from nested plain values.

        Args:
            values: Sections by name, each a mapping of keys to values; absent keys keep their defaults.
            source: File or place named in errors.

        Raises:
            UserError: An unknown section or key, a value of the wrong type or out of range, or a secret in a URI.
        """
        return build_config(cls, values, source)


MOST_PASSES = 1000.0
"""Largest weight of a dataset in ``data.uri``."""


def split_weight(text: str) -> tuple[str, float]:
    """Return URI and weight of an item ``URI*weight`` of ``data.uri``; the weight is 1 if there is none.

    Raises:
        UserError: The weight is out of range.
    """
    uri, star, tail = text.rpartition("*")
    try:
        weight = float(tail) if star else None
    except ValueError:  # a URI with a star
        weight = None
    if weight is None:
        return text, 1.0
    require(0 < weight <= MOST_PASSES, f"data.uri: the weight of {uri}", weight, f"above 0 and at most {MOST_PASSES:g}")
    return uri, weight


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, or a recipe that ships with the package, and apply dotted overrides.

    Args:
        recipe: Path of a TOML file, or the name of a recipe (`recipe_names`).
        overrides: ``section.key=value`` with the value in TOML; a bare word is taken as a string, and so is any
            bare value of a key that is a string.

    Raises:
        UserError: No such file or recipe, broken TOML, an unknown key (the nearest is named), a bad value, or a secret
            in a URI.
    """
    refuse_secret("the configuration", recipe)
    refuse_secrets(overrides)
    text = _read_recipe(recipe)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise UserError(f"{recipe} is not valid TOML: {error}") from None
    for override in overrides:
        _apply(values, override)
    return RunConfig.from_dict(values, source=recipe)


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    folder = resources.files("pipeline") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def _read_recipe(recipe: str) -> str:
    if os.path.lexists(recipe) and not (recipe in recipe_names() and Path(recipe).is_dir()):
        return read_text("configuration", recipe)
    if recipe in recipe_names():
        return (resources.files("pipeline") / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8")
    raise UserError(f"configuration {recipe!r} is neither a file nor a recipe{nearest(recipe, recipe_names())}")


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *sections, key = dotted.strip().split(".")
    if not equals or not sections:
        raise UserError(f"override {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    if _is_text(".".join(sections), key) and not isinstance(value, str | list):  # a bare date or number
        value = text.strip()
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r} sets a key of {section!r}, which is not a section")
    inner[key] = value


def _toml(value: Any) -> str:
    """Return a value as TOML; strings, numbers and booleans of JSON are also valid TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def _is_text(section: str, key: str) -> bool:
    """Return True if a key of a section is a string, or one of a few words."""
    kind = typing.get_type_hints(RunConfig).get(section)
    hint = typing.get_type_hints(kind).get(key) if dataclasses.is_dataclass(kind) else None
    return hint in (str, TEXTS) or typing.get_origin(hint) is typing.Literal
