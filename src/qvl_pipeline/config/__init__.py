"""Parameters of every stage: one pydantic model per block, the only place for defaults, units and cross-checks."""

from qvl_pipeline.config.base import Block
from qvl_pipeline.config.compare import CompareConfig
from qvl_pipeline.config.data.engine import DataEngineConfig
from qvl_pipeline.config.data.ingest import DatasetSource, DigitsDemoConfig, IngestConfig
from qvl_pipeline.config.data.sample import SampleConfig
from qvl_pipeline.config.data.validate import ValidateConfig
from qvl_pipeline.config.evaluate import EvaluateConfig
from qvl_pipeline.config.model import ModelConfig
from qvl_pipeline.config.preflight import PreflightConfig
from qvl_pipeline.config.replay import ReplayConfig
from qvl_pipeline.config.server import ServerConfig
from qvl_pipeline.config.training.adapter import AdapterConfig
from qvl_pipeline.config.training.batching import BatchingConfig
from qvl_pipeline.config.training.train import FSDPConfig, TrainConfig

BLOCKS: dict[str, type[Block]] = {
    "ingest": IngestConfig,
    "validate": ValidateConfig,
    "sample": SampleConfig,
    "model": ModelConfig,
    "batching": BatchingConfig,
    "train": TrainConfig,
    "adapter": AdapterConfig,
    "evaluate": EvaluateConfig,
    "data_engine": DataEngineConfig,
    "preflight": PreflightConfig,
    "compare": CompareConfig,
    "replay": ReplayConfig,
}

__all__ = [
    "BLOCKS",
    "AdapterConfig",
    "BatchingConfig",
    "Block",
    "CompareConfig",
    "DataEngineConfig",
    "DatasetSource",
    "DigitsDemoConfig",
    "EvaluateConfig",
    "FSDPConfig",
    "IngestConfig",
    "ModelConfig",
    "PreflightConfig",
    "ReplayConfig",
    "SampleConfig",
    "ServerConfig",
    "TrainConfig",
    "ValidateConfig",
]
