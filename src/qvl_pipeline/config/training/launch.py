"""Parameters of starting and watching the training processes: nodes, rendezvous, restarts, timeouts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from qvl_pipeline.config.base import Block
from qvl_pipeline.errors import UserError

# Where a value that is `auto` comes from: torchrun's own variables (set by Kubeflow), the older ones, SLURM's.
_VARIABLES = {
    "nnodes": ("PET_NNODES", "SLURM_NNODES"),
    "node_rank": ("PET_NODE_RANK", "NODE_RANK", "SLURM_NODEID"),
    "rdzv_endpoint": ("PET_RDZV_ENDPOINT",),
    # srun sets the last to the node that it was started on, which in a batch script is the first of the job.
    "master_addr": ("PET_MASTER_ADDR", "MASTER_ADDR", "SLURM_LAUNCH_NODE_IPADDR"),
    "master_port": ("PET_MASTER_PORT", "MASTER_PORT"),
}
_PORT = 29500


class Nodes(NamedTuple):
    """The nodes of a job, as this one sees them; `endpoint` is `host:port` of node 0, empty for a single node."""

    nnodes: int
    node_rank: int
    endpoint: str


THIS_NODE = Nodes(1, 0, "")


class LaunchConfig(Block):
    """How the training processes are started and watched. Every node runs the same command.

    Attributes:
        nnodes: Nodes of the job; `auto` takes `PET_NNODES` (Kubeflow) or `SLURM_NNODES`, else 1.
        node_rank: Number of this node, from 0; `auto` takes `PET_NODE_RANK`, `NODE_RANK` or `SLURM_NODEID`, else 0.
            Only node 0 writes catalog entries and MLflow.
        rdzv_endpoint: `host:port` of node 0, where the nodes meet; `auto` takes `PET_RDZV_ENDPOINT`, else it is
            `master_addr:master_port`.
        master_addr: Host of node 0; `auto` takes `PET_MASTER_ADDR`, `MASTER_ADDR` or `SLURM_LAUNCH_NODE_IPADDR`.
        master_port: A free port of node 0; `auto` takes `PET_MASTER_PORT` or `MASTER_PORT`, else 29500.
        max_restarts: How often torchrun restarts all processes after one failed; they go on from the newest checkpoint.
        ddp_timeout: Seconds after which a collective that some process never enters fails, while the model is loaded,
            compiled and exported.
        step_timeout_s: Seconds that a step after the first may take; the process at fault is then named with its
            samples, and training ends. 0 does not watch.
    """

    nnodes: int | Literal["auto"] = "auto"
    node_rank: int | Literal["auto"] = "auto"
    rdzv_endpoint: str = "auto"
    master_addr: str = "auto"
    master_port: int | Literal["auto"] = "auto"
    max_restarts: int = Field(default=0, ge=0)
    ddp_timeout: float = Field(default=3600, gt=0)
    step_timeout_s: float = Field(default=600, ge=0)

    @model_validator(mode="after")
    def _node_is_one_of_the_nodes(self) -> LaunchConfig:
        if self.nnodes != "auto" and self.nnodes < 1:
            raise ValueError(f"nnodes must be 'auto' or at least 1, but is {self.nnodes}")
        if self.node_rank != "auto" and self.node_rank < 0:
            raise ValueError(f"node_rank must be 'auto' or at least 0, but is {self.node_rank}")
        if "auto" not in (self.nnodes, self.node_rank) and self.node_rank >= self.nnodes:
            raise ValueError(
                f"node_rank {self.node_rank} is not one of {self.nnodes} nodes: they are numbered from 0, so give the "
                f"last one node_rank={self.nnodes - 1}"
            )
        return self

    @model_validator(mode="after")
    def _one_address(self) -> LaunchConfig:
        if self.rdzv_endpoint != "auto" and (self.master_addr != "auto" or self.master_port != "auto"):
            raise ValueError(
                "rdzv_endpoint is host:port of node 0, and so are master_addr and master_port: set one or the others"
            )
        return self

    def nodes(self, environment: Mapping[str, str] = os.environ) -> Nodes:
        """Fill what is `auto` from the environment that torchrun, Kubeflow or SLURM set.

        Raises:
            UserError: There are several nodes, but it is not known which this is, or where node 0 is.
        """
        values = {name: self._value(name, environment) for name in _VARIABLES}
        nnodes = _number("nnodes", values["nnodes"] or "1")
        if nnodes == 1:
            return THIS_NODE
        if values["node_rank"] is None:
            raise UserError(
                f"train.launch: {nnodes} nodes, but which of them is this? Set node_rank, or start with srun"
            )
        endpoint = values["rdzv_endpoint"]
        if endpoint is None and values["master_addr"] is None:
            raise UserError(
                f"train.launch: {nnodes} nodes, but where is node 0? Set master_addr (its host name or address) or "
                "rdzv_endpoint (host:port), the same on all nodes"
            )
        node_rank = _number("node_rank", values["node_rank"])
        if not 0 <= node_rank < nnodes:
            raise UserError(f"train.launch: node_rank {node_rank} is not one of {nnodes} nodes, numbered from 0")
        return Nodes(nnodes, node_rank, endpoint or f"{values['master_addr']}:{values['master_port'] or _PORT}")

    def _value(self, name: str, environment: Mapping[str, str]) -> str | None:
        given = getattr(self, name)
        if given != "auto":
            return str(given)
        return next((environment[variable] for variable in _VARIABLES[name] if environment.get(variable)), None)


def _number(name: str, value: str) -> int:
    if not value.isdigit():
        raise UserError(f"train.launch.{name} must be a whole number, but the environment says '{value}'")
    return int(value)
