"""Kedro datasets for the file kinds that kedro-datasets has no dataset for."""

from qvl_pipeline.datasets.place import PlaceDataset
from qvl_pipeline.datasets.previewed import CurvesDataset, PageDataset
from qvl_pipeline.datasets.sealed import JsonDataset
from qvl_pipeline.datasets.table import TableDataset
from qvl_pipeline.datasets.written import FileDataset, FolderDataset

__all__ = [
    "CurvesDataset",
    "FileDataset",
    "FolderDataset",
    "JsonDataset",
    "PageDataset",
    "PlaceDataset",
    "TableDataset",
]
