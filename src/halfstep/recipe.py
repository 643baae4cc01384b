"""The address of `SampleSpec` and `Recipe` that scripts of before the rooms import from."""

from halfstep.core.recipe import Recipe as Recipe
from halfstep.core.recipe import SampleSpec as SampleSpec
