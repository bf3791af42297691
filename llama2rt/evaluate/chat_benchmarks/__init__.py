"""AlpacaEval 2, MT-Bench and Arena-Hard: their questions, answers and judgements in their own
files, so that their tools read ours and ours read theirs.

Each format is a module: `alpaca_eval` with `length_control`, `mt_bench` with `mt_bench_pairs`,
`arena_hard` with `style_control`. `answering` has a model answer, turn by turn; `commands` is
`llama2rt benchmark`. The benchmarks' questions, prompts for judges and published answers are theirs
and are read, not shipped.
"""
