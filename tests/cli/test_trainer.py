"""What `gptpl.runs.trainer` makes of settings where Lightning's own default is another."""

from lightning.pytorch.strategies import DDPStrategy

from gptpl.config.compose import compose
from gptpl.runs.trainer import build_trainer


def test_ddp_keeps_one_copy_of_the_gradients():
    cfg = compose("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    trainer = build_trainer(cfg, precision="32-true", callbacks=[])
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.strategy._ddp_kwargs["gradient_as_bucket_view"]
    assert trainer.world_size == 2


def test_several_nodes_need_a_launcher(refused, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    small = ("train", "model=tiny", "tokenizer=bytes", "trainer=cpu", "run_dir=run")
    assert refused(*small, "trainer.num_nodes=2") == (
        "trainer.num_nodes=2, but no launcher has started this process: start it with srun, or on every node"
        " with torchrun --nnodes 2 --nproc-per-node DEVICES --node-rank 0 --master-addr FIRST_NODE"
        " -m gptpl train ..., without trainer.num_nodes"
    )
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "node-a")
    message = refused(*small)
    assert message.startswith("node 1: the environment has NODE_RANK=1, but no launcher has started")
    assert "--node-rank 1 --master-addr node-a" in message
