"""What ranks and trainings of tests are forked with; OMP_NUM_THREADS is 1 there, so no threads are lost.

Beside the stages what they import and build when it is needed: transformers compiles some 900 regular expressions
before it names the weights of its first model.
"""

# ruff: noqa: F401
import warnings

import torch.distributed.fsdp
import transformers.models.llama.modeling_llama
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import finetune_trainer.__main__
import finetune_trainer.export
import finetune_trainer.train.stage

get_checkpoint_conversion_mapping("llama")

# As in pyproject.toml; what is forked takes the filters over.
for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
    warnings.filterwarnings("error", category=category, module="finetune_")
