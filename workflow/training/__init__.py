"""Training: trainer, training step, checkpoints, exact resume, metrics, processes, hardware."""

from workflow.training.open import (
    initial_model,
    load_checkpoint,
    open_run,
    resume_run,
)
from workflow.training.resume import load_foreign_model, load_model
from workflow.training.run import Run
from workflow.training.step import NextTokenLoss, TrainStep, learning_rate, make_optimizer
from workflow.training.trainer import Trainer
from workflow.training.uninterrupted import continue_uninterrupted, smoke_test
