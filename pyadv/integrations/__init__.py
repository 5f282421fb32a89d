"""pyadv in the frameworks that people train and publish with. Each module needs the package that it
is named after; none is imported by the rest of pyadv.

- `robustbench`: RobustBench's benchmark on pyadv's AutoAttack, and the models of its zoo.
- `lightning`: robust accuracy during training, objectives as `training_step`.
- `hub`: trained runs on the Hugging Face Hub.
- `metrics`: robust accuracy accumulated over batches, as torchmetrics has it.
"""
