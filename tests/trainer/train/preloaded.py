"""Imported once by the server that the ranks are forked from; OMP_NUM_THREADS is 1 there, so no threads are lost.

Beside the stage what it imports when it is needed: a fifth of the time of a short training.
"""

import finetune_trainer.__main__
import finetune_trainer.train.stage  # noqa: F401
