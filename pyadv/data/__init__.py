"""Image data sets as tensors: the embedded default, the standard sets, and files of your own."""

from pyadv.data.batches import Batches, crop_and_flip
from pyadv.data.images import ImageData, to_images
from pyadv.data.sources import load

__all__ = ["Batches", "ImageData", "crop_and_flip", "load", "to_images"]
