"""The training loop on Accelerate and its run folder. It needs the extra `train`."""

from pyadv.training import recipes
from pyadv.training.callbacks import Callback
from pyadv.training.checkpoint import Trained, load_model
from pyadv.training.config import Config
from pyadv.training.display import Display
from pyadv.training.loaders import Loaders
from pyadv.training.lock import FolderInUse
from pyadv.training.run import resume, train
from pyadv.training.trainer import Diverged, Interrupted, Trainer

__all__ = [
    "Callback",
    "Config",
    "Display",
    "Diverged",
    "FolderInUse",
    "Interrupted",
    "Loaders",
    "Trained",
    "Trainer",
    "load_model",
    "recipes",
    "resume",
    "train",
]
