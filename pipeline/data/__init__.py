"""The path from a dataset's index to the batches that the network is given.

Training and evaluation import it; it imports neither. Data passes through these steps, one module each:

    index.json
        |         pipeline.order: which chips make up a global batch, which of them are this rank's
    prefetch      Prefetcher: which scenes are read next, neighbours in a shard together
        |
    sample_reader SampleReader: a sample's bytes, from the node's disk_cache or the store, compared with their CRC-32;
        |         damaged bytes are read a second time, then CorruptedError names shard, sample, AOI
    scene_cache   SceneCache: each scene in memory once for all threads, evicted least recently used first;
        |         here damage stops the run or quarantines the sample
    scene_layout  WholeScenes keeps samples as they are, CutScenes crops the chips of each when it is read
        |
    batches       chips copied into page-locked memory, moved to the device, made float, turned, flipped, simulated

`sharding.storage.Fill` is the one type of "read into this memory": a storage makes it of a byte range, the reader wraps
it with its check, the cache passes it on, the layout calls it with the memory of a scene.
`dataset` joins the steps for one split, `loader` runs them in threads ahead of the training loop.
"""

from pipeline.data.dataset import ChipDataset, evaluation_batches
from pipeline.data.loader import TrainLoader
from pipeline.order import BatchPlan

__all__ = ["BatchPlan", "ChipDataset", "TrainLoader", "evaluation_batches"]
