"""Training: options, optimizer, schedule, the loop, and the run directory it writes."""

from llama2rt.train.loop import fit
from llama2rt.train.optimizer import Optimizer
from llama2rt.train.options import Recipe, TrainOptions
from llama2rt.train.run import Run
from llama2rt.train.schedule import learning_rate

__all__ = ["Optimizer", "Recipe", "Run", "TrainOptions", "fit", "learning_rate"]
