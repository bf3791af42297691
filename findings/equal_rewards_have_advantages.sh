#!/usr/bin/env bash
# What does group-relative normalisation make of a group whose responses are all worth the same?
#
# Guessed before running: advantages of 0, since (r - mean) / (std + eps) is 0 / eps. Found: with TRL
# the mean of equal fp32 rewards is not quite the reward, so that numerator and std are one rounding,
# about the size of eps for rewards of a hundred: every response of the group gets the same advantage,
# 0.07 for five rewards of 123.456, 0.37 for six of 1000.1 (a response that is clearly better than
# its group has about 1). A group without any signal pushes all its responses, up or down by chance.
# With verl's eps of 1e-6 the same arithmetic gives 0.62 for seven rewards of 27.63.
#
# Installs trl 1.16.0 without what it depends on, numpy 2.4.6 and torch 2.13.0 in a folder that is
# removed afterwards, and runs the statements of GRPOTrainer as they stand; exits 1 if equal rewards
# have no advantage any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps trl==1.16.0
cat > "$folder/advantages.py" <<'PYTHON'
import ast
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

trainer = Path(importlib.util.find_spec("trl").submodule_search_locations[0], "trainer")
names = {"torch": torch, "device": "cpu"}


def run(statements):
    exec(compile(ast.Module(statements, []), "trl", "exec"), names)


utilities = ast.parse((trainer / "utils.py").read_text())
run([node for node in utilities.body if getattr(node, "name", "") == "nanstd"])
(branch,) = (
    node
    for node in ast.walk(ast.parse((trainer / "grpo_trainer.py").read_text()))
    if isinstance(node, ast.If) and "'sum_then_normalize'" in ast.unparse(node.test)
    and any("advantages" in ast.unparse(statement) for statement in node.body)
)
found = {}
for size, reward in ((4, 1.0), (5, 123.456), (6, 1000.1), (7, 1000.1)):
    names.update(
        self=SimpleNamespace(reward_weights=torch.ones(1), scale_rewards="group"),
        rewards_per_func=torch.full((size, 1), reward),
        unscorable_mask=torch.zeros(size, dtype=torch.bool),
        num_generations=size,
    )
    run(branch.body)
    found[size, reward] = names["advantages"].abs().max().item()
    print(f"{size} rewards of {reward}: advantages {names['advantages'].tolist()}")
holds = found[4, 1.0] == 0 and found[5, 123.456] > 0.05 and found[6, 1000.1] > 0.3
sys.exit(0 if holds else "it has changed")
PYTHON
"$folder/venv/bin/python" "$folder/advantages.py"
