"""Write opensr.json with opensr-test 1.3.3, in an environment of its own: ``python write_opensr.py``.

Its alignment, drawing and download of data have no part in these values; stand-ins spare their imports.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch

sys.modules.update({name: MagicMock() for name in ("requests", "satalign", "mpltern", "opensr_test.plot")})
sys.path.insert(0, str(Path(__file__).parent))

import opensr_test.spatial  # noqa: E402
from opensr_inputs import RATIOS, make_case  # noqa: E402
from opensr_test.main import Metrics  # noqa: E402

opensr_test.spatial.SpatialMetricAlign.get_metric = lambda _, x, y: (x, torch.tensor(0.0))
values = {}
for ratio in RATIOS:
    lr, hr, images = make_case(ratio)
    for name, image in images.items():
        found = Metrics(harm_apply_spatial=False).compute(*(torch.from_numpy(part) for part in (lr, image, hr)))
        found.pop("spatial")
        values[f"{name} {ratio}"] = found
text = json.dumps({"package": "opensr-test 1.3.3", "values": values}, indent=1)
(Path(__file__).parent / "opensr.json").write_text(text + "\n")
