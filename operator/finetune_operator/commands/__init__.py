"""The commands of `finetune`, one module each: `commands/<name>.py` has a function `<name>` for typer.

A module is imported only when its command is called, so its imports cost the other commands nothing.
"""
