"""The paper's training stages, one page each: a recipe class and ``run(recipe, directory)``."""
