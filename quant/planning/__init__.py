"""Which tensor gets which type: recipes, plans, padding, budgets, and the machine a file must fit."""
