"""Kedro datasets for the file kinds that kedro-datasets has no dataset for."""

from qvl_pipeline.datasets.table import TableDataset
from qvl_pipeline.datasets.written import FileDataset, FolderDataset

__all__ = ["FileDataset", "FolderDataset", "TableDataset"]
