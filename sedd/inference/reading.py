"""How the data that a model is applied to are read: as a user asks, and else as those of its training were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import pandas as pd

from sedd.config import ReadingSettings
from sedd.errors import SeveralPartsError
from sedd.inference.pretrained import Pretrained
from sedd.io.input.base import Input, Naming, check_names, has_names
from sedd.io.input.opening import open_input


@dataclass(frozen=True)
class Reading:
    """How data are read.

    Attributes
    ----------
    asked
        What a user asked for.
    trained
        How the data of the model were read, which holds where nothing else is asked for and these data allow it.
    """

    asked: ReadingSettings = field(default_factory=ReadingSettings)
    trained: ReadingSettings = field(default_factory=ReadingSettings)

    def naming(self, name: str, table: pd.DataFrame) -> Naming:
        """Return where names of the genes of a table come from."""
        asked = Naming(self.asked.gene_names, self.asked.strip_version or self.trained.strip_version)
        check_names(name, table, asked)
        column = self.trained.gene_names
        if asked.column is None and column is not None and has_names(table, column):
            return asked._replace(column=column)
        return asked

    def open(self, path: str) -> Input:
        """Open an input at the modality that is asked for."""
        modality, trained = self.asked.modality, self.trained.modality
        try:
            file = open_input(path, modality=modality)
        except SeveralPartsError as error:
            if trained not in error.names:
                raise
            return open_input(path, modality=trained)
        if modality is None and trained in file.modalities:
            file.close()
            return open_input(path, modality=trained)
        return file


AS_IT_IS = Reading()


def reading_of(model: Pretrained, arguments: Mapping[str, Any]) -> Reading:
    """Return how the data of a task are read.

    Parameters
    ----------
    arguments
        Of the task; those that are fields of `ReadingSettings` are looked at.
    """
    names = [own.name for own in fields(ReadingSettings)]
    return Reading(ReadingSettings(**{name: arguments[name] for name in names if name in arguments}), model.config.data)
