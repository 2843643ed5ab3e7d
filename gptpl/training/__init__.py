"""How a model learns: losses, optimizers, schedules, and one LightningModule per task."""
