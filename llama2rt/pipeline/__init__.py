"""Several stages as one resumable job: a plan of steps (`plan`), its execution (`run`), and the
papers' course of RLHF as a plan in a file (`iterate`)."""
