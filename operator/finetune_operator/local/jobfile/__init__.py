"""The job's file, what a second run may change in it, and the record that `finetune run` keeps of it."""
