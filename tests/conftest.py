import multiprocessing
import os
import sys

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")           # equality to the bit is a promise on CPUs; CUDA_VISIBLE_DEVICES=0 tries a GPU

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
multiprocessing.set_forkserver_preload(["torchvision"])             # imported once for all processes that tests start
torch.set_num_threads(1)         # tiny networks; and threads that fight over busy cores wait for each other


@pytest.fixture(scope="session")
def root():
    return ROOT
