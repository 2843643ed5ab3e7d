"""Optimizers: AdamW, Muon on the hidden matrices with AdamW on the rest, and any class like torch's."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, AdamW, Optimizer

from gptpl.checkpoints.resume_state import one_state
from gptpl.errors import InputError
from gptpl.model.gpt import MultiHeadAttention
from gptpl.model.lora import is_low_rank
from gptpl.settings import FRACTION, NEVER, NOT_NEGATIVE, POSITIVE, TWO_FRACTIONS, check_limits
from gptpl.training.sharding import each_whole, in_order, is_sharded

Decay = Literal["matrices", "all"]
Made = TypeVar("Made")


def optimizer_of(factory: Callable[..., Optimizer], net: nn.Module) -> Optimizer:
    """An optimizer of the model's trainable parameters, made by a class or function with its settings bound.

    A first parameter called `net`, `model` or `module` gets the model, as that of `adamw`. Any other, such as
    `params` of torch's own classes, gets the trainable parameters: in `decay_groups` where there is a setting
    `weight_decay`, else as a list. Raises InputError for settings that the class refuses.
    """
    settings = inspect.signature(factory).parameters
    if next(iter(settings), None) in ("net", "model", "module"):
        given: Any = net
    elif "weight_decay" in settings and settings["weight_decay"].default is not inspect.Parameter.empty:
        given = decay_groups(net, weight_decay=settings["weight_decay"].default)
    else:
        given = [p for p in net.parameters() if p.requires_grad]
    optimizer = made_by("optimizer", factory, given, Optimizer)
    if isinstance(optimizer, LBFGS):
        raise InputError(
            "optimizer: LBFGS computes the loss several times a step, which accumulated batches do not allow:"
            " use AdamW or SGD"
        )
    return optimizer


def made_by(kind: str, factory: Callable[..., Any], given: Any, wanted: type[Made], **settings: Any) -> Made:
    """The `wanted` thing that a class or function makes. Raises InputError for settings that it refuses."""
    name = factory_name(factory)
    try:
        made = factory(given, **settings)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{kind}: {name} refuses its settings: {str(error).splitlines()[0]}") from error
    if not isinstance(made, wanted):
        raise InputError(f"{kind}: {name} returned {type(made).__name__}, not a torch {wanted.__name__}")
    return made


def factory_name(factory: Callable[..., Any]) -> str:
    """The name of the class or function, whose settings may be bound."""
    return str(getattr(factory.func if isinstance(factory, partial) else factory, "__name__", factory))


def peak_lr(factory: Callable[..., Optimizer], net: nn.Module) -> float:
    """The peak learning rate of schedules: the setting `lr`, else that of the first parameter group."""
    lr = inspect.signature(factory).parameters.get("lr")
    if lr is None or lr.default is inspect.Parameter.empty:
        return float(optimizer_of(factory, net).param_groups[0]["lr"])
    return float(lr.default)


def decay_groups(net: nn.Module, *, weight_decay: float, decay: Decay = "matrices") -> list[dict[str, Any]]:
    """Optimizer groups of the parameters that train: those with weight decay, then, if any, those without.

    "matrices" decays weights and embeddings (2 dimensions and more), not biases and LayerNorm gains, as GPT-3
    and nanoGPT do; "all" decays everything, as the book does. A tied weight counts once.
    """
    if decay not in ("matrices", "all"):
        raise InputError(f"optimizer.decay={decay} is unknown: choose matrices or all")
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for parameter in net.parameters():
        if parameter.requires_grad:
            decays = decay == "all" or parameter.dim() >= 2
            groups[0 if decays else 1]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def adamw(
    net: nn.Module,
    *,
    lr: Annotated[float, POSITIVE] = 4e-4,
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.1,
    betas: Annotated[tuple[float, float], TWO_FRACTIONS] = (0.9, 0.999),
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8,
    decay: Annotated[Decay, NEVER] = "matrices",
) -> AdamW:
    """torch's fused AdamW (Loshchilov & Hutter 2019) with decay and no-decay groups, see `decay_groups`.

    A peak learning rate `lr` of 1e-5 to 1e-3 and a `weight_decay` of 0.01 to 0.3 are usual.
    """
    check_limits(adamw, "optimizer.", lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
    groups = decay_groups(net, weight_decay=weight_decay, decay=decay)
    return AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)


def muon(
    net: nn.Module,
    *,
    lr: Annotated[float, POSITIVE] = 4e-4,
    muon_lr: Annotated[float, POSITIVE] = 4e-4,
    momentum: Annotated[float, FRACTION] = 0.95,
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.1,
    betas: Annotated[tuple[float, float], TWO_FRACTIONS] = (0.9, 0.999),
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8,
    decay: Annotated[Decay, NEVER] = "matrices",
) -> "MuonWithAdamW":
    """`torch.optim.Muon` on the matrices inside the blocks, AdamW on embeddings, head, biases and gains.

    Muon orthogonalises each matrix's momentum (Jordan et al. 2024), which is meant for hidden layers only.
    With `adjust_lr_fn="match_rms_adamw"` its updates have AdamW's size, so `muon_lr` is of AdamW's order too
    (Liu et al. 2025, "Muon is scalable for LLM training"). Query, key and value, which share one weight in
    gptpl's attention, are three matrices.

    The small matrices of LoRA are AdamW's: only their product is a hidden layer's. A `net` of any kind keeps
    its hidden matrices under `blocks`. `lr`, `betas`, `eps` and `decay` are AdamW's, `muon_lr` and `momentum`
    Muon's, `weight_decay` is for both.
    """
    limited = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
    check_limits(muon, "optimizer.", **limited, muon_lr=muon_lr, momentum=momentum)
    hidden = hidden_matrices(net)
    if not hidden:
        raise InputError(
            "optimizer=muon finds no whole matrix that trains in the model's blocks: use optimizer=adamw"
        )
    rest = decay_groups(net, weight_decay=weight_decay, decay=decay)
    for group in rest:
        group["params"] = [p for p in group["params"] if p not in hidden]
    return MuonWithAdamW(
        SplitMuon(
            [{"params": list(hidden), "name": "muon"}],
            stacked=hidden,
            lr=muon_lr,
            momentum=momentum,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        AdamW([g for g in rest if g["params"]], lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True),
    )


def hidden_matrices(net: nn.Module) -> dict[nn.Parameter, int]:
    """Muon's parameters of a model, each with the number of matrices that are stacked in it; see `muon`."""
    stacked = {layer.qkv.weight: 3 for layer in net.modules() if isinstance(layer, MultiHeadAttention)}
    return {
        p: stacked.get(p, 1)
        for name, p in net.named_parameters()
        if ".blocks." in f".{name}" and p.dim() == 2 and p.requires_grad and not is_low_rank(name)
    }


class SplitMuon(torch.optim.Muon):
    """torch's Muon for parameters that may be several matrices of one size, stacked along their rows.

    Each matrix is orthogonalised by itself. The state is that of torch's Muon on the whole parameters.

    Of parameters that FSDP shards the momenta are sharded, too. Each process orthogonalises some of them,
    whole, and sends the others their rows of the result: see `gptpl.training.sharding.each_whole`.

    Args:
        stacked: the number of matrices in a parameter that has more than one.
    """

    def __init__(self, params: Any, *, stacked: Mapping[nn.Parameter, int], **settings: Any) -> None:
        super().__init__(params, **settings)
        self._stacked = dict(stacked)
        self._settings = tuple(self.defaults)  # torch adds to the defaults when it loads a state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            settings = {name: group[name] for name in self._settings}
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
            self._step_whole([p for p in parameters if not is_sharded(p)], settings)
            self._step_sharded([p for p in parameters if is_sharded(p)], settings)
        return loss

    def _step_whole(self, parameters: list[Any], settings: Mapping[str, Any]) -> None:
        momenta: dict[nn.Parameter, Tensor] = {}
        for whole in parameters:
            kept = self.state[whole]["momentum_buffer"]
            momenta |= _matrices(self._stacked.get(whole, 1), whole, whole.grad, kept)
        _torchs_step(momenta, settings)

    def _step_sharded(self, parameters: list[Any], settings: Mapping[str, Any]) -> None:
        lr, momentum = settings["lr"], settings["momentum"]
        orthogonal = {**settings, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}

        def update(parameter: Any) -> Tensor:
            """This process's rows of what torch's Muon orthogonalises."""
            gradient, kept = parameter.grad.to_local(), self.state[parameter]["momentum_buffer"].to_local()
            kept.lerp_(gradient, 1 - momentum)
            return gradient.lerp(kept, momentum) if settings["nesterov"] else kept

        def step_of(parameter: Any, whole: Tensor) -> Tensor:
            """Muon's step from an update, which it finds as the momentum."""
            step = torch.zeros_like(whole)
            _torchs_step(_matrices(self._stacked.get(parameter, 1), step, whole, whole), orthogonal)
            return step

        for parameter, step in each_whole(parameters, update, step_of):
            parameter.to_local().mul_(1 - lr * settings["weight_decay"]).add_(step)


def _matrices(n: int, values: Tensor, gradient: Tensor, momentum: Tensor) -> dict[nn.Parameter, Tensor]:
    """The momenta of n matrices that are stacked in a parameter, all of them views."""
    momenta = {}
    for part, its_gradient, its_momentum in zip(
        *(t.chunk(n) for t in (values, gradient, momentum)), strict=True
    ):
        matrix = nn.Parameter(part)
        matrix.grad, momenta[matrix] = its_gradient, its_momentum
    return momenta


def _torchs_step(momenta: dict[nn.Parameter, Tensor], settings: Mapping[str, Any]) -> None:
    """A step of torch's Muon on matrices that have gradients and momenta."""
    if momenta:
        one = torch.optim.Muon(list(momenta), **settings)
        one.state |= {matrix: {"momentum_buffer": momentum} for matrix, momentum in momenta.items()}
        one.step()  # type: ignore[no-untyped-call]


class MuonWithAdamW(Optimizer):
    """Two optimizers that step as one: schedules, clipping and checkpoints see a single optimizer.

    `param_groups` are the parts' own dictionaries, Muon's first: a schedule that sets `lr` there sets theirs.
    The parts share one `state`, of which this has the only `state_dict`, in torch's form.
    """

    def __init__(self, muon_part: Optimizer, adamw_part: Optimizer) -> None:
        self.parts = {"muon": muon_part, "adamw": adamw_part}
        super().__init__([p for part in self.parts.values() for p in in_order(part.param_groups)], {})
        self._join()

    def _join(self) -> None:
        """Make the parts' states one, and their groups those of the whole."""
        muon_part, adamw_part = self.parts.values()
        muon_part.state.update(adamw_part.state)
        self.state = adamw_part.state = muon_part.state
        self.param_groups = [*muon_part.param_groups, *adamw_part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both parts; returns the closure's loss."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for part in self.parts.values():
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, also that of before, with the parts' own under their names."""
        state = one_state(state_dict)
        groups = state["param_groups"]
        if ["momentum" in group for group in groups] != ["momentum" in group for group in self.param_groups]:
            raise InputError(
                "the checkpoint's optimizer is not Muon with AdamW: resume the run with its own optimizer"
            )
        for part in self.parts.values():
            of_part, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            held = in_order(of_part)
            kept = {name: state["state"][name] for name in held if name in state["state"]}
            part.load_state_dict({"state": kept, "param_groups": of_part})
        self._join()
