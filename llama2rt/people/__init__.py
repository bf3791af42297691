"""People say which of two responses is better, on a page of this machine: `llama2rt people`.

Comparisons for reward models (Llama 2, section 3.2.1), human evaluation of versions (section 3.4.2,
appendix A.3.7), and the blind check of a model's answers against people's (section 3.1).
"""
