"""Settings of roots that extend another one; what the tests compose, from copies, is what Hydra composes."""

from collections.abc import Callable, Sequence

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from gptpl.config.compose import compose
from gptpl.config.groups import config_folder
from gptpl.errors import InputError


@pytest.mark.parametrize("root", ["submit", "plan", "autotune", "data_show", "find_lr", "verify_resume"])
def test_a_command_on_the_settings_of_a_run_has_their_limits(root: str) -> None:
    with pytest.raises(InputError, match=r"seed must be from 0 to \d+, got -1"):
        compose("seed=-1", config_name=root)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("train", ()),
        ("train", ("optimizer.lr=1e-2", "model=tiny", "seed=3", "run_dir='a b'", "trainer.devices=[0,1]")),
        ("train", ("+model.more=1", "++run_dir=x", "++model.n_layers=3", "~optimizer.weight_decay")),
        (
            "train",
            ("callbacks=[default]", "+logger.x={a: 1}", "~optimizer.lr", "experiment=quick"),
        ),
        ("train", ("model={n_layers: 2}", "task=instruct", "data=instruction_file", "data.path=x")),
        ("train", ("hydra.verbose=true", "model.n_layers=2")),
        ("sweep", ("hydra.sweep.dir=x", "+other=1", "hydra/launcher=joblib")),
        ("generate", ("prompt=hello", "sampling=greedy", "sampling.temperature=3")),
        ("train", ("model.widht=3",)),
        ("train", ("+seed=3",)),
        ("train", ("~nothing",)),
        ("train", ("~optimizer.lr=5",)),
        ("train", ("model=none", "model.n_layers=3")),
        ("train", ("model.n_layers=1,2",)),
        ("train", ("data@other=tale",)),
    ],
    ids=str,
)
def test_a_copy_is_what_hydra_composes(
    name: str,
    overrides: Sequence[str],
    the_same_choices_are_composed_once: Callable[..., DictConfig],
) -> None:
    def result(composing: Callable[..., DictConfig]) -> object:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3", job_name=name):
            try:
                cfg = composing(name, list(overrides), return_hydra_config=True)
            except HydraException as error:
                return type(error), str(error), str(error.__cause__)
        cfg.hydra.job.override_dirname = ""  # which gptpl does not use
        return OmegaConf.to_container(cfg), OmegaConf.is_struct(cfg)

    wanted = result(the_same_choices_are_composed_once)
    assert result(hydra.compose) == wanted
    assert result(hydra.compose) == wanted  # from the copy
