"""`sedd train`, which then says how many parameters this process holds, how many while it validates, and how many there are.

accelerate launch --config_file configs/accelerate/fsdp.yaml tests/divided.py FOLDER FLAGS: writes FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from sedd import cli
from sedd.nn.blocks import Block
from sedd.training.learner import Learner
from sedd.training.validation import Validator

kept: list[Learner] = []
real = Learner.__init__


def build(self: Learner, *args: object) -> None:
    kept.append(self)
    real(self, *args)  # type: ignore[arg-type]


def holds(model: torch.nn.Module) -> int:
    return sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())


validated: list[int] = []
validate = Validator.run


def run(self: Validator, model: torch.nn.Module, **given: object) -> object:
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    hooks = [block.mlp.register_forward_hook(lambda *_: validated.append(sum(map(holds, blocks)))) for block in blocks]
    found = validate(self, model, **given)  # type: ignore[arg-type]
    for hook in hooks:
        hook.remove()
    return found


Validator.run = run  # type: ignore[assignment,method-assign]
Learner.__init__ = build  # type: ignore[method-assign]
status = cli.main(["train", *sys.argv[2:]])
model = kept[0].model
blocks = sum(p.numel() for module in model.modules() if isinstance(module, Block) for p in module.parameters())
held = {"held": holds(model), "all": sum(p.numel() for p in model.parameters()), "validated": max(validated), "blocks": blocks}
Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(held))
sys.exit(status)
