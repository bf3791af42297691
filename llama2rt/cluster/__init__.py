"""Clusters: collectives and power, measured where there is hardware and predicted where not.

The predicting modules build on each other in this order: hardware; collectives, power_curve;
workload; step_time; calibration; prediction, search; compare, validate; commands,
training_commands. The measuring modules: operations, presets; timing, host; records, bench_output;
bench; emulate; and power_sweep by itself. Of the rest of llama2rt only the shape of a model
(`model.config`) is known here. Predicting loads no torch.
"""
