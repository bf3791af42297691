"""Clusters: collectives and power measured where there is hardware, predicted where there is not.

Imports point one way: hardware < collectives, power_curve < workload < step_time < calibration <
prediction, search < compare, validate < commands, training_commands. What measures stands apart:
operations, presets < timing, host < records, bench_output < bench < emulate; power_sweep. Of the
rest of llama2rt only the shape of a model (`model.config`) is known here; the models load no torch.
"""
