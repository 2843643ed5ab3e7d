"""What `gptpl.cli.trainer` makes of settings where Lightning's own default is another."""

from lightning.pytorch.strategies import DDPStrategy

from gptpl.cli.schema import TrainerConf
from gptpl.cli.trainer import build_trainer


def test_ddp_keeps_one_copy_of_the_gradients():
    trainer = build_trainer(
        TrainerConf(accelerator="cpu", devices=2, strategy="ddp"),
        precision="32-true",
        eval_every_n_steps=1,
        deterministic=False,
        callbacks=[],
    )
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.strategy._ddp_kwargs["gradient_as_bucket_view"]
    assert trainer.world_size == 2
