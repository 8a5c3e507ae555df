"""From what the user asks for to a plan: a recipe, a budget, another file's types, or measurements."""
