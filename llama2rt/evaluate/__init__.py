"""Accuracies, win rates and other statistics of models, each with its confidence interval.

`scoring` runs reward models, and `commands` is `llama2rt evaluate`. The rest is statistics on plain
arrays and loads no torch: `preference` (a reward model's accuracy by rating), `win_rates`,
`best_of` (reward against the number of samples), `length` (length bias), `calibration`,
`over_optimisation` (reward against a judge), `agreement` (of raters), `position` (bias of who
compares), `intervals`. `diagnostics` brings them together for the versions and reward models of any
plan, `human` is what people say on seven points. `judges` asks anybody which of two answers is
better; `rewardbench` and `chat_benchmarks` are benchmarks with files of their own, `harness` puts
models to lm-eval's tasks, `contamination` asks what of an evaluation set was trained on.
`llama2rt.report` draws them.
"""
