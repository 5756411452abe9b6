"""The same decisions carried out with processes on this machine: `finetune run`."""
