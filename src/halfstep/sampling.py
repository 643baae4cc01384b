"""The address of the sampling loop that scripts of before the rooms import from."""

from halfstep.engine.sampling import denoise as denoise
from halfstep.engine.sampling import reference_plan as reference_plan
from halfstep.engine.sampling import sample_images as sample_images
from halfstep.engine.stepaware import StepAwarePipeline as StepAwarePipeline
