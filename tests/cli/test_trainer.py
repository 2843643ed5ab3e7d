"""What `gptpl.runs.trainer` makes of settings where Lightning's own default is another."""

from lightning.pytorch.strategies import DDPStrategy

from gptpl.config.groups import said_by
from gptpl.runs.trainer import build_trainer


def test_ddp_keeps_one_copy_of_the_gradients():
    trainer = build_trainer(
        said_by("trainer", "ddp", bases=True) | {"accelerator": "cpu", "devices": 2},
        precision="32-true",
        eval_every_n_steps=1,
        deterministic=False,
        callbacks=[],
    )
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.strategy._ddp_kwargs["gradient_as_bucket_view"]
    assert trainer.world_size == 2
