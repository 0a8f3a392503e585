"""The ``Trainer`` of transformers over programs: on every rank it is the trainer of one device.

All ranks run the same loop over the same whole batches (``integrations.accelerate`` says why that is right). What is
left to do for a trainer is what it does by itself, past ``accelerate``:

    what it calls the model with    the program is captured from the first batch, if it was not yet
    checkpoints                     weights as the model writes them; in ``fxshard/`` what training goes on from
    the random state                rank 0's, for all
    names that classes have         those of the model's class
    counts of parameters, of steps  those of the whole model, of one process
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import find_labels

from fxshard.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from fxshard.checkpoint.folders import latest_checkpoint
from fxshard.checkpoint.pretrained import load_pretrained, save_pretrained
from fxshard.errors import CheckpointError, FxshardError
from fxshard.integrations.accelerate import FOLDER, OF_PLANS, Accelerator, check_ranks, refuse, unwrapped
from fxshard.placement import is_shard
from fxshard.program import ParallelModule
from fxshard.runtime.process_groups import share_random_state

ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers that treat each number of a weight by itself, so that a part is stepped as the whole would be."""


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` for programs: ``model`` is what ``parallelize`` returned, all else is as it was.

    ``per_device_train_batch_size`` is that of the whole batch, which each rank is given and splits itself. Losses,
    gradient norms, metrics and checkpoints are those of one device, and training goes on on any other mesh.

    Start it with torchrun, and build the model alike on every rank. A program without example inputs is captured from
    the first batch, and for every other size of batch when it comes. Other trainers of transformers work too, behind
    this one: ``class Mine(Trainer, transformers.Seq2SeqTrainer)``.

    Raises:
        FxshardError: when the arguments ask for what a program does itself, or for what would train another model.

    >>> import tempfile, fxshard
    >>> from fxshard.integrations.transformers import Trainer
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> model = transformers.LlamaForCausalLM(config)
    >>> program = fxshard.parallelize(model, fxshard.zero(1))  # zero(8), and torchrun --nproc-per-node 8
    >>> rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     args = transformers.TrainingArguments(
    ...         folder, max_steps=2, save_strategy="no", use_cpu=True, dataloader_pin_memory=False, report_to=[]
    ...     )
    ...     trained = Trainer(program, args, train_dataset=rows).train()
    {'train_runtime': ...}
    >>> trained.global_step
    2
    """

    label_smoother: Any
    accelerator: Any
    current_flos: Any

    # --- beginning -------------------------------------------------------------------------------------------------

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **options: Any) -> None:
        if model is not None:
            check_program(model)
        super().__init__(model, args, *rest, **options)
        original: nn.Module = self.model._original.get()
        if self.args.label_names is None:
            self.label_names = find_labels(type(original))
        if self.label_smoother is not None and type(original).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            self.label_smoother = partial(self.label_smoother, shift_labels=True)

    def call_model_init(self, trial: Any = None) -> Any:
        """The program that ``model_init`` returns."""
        return check_program(super().call_model_init(trial))

    def create_accelerator_and_postprocess(self) -> None:
        """Puts fxshard's ``Accelerator`` in the place of the one that was made."""
        refuse(problems_of(self.args), "these TrainingArguments cannot train a program:")
        super().create_accelerator_and_postprocess()
        self.accelerator = Accelerator.of(self.accelerator)
        use_objects = self.args.eval_use_gather_object
        self.gather_function = partial(self.accelerator.gather_for_metrics, use_gather_object=use_objects)

    # --- training --------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **options: Any) -> Any:
        """As the base class does; the program is captured first, if it was not given example inputs."""
        if self.model_init is None:
            self._capture(self.model)
        return super().train(*args, **options)

    def create_optimizer(self, model: Any = None) -> Any:
        """Over this rank's parts."""
        self._capture(self.model)
        asked = str(getattr(self.args.optim, "value", self.args.optim))
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None and asked not in ELEMENTWISE:
            names = [name for name, _ in self.model.named_parameters()]
            split = [name for name in names if any(map(is_shard, self.model.placements_of(name)))]
            if split and self.model.mesh.world_size > 1:
                raise FxshardError(
                    f"optim={asked!r} is not known to step a part of a weight as it would the whole, and "
                    f"{len(split)} weights lie in parts, first {split[0]}",
                    fix=f"take one of {', '.join(ELEMENTWISE)}, or a plan of data_parallel alone",
                )
        return super().create_optimizer(model)

    def _capture(self, program: ParallelModule) -> None:
        """Captures a program as the first batch will call it, so that it has parameters; nothing is run."""
        if program.captures:
            return
        with same_randomness():
            batch = next(iter(self.get_train_dataloader()))
        inputs = self._prepare_inputs(batch)
        num_items = self._get_num_items_in_batch([inputs], self.args.device)
        if self.label_smoother is not None or self.compute_loss_func is not None:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if self.model_accepts_loss_kwargs and num_items is not None:
            inputs = {**inputs, "num_items_in_batch": num_items}
        program.train()
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            program.capture((), inputs)

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """The batches of a step, drawn by all ranks with the random state of rank 0."""
        share_random_state(self.model.mesh, torch.device("cpu"))
        return super().get_batch_samples(*args, **options)

    def _get_dataloader(self, *args: Any, **options: Any) -> Any:
        loader = super()._get_dataloader(*args, **options)
        base = getattr(loader, "base_dataloader", loader)
        if isinstance(base.worker_init_fn, partial):  # which would give the workers of each rank another seed
            base.worker_init_fn = partial(base.worker_init_fn, rank=0)
        return loader

    def get_total_train_batch_size(self, args: Any) -> int:
        """How many rows make a step."""
        return int(self._train_batch_size * args.gradient_accumulation_steps)

    def floating_point_ops(self, inputs: Any) -> int:
        """Those of the whole model, as the base class estimates them."""
        original, name = self.model._original.get(), getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs or not hasattr(original, "num_parameters"):
            return 0
        return 6 * int(inputs[name].numel() * original.num_parameters(exclude_embeddings=True))

    def store_flos(self) -> None:
        """Adds up what was computed, once for all ranks."""
        self.state.total_flos += self.current_flos
        self.current_flos = 0

    # --- saving ----------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Writes the weights as the model does, and what ``transformers`` writes beside them; collective."""
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        save_pretrained(self.model, folder)
        if self.args.should_save:
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Writes what training goes on from, whatever the mesh; collective."""
        extra = {"scheduler": self.lr_scheduler.state_dict()}
        optimizer, step = unwrapped(self.optimizer), self.state.global_step
        save_checkpoint(Path(output_dir) / FOLDER, self.model, optimizer, step=step, extra=extra, keep=1)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if latest_checkpoint(Path(checkpoint) / FOLDER) is None:
            raise CheckpointError(
                f"{checkpoint} has weights, and no state of an optimizer that a program could go on with",
                fix="to begin anew from its weights: fxshard.load_pretrained(program, folder) before train()",
            )
        loaded = load_checkpoint(Path(checkpoint) / FOLDER, self.model, unwrapped(self.optimizer), random_state=False)
        self.lr_scheduler.load_state_dict(loaded.extra["scheduler"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_weights(Path(self.state.best_model_checkpoint))

    def _load_weights(self, folder: Path) -> None:
        """From fxshard's checkpoint where there is one: its names are the model's, whatever its files call them."""
        if latest_checkpoint(folder / FOLDER) is not None:
            load_checkpoint(folder / FOLDER, self.model, random_state=False)
        else:
            load_pretrained(self.model, folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """Rank 0's: the others draw what it draws."""
        if self.args.process_index == 0:
            super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Rank 0's, on whatever mesh it was saved."""
        names = [Path(checkpoint or "") / name for name in ("rng_state_0.pth", "rng_state.pth")]
        saved = next((path for path in names if path.is_file()), None)
        if checkpoint is None or saved is None:
            return
        own = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(saved, Path(folder) / own)
            super()._load_rng_state(folder)


def check_program(model: Any) -> ParallelModule:
    """The same; raises ``FxshardError`` where it is not a program for the ranks that run."""
    if not isinstance(model, ParallelModule):
        raise FxshardError(
            f"model is a {type(model).__name__}, and not a program",
            fix="give what fxshard.parallelize(model, plan) returned; for the model itself take transformers.Trainer",
        )
    check_ranks(model)
    return model


def problems_of(args: Any) -> Iterator[str]:
    """What a trainer is asked for, and cannot do with a program."""
    if args.fsdp or args.deepspeed or args.parallelism_config is not None:
        yield f"fsdp, deepspeed and parallelism_config would split what is split already; {OF_PLANS}"
    if args.torch_compile:
        yield "torch_compile would compile the program while it is prepared; leave it out"
    if args.auto_find_batch_size:
        yield "auto_find_batch_size would shrink the batch of the one rank that runs out of memory; set the batch size"
    if args.activation_checkpointing:
        yield "activation_checkpointing comes after capture; give parallelize(..., checkpoint='model.layers.*')"
    if args.neftune_noise_alpha is not None:
        yield "neftune_noise_alpha needs a hook on a module, and a program calls none; put the noise into the model"
    if args.use_liger_kernel:
        yield "use_liger_kernel replaces modules, and a program calls none; replace them before parallelize"
    if args.fp16_full_eval or args.bf16_full_eval:
        yield "fp16_full_eval and bf16_full_eval would change the dtype of the weights; take bf16=True"
    if args.train_sampling_strategy == "batch_rebalance":
        yield "train_sampling_strategy='batch_rebalance' gives each rank other rows; take 'random'"
    if getattr(args, "predict_with_generate", False):
        yield "predict_with_generate calls parts of a program, which do not run; let the model itself generate"
    if args.save_on_each_node:
        yield "save_on_each_node: a checkpoint is one folder that all ranks see"


@contextmanager
def same_randomness() -> Iterator[None]:
    """Afterwards torch, numpy and Python draw as if nothing had been drawn within."""
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(kept[0])
    np.random.set_state(kept[1])
