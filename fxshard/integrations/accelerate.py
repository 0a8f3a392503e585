"""``accelerate`` over programs: every process runs the loop of one device.

A program is given the whole batch on every rank. It splits the batch itself, sums what must be summed, and returns what
the model would. So the loop around it is that of one device, and all ranks run it alike:

    accelerate, with DDP                            here
    each process has batches of its own             all have all batches
    the model is wrapped                            the program is as it is
    losses and metrics are gathered                 they are whole on every rank
    a scheduler steps once a process                once
    the norm is that of this process's gradients    that of the whole model's
    rank 0 writes                                   rank 0 writes; of weights and optimizers, each rank its parts
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import accelerate
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, DynamoBackend, recursively_apply
from torch import nn

from fxshard.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from fxshard.errors import DistributedError, FxshardError
from fxshard.gradients import clip_grad_norm_
from fxshard.program import ParallelModule
from fxshard.training.scaler import GradScaler

FOLDER = "fxshard"
"""Where, in a folder of another library's, fxshard keeps a checkpoint of its own."""
OF_PLANS = "give parallelize a plan: data_parallel, zero, tensor_parallel and others, joined with |"


class Accelerator(accelerate.Accelerator):  # type: ignore[misc]
    """``accelerate.Accelerator`` for programs; its arguments are the same.

    Use it as on one device, under torchrun: ``prepare``, ``accumulate``, ``backward``, ``clip_grad_norm_``,
    ``save_state`` and ``load_state``. To the loop there is one process (``num_processes`` is 1); only
    ``is_main_process`` and ``process_index`` tell the ranks apart.

    Raises:
        FxshardError: when it is asked for what a program does itself, such as FSDP, or not in this way.

    >>> import torch, fxshard
    >>> from fxshard.integrations.accelerate import Accelerator
    >>> model, x = nn.Linear(4, 4), torch.randn(2, 4)
    >>> program = fxshard.parallelize(model, fxshard.zero(1), (x,))  # zero(8), and torchrun --nproc-per-node 8
    >>> accelerator = Accelerator(cpu=True)
    >>> program, optimizer = accelerator.prepare(program, torch.optim.AdamW(program.parameters()))
    >>> accelerator.backward(program(x).square().mean())
    >>> norm = accelerator.clip_grad_norm_(program.parameters(), 1.0)
    >>> optimizer.step()
    """

    scaler: Any
    _models: list[Any]
    _optimizers: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settle()

    @classmethod
    def of(cls, plain: accelerate.Accelerator) -> Self:
        """One for programs, which takes the place of another one and shares its state."""
        made = cls.__new__(cls)
        made.__dict__ = plain.__dict__
        made._settle()
        return made

    def _settle(self) -> None:
        refuse(self._problems(), "this Accelerator cannot train a program:")
        check_processes(self.state)
        self.dataloader_config.dispatch_batches = False  # every rank reads its batches itself
        if self.scaler is not None:
            options = self.scaler_handler.to_kwargs() if self.scaler_handler is not None else {}
            self.scaler = GradScaler(self.device.type, **options)

    def _problems(self) -> Iterator[str]:
        kind = self.state.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            yield f"{kind.value} would split what is split already; {OF_PLANS}"
        if self.parallelism_config is not None:
            yield f"a parallelism_config is for models that are split otherwise; {OF_PLANS}"
        if self.dispatch_batches:
            yield "dispatch_batches would give each rank a part of the batch; leave it out"
        if self.state.dynamo_plugin.backend != DynamoBackend.NO:
            yield "a dynamo backend would compile the program while it is prepared; call torch.compile(program)"
        if self.mixed_precision == "fp8":
            yield "fp8 replaces modules, and a program has none that run; use bf16"

    # --- one process, to the loop ----------------------------------------------------------------------------------

    @property
    def distributed_type(self) -> DistributedType:
        """That of one process."""
        return DistributedType.NO

    @property
    def num_processes(self) -> int:
        """1: no batch is split among processes, and nothing that they computed must be joined."""
        return 1

    @property
    def use_distributed(self) -> bool:
        """False: programs see to it."""
        return False

    def gather(self, tensor: Any) -> Any:
        """As it is: it is whole on every rank."""
        return tensor

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As it is, without what a last, smaller batch does not have: as on one device."""
        state = self.gradient_state
        if not (state.end_of_dataloader and state.remainder > 0):
            return input_data
        if use_gather_object:
            return input_data[: state.remainder]
        return recursively_apply(lambda tensor: tensor[: state.remainder], input_data)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """As it is, likewise."""
        return tensor

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """As it is: it has the same shape on every rank."""
        return tensor

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """All inputs: a program takes whole ones on every rank."""
        yield inputs

    # --- training --------------------------------------------------------------------------------------------------

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        """Adds mixed precision, and wraps nothing."""
        if isinstance(model, ParallelModule):
            check_ranks(model)
        return super().prepare_model(model, device_placement, evaluation_mode)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """One that steps once a step."""
        made = super().prepare_scheduler(scheduler)
        made.split_batches = True  # else it steps once for each process, as if each had a batch of its own
        return made

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """``program.no_sync``; within ``accumulate`` it is called where it helps."""
        with model.no_sync() if isinstance(model, ParallelModule) else nullcontext():
            yield

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        """``fxshard.clip_grad_norm_``, for the parameters of a program; collective.

        Raises:
            FxshardError: when they are some of a program's, or of several programs.
        """
        self.unscale_gradients()
        return clip_grad_norm_(self._of_whom(parameters), max_norm, norm_type)

    def _of_whom(self, parameters: Any) -> nn.Module:
        """The program that has these parameters; where none has any, a module that holds them."""
        if isinstance(parameters, nn.Module):
            return parameters
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        asked = {id(each) for each in given if each.requires_grad}
        for program in self._programs:
            held = {id(each) for each in program.parameters() if each.requires_grad}
            if held == asked:
                return program
            if held & asked:
                raise FxshardError(
                    f"the gradients of {len(asked)} parameters cannot be clipped: {len(held & asked)} of them are of a "
                    f"program of {len(held)}, and the norm is that of a whole model",
                    fix="call clip_grad_norm_(program.parameters(), max_norm), once for each program",
                )
        return nn.ParameterList(given)

    @property
    def _programs(self) -> list[ParallelModule]:
        return [model for model in self._models if isinstance(model, ParallelModule)]

    # --- saving ----------------------------------------------------------------------------------------------------

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> Any:
        """Of a program the whole weights under the model's names, on rank 0; nothing on the others; collective."""
        if isinstance(model, ParallelModule):
            return model.full_state_dict(rank0_only=True)
        return super().get_state_dict(model, unwrap)

    def save_state(self, output_dir: str | None = None, safe_serialization: bool = True, **options: Any) -> Any:
        """As ``accelerate`` does; of programs and their optimizers, what any mesh can load; collective."""
        pairs = self._pairs()
        with self._without(pairs):
            folder = super().save_state(output_dir, safe_serialization, **options)
        for i, (program, optimizer) in enumerate(pairs):
            save_checkpoint(Path(folder) / f"{FOLDER}_{i}", program, optimizer, step=self.step, keep=1)
        return folder

    def load_state(self, input_dir: str | None = None, load_kwargs: Any = None, **options: Any) -> None:
        """Goes on from what ``save_state`` wrote, on this mesh or another one; collective."""
        pairs, found = self._pairs(), []
        hook = self.register_load_state_pre_hook(lambda models, folder: found.append(folder))
        try:
            with self._without(pairs):
                super().load_state(input_dir, load_kwargs, **options)
        finally:
            hook.remove()
        for i, (program, optimizer) in enumerate(pairs):
            load_checkpoint(Path(found[0]) / f"{FOLDER}_{i}", program, optimizer, random_state=False)

    def _pairs(self) -> list[tuple[ParallelModule, torch.optim.Optimizer | None]]:
        """The programs, each with its optimizer."""
        out = []
        for program in self._programs:
            held = {id(each) for each in program.parameters()}
            its = [each for each in map(unwrapped, self._optimizers) if held & ids_of(each)]
            if len(its) > 1 or (its and not ids_of(its[0]) <= held):
                raise FxshardError(
                    "the state cannot be saved: a program has several optimizers, or one that has other parameters too",
                    fix="give each program one optimizer of its own, or call fxshard.save_checkpoint for each of them",
                )
            out.append((program, its[0] if its else None))
        return out

    @contextmanager
    def _without(self, pairs: Sequence[tuple[ParallelModule, torch.optim.Optimizer | None]]) -> Iterator[None]:
        """Without programs and their optimizers, of which ``accelerate`` would write rank 0's parts."""
        theirs = {id(each) for pair in pairs for each in pair}
        kept = self._models, self._optimizers
        self._models = [each for each in self._models if id(each) not in theirs]
        self._optimizers = [each for each in self._optimizers if id(unwrapped(each)) not in theirs]
        try:
            yield
        finally:
            self._models, self._optimizers = kept


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch that ``accelerate`` wrapped."""
    while isinstance(optimizer, accelerate.optimizer.AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]


def ids_of(optimizer: torch.optim.Optimizer) -> set[int]:
    """The parameters of an optimizer."""
    return {id(each) for group in optimizer.param_groups for each in group["params"]}


def refuse(problems: Iterable[str], what: str) -> None:
    """Raises ``FxshardError`` where there are problems, with all of them."""
    lines = [f"  - {problem}" for problem in problems]
    if lines:
        raise FxshardError("\n".join([what, *lines]))


def check_processes(state: Any) -> None:
    """Raises ``DistributedError`` where ``accelerate`` does not see the processes that torch.distributed has."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if (state.num_processes, state.process_index) != (world, rank):
        raise DistributedError(
            f"accelerate takes this for process {state.process_index} of {state.num_processes}, torch.distributed for "
            f"rank {rank} of {world}: each rank would write what rank 0 should",
            fix="start it with torchrun, and on CPUs say so: Accelerator(cpu=True), TrainingArguments(use_cpu=True)",
        )


def check_ranks(program: ParallelModule) -> None:
    """Raises ``DistributedError`` where a program is for other ranks than those that run."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if program.mesh.world_size != world:
        raise DistributedError(
            f"the program is for {program.mesh.world_size} ranks, and {world} run: a loop cannot train simulated ranks",
            fix=f"start the script with torchrun --nproc-per-node {program.mesh.world_size}",
        )
