"""Adapters to stacks that people already run. Importing one imports its stack; nothing here is imported by anything else."""
