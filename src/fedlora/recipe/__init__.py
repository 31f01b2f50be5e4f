"""A method as a value, slot by slot, and the combinations that are refused.

A recipe is independent of the method that built it.
"""

from fedlora.recipe.recipe import (
    Phase,
    Recipe,
)

__all__ = [
    "Phase",
    "Recipe",
]
