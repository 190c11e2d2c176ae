"""What stands beside the training loop: reports, logs, checkpoints on interrupt, exports.

The run folder is the trainer's `default_root_dir`; callbacks read what steps return and never change what is trained.
"""
