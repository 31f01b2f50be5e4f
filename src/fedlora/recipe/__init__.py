"""A method as a value, slot by slot, and the combinations that are refused.

A recipe never knows which method it came from.
"""

from fedlora.recipe.recipe import (
    Phase,
    Recipe,
)

__all__ = [
    "Phase",
    "Recipe",
]
