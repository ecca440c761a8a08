"""Pages beside the curves: texts of a run, hyperparameters with final figures, and the operator's layout."""

from __future__ import annotations

import json
import re

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams import summary_v2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.util import tensor_util

from pipeline.monitor.facts import ENVIRONMENT, HPARAMS, Facts

FINAL = ("loss/val", "quality/psnr", "quality/ssim", "quality/sam", "quality/ergas", "speed/chips_per_second")
"""Tags of the figures beside the hyperparameters, and in the list of runs."""
FIRST = ("loss/train", "loss/val", "quality/psnr", "speed/chips_per_second", "speed/data_wait_seconds")
"""Tags that the page of the monitor opens with."""
_COMPARED = ("model.encoder", "model.head", "train.global_batch", "train.learning_rate", "train.seed")
"""Settings that the page HParams begins with."""
_DATASET = "index_digest"
_STORE_COUNTS = ("store/dataset_retries", "store/read_again", "store/quarantined_chips", "store/run_folder_retries")
_LAYOUT = (
    ("Is it learning?", (("loss", ("loss/train", "loss/val")), ("PSNR, dB", ("quality/psnr",)))),
    (
        "Is it fast?",
        (("chips a second", ("speed/chips_per_second",)), ("wait for data, s", ("speed/data_wait_seconds",))),
    ),
    (
        "Is the store well?",
        (
            ("retries and damage, counts", _STORE_COUNTS),
            ("writing checkpoints, s", ("store/checkpoint_seconds",)),
        ),
    ),
)


def texts(facts: Facts) -> list[Summary]:
    """Return the text panels of a run: configuration, versions and dataset, as Markdown that shows them literally."""
    environment = dict(facts.sections.get(ENVIRONMENT, {}))
    dataset = {"digest": environment.pop(_DATASET, "unknown"), "uri": facts.sections.get("data", {}).get("uri", "")}
    configuration = {name: values for name, values in facts.sections.items() if name != ENVIRONMENT}
    lines = []
    for name, values in configuration.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
    return [
        text_pb("run/configuration", _literal(lines)),
        text_pb("run/versions", _literal([f"{key} = {json.dumps(value)}" for key, value in environment.items()])),
        text_pb("run/dataset", _literal([f"{key} = {json.dumps(value)}" for key, value in dataset.items()])),
    ]


def _literal(lines: list[str]) -> str:
    """Return lines as a code block; an indented one has no end that a line could write."""
    return "\n".join(f"    {line}" for line in lines)


def session(facts: Facts, name: str) -> Summary:
    """Return the hyperparameters of a run, for its own folder."""
    return summary_v2.hparams_pb(facts.hparams(), trial_id=name)


def experiment() -> Summary:
    """Return the columns of the page HParams, for the folder above all runs."""
    hparams = [summary_v2.HParam(key) for key in HPARAMS]
    summary = summary_v2.hparams_config_pb(hparams, [summary_v2.Metric(tag) for tag in FINAL])
    plugin = summary.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    # The page begins with those that are said to differ, and shows five columns; the others follow by name.
    for info in data.experiment.hparam_infos:
        info.differs = info.name in _COMPARED
    plugin.content = data.SerializeToString()
    return summary


def layout() -> Summary:
    """Return the operator's layout, for the folder above all runs."""
    categories = [
        layout_pb2.Category(
            title=title,
            chart=[
                layout_pb2.Chart(
                    title=name,
                    multiline=layout_pb2.MultilineChartContent(tag=[f"^{re.escape(tag)}$" for tag in tags]),
                )
                for name, tags in charts
            ],
        )
        for title, charts in _LAYOUT
    ]
    text = layout_pb2.Layout(category=categories).SerializeToString()
    value = Summary.Value(tag=layout_metadata.CONFIG_SUMMARY_TAG, tensor=tensor_util.make_tensor_proto(text))
    value.metadata.plugin_data.plugin_name = layout_metadata.PLUGIN_NAME
    return Summary(value=[value])
