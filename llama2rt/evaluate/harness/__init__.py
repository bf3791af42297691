"""Tasks of EleutherAI's lm-evaluation-harness (`lm-eval`) on our models.

`requests` turns a task's texts into tokens as the harness does, `scoring` reads them packed, and
neither needs the harness. `model` is the class that it asks; `tasks` are what it is to ask, the
papers' lists among them; `runs` evaluates a model and keeps the harness's files; `versions`
compares those of a plan. `llama2rt evaluate MODEL --tasks` is `commands.evaluate_tasks`.
"""
