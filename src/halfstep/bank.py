"""The address of `Bank` that pipeline folders name in their model_index.json, and scripts of before import from."""

from halfstep.engine.bank import Bank as Bank
from halfstep.nets.models import load_denoiser as load_denoiser
