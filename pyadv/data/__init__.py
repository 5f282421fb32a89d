"""Image data in memory or streamed: the embedded default, standard sets, and data of your own."""

from pyadv.data.batches import Batches, Plan, crop_and_flip
from pyadv.data.images import ImageData, to_images
from pyadv.data.reading import Samples
from pyadv.data.sources import load
from pyadv.data.streams import (
    Images,
    StreamedBatches,
    StreamedImages,
    as_float,
    transformed_batches,
)

__all__ = [
    "Batches",
    "ImageData",
    "Images",
    "Plan",
    "Samples",
    "StreamedBatches",
    "StreamedImages",
    "as_float",
    "crop_and_flip",
    "load",
    "to_images",
    "transformed_batches",
]
