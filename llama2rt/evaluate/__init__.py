"""Numbers about models: what a report may claim, with the interval it may claim it to.

`scoring` runs reward models; everything else is statistics on plain arrays and needs no torch:
`preference` (reward-model accuracy by rating), `win_rates`, `best_of` (reward against the number
of samples), `length` (length bias), `agreement` (raters), `intervals`. `commands` is the
`llama2rt evaluate` verb. Drawing is the report's.
"""
