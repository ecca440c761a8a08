"""From a dataset's index to the batches that the network is given.

Training and evaluation import it; it knows neither. Data passes through these steps, one module each:

    index.json    order: which chips make up a global batch, which of them are this rank's
        |
    prefetch      which scenes are read next, neighbours in a shard together
        |
    byte_ranges   a sample's bytes, from the node's disk_cache or the store, compared with their CRC-32;
        |         damaged bytes are read once more, then DamagedError names shard, sample and AOI
    scene_cache   each scene in memory once for all threads, as scene_layout says: whole, or cut to its chips;
        |         here damage stops the run or quarantines the sample
    batches       chips copied into page-locked memory, moved to the device, made float, turned, flipped, simulated

`dataset` joins the first steps for one split, `loader` runs them in threads ahead of the training loop.
"""

from pipeline.data.dataset import ChipDataset, evaluation_batches
from pipeline.data.loader import TrainLoader
from pipeline.order import BatchPlan

__all__ = ["BatchPlan", "ChipDataset", "TrainLoader", "evaluation_batches"]
