"""Print torch's version and the user id inside the image."""

import os

import torch

print(torch.__version__, os.getuid())
