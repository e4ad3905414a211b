"""A run's memory: directory of plain files, wandb, console, and a page that says what happened."""
