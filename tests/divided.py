"""`sedd train`, which then says how many parameters this process holds and how many there are.

accelerate launch --config_file configs/accelerate/fsdp.yaml tests/divided.py FOLDER FLAGS: writes FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from sedd import cli, trainer

kept: list[trainer.SEDDTrainer] = []
real = trainer.SEDDTrainer._build


def build(self: trainer.SEDDTrainer, *args: object) -> None:
    kept.append(self)
    real(self, *args)  # type: ignore[arg-type]


trainer.SEDDTrainer._build = build  # type: ignore[method-assign]
status = cli.main(["train", *sys.argv[2:]])
parameters = list(kept[0].model.parameters())
held = {"held": sum(getattr(p, "_local_tensor", p).numel() for p in parameters), "all": sum(p.numel() for p in parameters)}
Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(held))
sys.exit(status)
