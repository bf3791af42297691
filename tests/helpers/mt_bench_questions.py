"""A question of each kind that MT-Bench has: two turns, right answers to show, one turn."""

MT_BENCH_QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["write", "again"]},
    {"question_id": 82, "category": "math", "turns": ["1+1", "2+2"], "reference": ["2", "4"]},
    {"question_id": 83, "category": "stem", "turns": ["why"]},
]
