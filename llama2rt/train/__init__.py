"""Training: options, optimizer, schedule, and the loop over steps."""

from llama2rt.train.loop import Objective, fit
from llama2rt.train.optimizer import Optimizer
from llama2rt.train.options import TrainOptions
from llama2rt.train.schedule import learning_rate

__all__ = ["Objective", "Optimizer", "TrainOptions", "fit", "learning_rate"]
