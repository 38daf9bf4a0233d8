"""Where a node learns which of the nodes it is."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from qvl_pipeline.config.training.launch import LaunchConfig, Nodes
from qvl_pipeline.errors import UserError

KUBEFLOW = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29400"}
SLURM = {"SLURM_NNODES": "4", "SLURM_NODEID": "3", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}


@pytest.mark.parametrize(
    ("values", "environment", "nodes"),
    [
        ({}, {}, Nodes(1, 0, "")),
        ({}, {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "MASTER_ADDR": "a"}, Nodes(1, 0, "")),
        ({}, KUBEFLOW, Nodes(2, 1, "job-node-0-0.job:29400")),
        ({}, SLURM, Nodes(4, 3, "10.0.0.7:29500")),
        ({}, SLURM | {"MASTER_ADDR": "n1", "MASTER_PORT": "7"}, Nodes(4, 3, "n1:7")),
        ({"nnodes": 2, "node_rank": 0, "master_addr": "a", "master_port": 5}, SLURM, Nodes(2, 0, "a:5")),
        ({"nnodes": 2, "node_rank": 1, "rdzv_endpoint": "a:6"}, {}, Nodes(2, 1, "a:6")),
        ({"nnodes": 1}, KUBEFLOW, Nodes(1, 0, "")),
    ],
)
def test_given_values_win_over_those_of_the_environment(values: dict, environment: dict, nodes: Nodes) -> None:
    assert LaunchConfig(**values).nodes(environment) == nodes


@pytest.mark.parametrize(
    ("values", "environment", "sentence"),
    [
        ({"nnodes": 2}, {}, "which of them is this"),
        ({"nnodes": 2, "node_rank": 1}, {}, "where is node 0"),
        ({"nnodes": 2, "master_addr": "a"}, {"SLURM_NODEID": "2"}, "node_rank 2 is not one of 2 nodes"),
        ({}, {"PET_NNODES": "2:4"}, "nnodes must be a whole number, but the environment says '2:4'"),
    ],
)
def test_what_is_not_known_is_asked_for(values: dict, environment: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        LaunchConfig(**values).nodes(environment)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"nnodes": 0}, "at least 1"),
        ({"node_rank": -1}, "at least 0"),
        ({"nnodes": 2, "node_rank": 2}, "numbered from 0, so give the last one node_rank=1"),
        ({"rdzv_endpoint": "a:1", "master_addr": "a"}, "set one or the others"),
        ({"max_restart": 1}, "did you mean 'max_restarts'"),
    ],
)
def test_impossible_values_are_refused(values: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        LaunchConfig(**values)
