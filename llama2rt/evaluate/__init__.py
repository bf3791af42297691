"""Numbers about models: what a report may claim, with the interval it may claim it to.

`scoring` runs reward models; everything else is statistics on plain arrays and needs no torch:
`preference` (reward-model accuracy by rating), `win_rates`, `best_of` (reward against the number
of samples), `length` (length bias), `calibration`, `over_optimisation` (reward against a judge),
`agreement` (raters), `intervals`. `diagnostics` brings them together for the versions and reward
models of any plan; `commands` is the `llama2rt evaluate` verb. Drawing is the report's.
"""
