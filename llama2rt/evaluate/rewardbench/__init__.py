"""RewardBench (Lambert et al. 2024, arXiv 2403.13787): its files, its weighting, and models of
three kinds on the same pairs.

`records` reads the benchmark's files and writes and reads result files as the `rewardbench` package
does; `weighting` makes section scores of accuracies, and loads no torch; `models` has a reward
model, a pairwise preference model or a judge rank the pairs; `commands` is `llama2rt rewardbench`.
"""
