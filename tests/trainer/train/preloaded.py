"""Imported once by the server that the ranks are forked from; OMP_NUM_THREADS is 1 there, so no threads are lost."""

import finetune_trainer.train.stage  # noqa: F401
