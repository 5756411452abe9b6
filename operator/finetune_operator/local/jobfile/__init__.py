"""The job's file, which of its fields may change later, and the record that `finetune run` keeps of the job."""
