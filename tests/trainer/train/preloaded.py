"""Imported once by the server that the ranks are forked from."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

import finetune_trainer.train.stage  # noqa: F401
