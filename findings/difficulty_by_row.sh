#!/usr/bin/env bash
# What does alpaca_eval's length-controlled win rate do with annotations of a part of its instructions?
#
# Guessed before running: it joins the difficulties to the annotations by the instruction, as both have
# one, or refuses. Found: it takes the difficulty that stands at the annotation's row. With the first
# five annotations left out (a judge that failed, or a file that was filtered), every instruction is
# fitted with the difficulty of the one five places before it, and nothing is said; a DataFrame that
# still has the rows' numbers as its index gives the other, right value.
#
# Installs alpaca-eval 0.6.6, scikit-learn 1.9.1 and pandas 3.1.1 in a folder that is removed
# afterwards; exits 1 if both ways give the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet scikit-learn==1.9.1 pandas==3.1.1 patsy==1.0.3 pyyaml tqdm
"$folder/venv/bin/pip" install --quiet --no-deps alpaca-eval==0.6.6
cat > "$folder/difficulty.py" <<'PYTHON'
import importlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pandas as pd

warnings.filterwarnings("ignore", category=FutureWarning)
# Only the function is needed, not the clients that the package imports for its judges.
root = Path(importlib.util.find_spec("alpaca_eval").submodule_search_locations[0])
for name in ("alpaca_eval", "alpaca_eval.metrics"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(root.parent / name.replace(".", "/"))]
sys.modules["datasets"] = types.ModuleType("datasets")
sys.modules["datasets"].Dataset = type("Dataset", (), {})
for name in ("pkg_resources", "huggingface_hub", "alpaca_eval.constants"):
    sys.modules[name] = MagicMock()
sys.modules["alpaca_eval"].constants = sys.modules["alpaca_eval.constants"]
glm = importlib.import_module("alpaca_eval.metrics.glm_winrate")

random = np.random.default_rng(0)
hard = 2 * random.normal(size=200)
table = pd.DataFrame(
    [
        (float(np.clip(0.5 - 0.2 * sign + 0.1 * random.normal(), 0, 1)), i, sign, hard[i], False, "m")
        for sign in (1.0, -1.0)
        for i in range(200)
    ],
    columns=[
        "preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline", "model"
    ],
)
path = sys.argv[1]
table.to_csv(path, index=False)
glm.hf_hub_download = lambda **_: path
annotations = [
    {
        "instruction": f"q{i}",
        "output_1": "x" * int(random.integers(10, 90)),
        "output_2": "y" * int(random.integers(10, 90)),
        "generator_1": "baseline",
        "generator_2": "model",
        "annotator": "judge",
        "preference": 1 + 1 / (1 + np.exp(-0.5 - hard[i])),
    }
    for i in range(200)
]


def rate(given):
    found = glm.get_length_controlled_winrate(given, save_weights_dir=None)
    return float(found["length_controlled_winrate"])


by_row = rate(annotations[5:])
by_index = rate(pd.DataFrame(annotations).iloc[5:])
print(f"without the first five: {by_row:.3f} by row, {by_index:.3f} with the rows' numbers kept")
sys.exit(abs(by_row - by_index) < 1e-3)
PYTHON
"$folder/venv/bin/python" -P "$folder/difficulty.py" "$folder/gamed.csv"
