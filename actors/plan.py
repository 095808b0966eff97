"""From settings to a plan: model, placement, sizes, children. What cannot run is refused here, before anything runs.

Owns: nothing; values only. Reads the model directory's headers and how much memory is free.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import attrs
import msgspec

from ..errors import ConfigError, TopologyError
from ..kernels.memory import available_bytes, check_memory, default_kv_pages, replica_bytes, weights_bytes
from ..kernels.qwen3.model import ModelSpec
from ..kernels.qwen3.step import Limits
from ..topology import ChipPlace, ReplicaPlace, Topology
from .boot import REST_FOR_ONE, ROUTER, TOKENIZER, Boot, ChildSpec
from .config import EngineConfig
from .generation import generation_defaults

__all__ = ["DEMO_MODEL", "EnginePlan", "model_directory", "plan_engine"]

DEMO_MODEL = "demo"
STEP_TIMEOUT_S = 1200.0  # for one dispatch; a long prefill of a large model on a small machine takes minutes


@attrs.frozen(kw_only=True)
class EnginePlan:
    """What an engine will start."""

    config: EngineConfig
    model_dir: Path
    spec: ModelSpec
    topology: Topology
    limits: Limits
    """Of each replica."""
    threads: int
    """Compute threads of each chip."""
    generation_defaults: Mapping[str, Any]
    """Fields of ``SamplingParams`` that the model's author suggests."""

    @property
    def max_model_len(self) -> int:
        """Longest context, prompt and output together, in tokens."""
        return self.limits.max_model_len

    @property
    def weights_bytes(self) -> int:
        """Memory of one replica's weights."""
        return weights_bytes(self.spec, self.weights)

    @property
    def weights(self) -> str:
        """What matrices are kept in: "int8", or "" for the dtype."""
        return self.config.weights or ""

    @property
    def page_bytes(self) -> int:
        """Memory of one KV page."""
        return self.spec.page_bytes(self.limits.page_size)

    @property
    def replica_bytes(self) -> int:
        """Memory one replica takes in all: weights, KV pages, buffers, processes."""
        return replica_bytes(self.spec, self.limits, self.weights)

    def children(self) -> tuple[ChildSpec, ...]:
        """The processes below the supervisor, in start order: tokenizer, router, each replica core and its chip."""
        timeout_s = self.config.start_timeout_s
        replicas = self.topology.replicas
        tokenizer = ChildSpec(
            name=TOKENIZER,
            kind="tokenizer",
            connect=("host",),
            config={
                "model": str(self.model_dir),
                "max_model_len": self.max_model_len,
                "eos_token_ids": self.spec.eos_token_ids,
                "max_request_restarts": self.config.max_request_restarts,
            },
            start_timeout_s=timeout_s,
        )
        router = ChildSpec(
            name=ROUTER,
            kind="router",
            connect=(TOKENIZER,),
            config={
                "replicas": [place.name for place in replicas],
                "max_waiting": self.config.max_waiting,
                "max_request_restarts": self.config.max_request_restarts,
            },
            start_timeout_s=timeout_s,
        )
        return (tokenizer, router, *(child for place in replicas for child in self._group(place)))

    def _group(self, place: ReplicaPlace) -> tuple[ChildSpec, ...]:
        [chip] = place.chips  # tensor parallelism is refused by the topology
        core = ChildSpec(
            name=place.name,
            kind="replica",
            group=place.name,
            connect=(ROUTER,),
            config={
                "replica": place.replica,
                "dp_rank": place.dp_rank,
                "chip": chip.name,
                "model_dir": str(self.model_dir),
                "dtype": self.config.dtype,
                "weights": self.weights,
                "limits": msgspec.to_builtins(self.limits),
                "prefill_chunk_tokens": self.config.prefill_chunk_tokens,
                "prefix_cache": self.config.prefix_cache,
                "max_waiting": self.config.max_waiting,
                "max_request_restarts": self.config.max_request_restarts,
                "load_timeout_s": self.config.start_timeout_s,
                "step_timeout_s": STEP_TIMEOUT_S,
            },
            start_timeout_s=self.config.start_timeout_s,
        )
        return (core, self._chip(place, chip))

    def _chip(self, place: ReplicaPlace, chip: ChipPlace) -> ChildSpec:
        return ChildSpec(
            name=chip.name,
            kind="chip",
            group=place.name,
            connect=(place.name,),
            preload="torch" if chip.device.kind == "cpu" else "light",
            keeps_weights=chip.device.kind == "cpu",
            config={
                "device": str(chip.device),
                "threads": self.threads,
                "check_numerics": self.config.check_numerics,
            },
            start_timeout_s=self.config.start_timeout_s,
        )

    def boot(self, run_dir: Path) -> Boot:
        """What the supervisor is told."""
        return Boot(
            run_dir=str(run_dir),
            host_pid=os.getpid(),
            children=self.children(),
            # A chip keeps nothing a new core could use; a core can have a new chip compute everything again.
            strategies={place.name: REST_FOR_ONE for place in self.topology.replicas},
            max_restarts=self.config.max_restarts,
            stall_timeout_s=self.config.stall_timeout_s,
            close_timeout_s=self.config.close_timeout_s,
            record=None if self.config.record is None else str(self.config.record.absolute()),
            seed=self.config.seed,
            log_level=self.config.log_level,
        )


def plan_engine(config: EngineConfig, topology: Topology | None = None) -> EnginePlan:
    """Check settings, model, placement and memory together. Raises ``ConfigError`` and its subclasses."""
    model_dir = model_directory(config.model)
    spec = ModelSpec.from_directory(model_dir, config.dtype)
    if topology is None:
        topology = Topology.of(
            config.data_parallel_size,
            config.tensor_parallel_size,
            config.layers,
            config.devices,
            config.chip,
            spec.num_layers,
        )
    else:
        _check_agreement(config, topology)
    for chip in topology.chips:
        if chip.device.kind == "cuda":
            raise ConfigError(
                f"device {chip.device} runs tile programs (L3Worker), but serves no model in this version; use cpu:"
                " the kernels of the Qwen3 programs are the cpu chip's"
            )
    replicas = len(topology.replicas)
    limits = _limits(config, spec, replicas)
    check_memory(spec, limits, replicas, weights=config.weights or "")
    cores = len(os.sched_getaffinity(0))
    return EnginePlan(
        config=config,
        model_dir=model_dir,
        spec=spec,
        topology=topology,
        limits=limits,
        threads=config.threads or max(1, cores // len(topology.chips)),
        generation_defaults=generation_defaults(model_dir),
    )


def model_directory(model: str) -> Path:
    """Where a model is: the directory named, or with ``DEMO_MODEL`` the one that ships with the package."""
    if model == DEMO_MODEL:
        return Path(str(files("chipbus").joinpath("demo")))
    return Path(model).expanduser().absolute()


def _check_agreement(config: EngineConfig, topology: Topology) -> None:
    """Sizes may be given once: in the topology, or as settings of their own."""
    parallel = topology.parallel
    for name, default in (("data_parallel_size", 1), ("tensor_parallel_size", 1)):
        wanted = getattr(config, name)
        if wanted not in (default, getattr(parallel, name)):
            raise TopologyError(
                f"{name} is {wanted}, but the topology has {getattr(parallel, name)}; give one of the two"
            )
    if config.devices is not None:
        raise TopologyError(f"devices is {config.devices!r}, but a topology is given, too; give one of the two")


def _limits(config: EngineConfig, spec: ModelSpec, replicas: int) -> Limits:
    """Context and pages: what is asked for, else what model and memory allow."""
    if config.max_model_len is not None and config.max_model_len > spec.max_context:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}; the model was made for at most {spec.max_context} positions"
        )
    context = config.max_model_len or spec.max_context
    if config.kv_pages is not None:
        held = config.kv_pages * config.page_size
        if config.max_model_len is not None and held < config.max_model_len:
            raise ConfigError(
                f"kv_pages is {config.kv_pages}: with page_size {config.page_size} that holds {held} tokens, less than"
                f" max_model_len, {config.max_model_len}"
            )
        return _sized(config, min(context, held), config.kv_pages)
    available = available_bytes()
    while True:
        try:
            pages = default_kv_pages(
                spec,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=context,
                page_size=config.page_size,
                replicas=replicas,
                available=available,
                weights=config.weights or "",
            )
        except ConfigError:
            if config.max_model_len is not None or context <= config.page_size:
                raise  # asked for, or not even one page fits
            context //= 2
        else:
            return _sized(config, context, pages)


def _sized(config: EngineConfig, context: int, pages: int) -> Limits:
    return Limits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=context,
        page_size=config.page_size,
        num_pages=pages,
    )
